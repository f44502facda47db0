"""Certificates, keys and TLS contexts, made of PEM text whatever stands between its blocks."""

import binascii
import os
import re
import ssl
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.rotating import Rotating, read_file, reason

# A label, and a body without five dashes; RFC 7468.
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----([^-]*(?:-(?!----)[^-]*)*)-----END \1-----")
# "X509 CERTIFICATE" is an older name of the same (RFC 7468, 5.2).
_CERTIFICATE_LABELS = (b"CERTIFICATE", b"X509 CERTIFICATE")
_BEGIN = b"-----BEGIN "
_LINE = 64


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate (with its chain) and its key, both PEM; `origin` names both in error texts."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Trust:
    """The authorities of an API server's certificate; an empty `ca` stands for the system's own list.

    `ca_setting` names where the CA came from, for error texts.
    """

    ca: str = field(default="", repr=False)
    is_verified: bool = True
    ca_setting: str = ""

    def ssl_context(self, pair: KeyPair | None = None) -> ssl.SSLContext:
        """Build a client's context with this trust that shows `pair`.

        Raises AccessError, naming the setting, if a certificate or key cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Go, for which most clusters' certificates are made, accepts an intermediate as an anchor and CAs
        # without key identifiers; Python 3.13 turns the strict check on by default elsewhere.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if not self.is_verified:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.ca:
            believe(context, self.ca, self.ca_setting)
        else:
            context.load_default_certs()
        if pair is not None:
            show(context, pair)
        return context


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A server's certificate (with its chain), its key, and the authority of clients' certificates; all PEM.

    Without `client_ca` no client needs a certificate. `setting` begins the names of the settings they come
    from, for error texts: `<setting>_CERT_FILE`, `_KEY_FILE`, `_CLIENT_CA_FILE`.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    setting: str = "HTTP_SD_TLS"


@dataclass(frozen=True, slots=True)
class ServerMaterial:
    """A server's context, and the PEM it was made of; `trust` is empty if no client needs a certificate."""

    pair: KeyPair
    trust: bytes = field(repr=False)
    context: ssl.SSLContext = field(repr=False, compare=False)


class ServerTls:
    """The TLS context of a server, a new one whenever its files change.

    An old context is never changed in place: authorities can be added to one and not taken away. A client
    that the old `trust` verified may have to be verified again once it changes.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Read the files; raises AccessError, naming the setting, if one cannot be used."""
        paths = [files.certificate, files.key, *([files.client_ca] if files.client_ca else [])]
        self._material = Rotating(f"{files.setting}_CERT_FILE", paths, lambda: _server_material(files))

    @property
    def material(self) -> ServerMaterial:
        """The last that could be used."""
        return self._material.value

    @property
    def context(self) -> ssl.SSLContext:
        """The context for new connections."""
        return self._material.value.context

    @property
    def trust(self) -> bytes:
        """The authorities of clients' certificates (PEM)."""
        return self._material.value.trust

    def refresh(self) -> bool:
        """Read the files again if one changed, and return whether `context` is a new one."""
        return self._material.refresh()


def _server_material(files: TlsFiles) -> ServerMaterial:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # No resumption: each connection shows its certificate, and no session is kept for clients that never return.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    pair = read_pair(files.certificate, files.key, f"{files.setting}_CERT_FILE", f"{files.setting}_KEY_FILE")
    show(context, pair)
    trust = ""
    if files.client_ca is not None:
        setting = f"{files.setting}_CLIENT_CA_FILE"
        trust = read_certificates(files.client_ca, setting)
        believe(context, trust, f"{setting} {files.client_ca}")
        context.verify_mode = ssl.CERT_REQUIRED
    return ServerMaterial(pair, trust.encode(), context)


def certificates(text: bytes, setting: str) -> str:
    """Return the PEM certificates of a bundle, without the comments between them, in any encoding.

    Raises AccessError if there is none, or if one is cut off or damaged: a bundle that is being written
    must not pass for a shorter one.
    """
    found: list[str] = []
    for label, body in _BLOCK.findall(text):
        if label in _CERTIFICATE_LABELS:
            found.append(_certificate(body, setting))
        elif label == b"TRUSTED CERTIFICATE":
            raise AccessError(
                f"{setting}: holds a TRUSTED CERTIFICATE, which only OpenSSL knows; "
                "`openssl x509` without -trustout turns it into a CERTIFICATE"
            )
    _refuse_cut_off(text, setting)
    if not found:
        raise AccessError(f"{setting}: holds no PEM certificate")
    return "".join(found)


def _certificate(body: bytes, setting: str) -> str:
    try:
        der = binascii.a2b_base64(b"".join(body.split()), strict_mode=True)
    except ValueError:
        raise AccessError(f"{setting}: holds a damaged certificate") from None
    text = b64encode(der).decode()
    lines = [text[start : start + _LINE] for start in range(0, len(text), _LINE)]
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])


def _refuse_cut_off(text: bytes, setting: str) -> None:
    rest = _BLOCK.sub(b"", text)
    last_line = re.split(rb"[\r\n]", rest)[-1]
    if _BEGIN in rest or (last_line and _BEGIN.startswith(last_line)):
        raise AccessError(f"{setting}: holds an unfinished PEM block")


def read_certificates(path: Path, setting: str) -> str:
    """Return the PEM certificates of a file; raises AccessError naming the setting and the file."""
    return certificates(read_file(path, setting), f"{setting} {path}")


def believe(context: ssl.SSLContext, ca: str, setting: str) -> None:
    """Make a context trust certificates (PEM); raises AccessError, naming the setting, if one is damaged."""
    try:
        context.load_verify_locations(cadata=ca)
    except (OSError, ValueError, TypeError) as error:
        raise AccessError(f"{setting}: not a usable CA certificate: {reason(error)}") from None


def read_pair(certificate: Path, key: Path, certificate_setting: str, key_setting: str) -> KeyPair:
    """Read a certificate and its key from files; raises AccessError naming the settings and the files."""
    origin = f"{certificate_setting} {certificate} with {key_setting} {key}"
    return KeyPair(read_file(certificate, certificate_setting), read_file(key, key_setting), origin)


def trust_in(ca: bytes | None, setting: str) -> Trust:
    """Return the trust in the certificates of a bundle, in the system's list without one.

    Raises AccessError, naming the setting, if they cannot be used.
    """
    if ca is None:
        return Trust(ca_setting=setting)
    trust = Trust(ca=certificates(ca, setting), ca_setting=setting)
    trust.ssl_context()
    return trust


def checked(pair: KeyPair) -> KeyPair:
    """Return the pair if it can be shown; raises AccessError, naming its origin, otherwise."""
    show(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), pair)
    return pair


def show(context: ssl.SSLContext, pair: KeyPair) -> None:
    """Make a context show a certificate; raises AccessError, naming its origin, if it cannot."""
    try:
        chain = certificates(pair.certificate, pair.origin).encode()
        with _private_file(chain + _private_key(pair)) as path:
            # The password keeps OpenSSL from asking on the terminal for an encrypted key's.
            context.load_cert_chain(path, password="")
    except (OSError, ValueError, TypeError) as error:
        raise AccessError(
            f"{pair.origin}: the certificate and key cannot be used: {reason(error)} "
            "(both PEM, the key of this certificate and not encrypted)"
        ) from None


def _private_key(pair: KeyPair) -> bytes:
    """Return the key's own block: its file may hold the certificate as well."""
    for block in _BLOCK.finditer(pair.key):
        if block[1].endswith(b"PRIVATE KEY"):
            return block[0] + b"\n"
    raise AccessError(f"{pair.origin}: holds no PEM private key")


@contextmanager
def _private_file(content: bytes) -> Iterator[str]:
    """Hold `content` in a file that no other process can open and that is gone afterwards.

    OpenSSL loads a key from a path only. On Linux a file in memory spares both the disk and the need for
    a writable one.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("client-key", os.MFD_CLOEXEC)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{descriptor}"
    else:
        with tempfile.NamedTemporaryFile() as named:
            named.write(content)
            named.flush()
            yield named.name


@contextmanager
def without_authorities() -> Iterator[None]:
    """Surround the import of aiohttp, which reads the system's authorities as it loads.

    They take 50 ms and a megabyte, for requests that bring no TLS context; all of ours bring one. A request
    that brought none would trust nobody.
    """
    load = ssl.create_default_context
    ssl.create_default_context = lambda *_, **__: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        yield
    finally:
        ssl.create_default_context = load
