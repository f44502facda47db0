"""What tests of the proxy's own TLS stand on: files as a Secret's volume holds them, and callers who speak it."""

import asyncio
import ssl
from pathlib import Path

import trustme

from k8s_consul_registrar.tls import ServerTls, TlsFiles
from support.proxy_kit import Answer, Proxy, get_request, parse_answer
from support.waiting import PATIENCE


class Files:
    """The files of one proxy, replaced as a test wants them."""

    def __init__(self, folder: Path, authority: trustme.CA, client_ca: trustme.CA | None = None) -> None:
        self.folder = folder
        self.certificate, self.key, self.client_ca = folder / "crt", folder / "key", folder / "ca"
        self.issue(authority)
        if client_ca is not None:
            self.trust(client_ca)
        self._has_client_ca = client_ca is not None

    def issue(self, authority: trustme.CA) -> None:
        """Put a new certificate and key in place."""
        leaf = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        self.key.write_bytes(leaf.private_key_pem.bytes())

    def trust(self, *authorities: trustme.CA) -> None:
        """Put these authorities of clients in place."""
        self.client_ca.write_bytes(b"".join(one.cert_pem.bytes() for one in authorities))

    def cut(self, path: Path, keep: float) -> None:
        """Leave this part of a file."""
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * keep)])

    def lose(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def tls(self) -> ServerTls:
        """Return the proxy's side."""
        return ServerTls(
            TlsFiles(self.certificate, self.key, self.client_ca if self._has_client_ca else None, "TLS")
        )


def caller_context(
    authority: trustme.CA,
    client_ca: trustme.CA | None = None,
    *,
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> ssl.SSLContext:
    """Return a caller's context that trusts one authority and shows a certificate of another."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.maximum_version = newest
    if client_ca is not None:
        client_ca.issue_cert("prometheus.example", key_type=trustme.KeyType.ECDSA).configure_cert(context)
    return context


class Caller:
    """One connection of a caller over TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def get(self, target: str, *headers: str) -> Answer:
        """Send one GET and read its answer, the connection kept."""
        self.writer.write(get_request(target, *headers))
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            return parse_answer(head + await self.reader.readexactly(length))

    async def ends(self) -> bool:
        """Return whether the proxy closes the connection before it says anything more."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await self.reader.read(1) == b""
        except (TimeoutError, OSError) as error:
            return not isinstance(error, TimeoutError)


async def connect(proxy: Proxy, context: ssl.SSLContext) -> Caller:
    """Open a connection over TLS, closed at the proxy's end at the latest."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", proxy.port, ssl=context, server_hostname="127.0.0.1"
    )
    proxy.writers.append(writer)
    return Caller(reader, writer)


async def get(proxy: Proxy, context: ssl.SSLContext, target: str, *headers: str) -> Answer:
    """Send one GET on a connection of its own; raises OSError where the handshake or the connection fails."""
    caller = await connect(proxy, context)
    try:
        return await caller.get(target, *headers)
    except asyncio.IncompleteReadError:
        raise ConnectionResetError from None
    finally:
        caller.writer.transport.abort()
