"""TLS of a server of ours out of files that a Secret's volume replaces now and then."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.files import FromFiles


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A certificate (with its chain), its key, and the authority of clients' certificates; all PEM.

    Without `client_ca` no client needs a certificate. `setting` begins the names of the settings they come
    from, for error texts: `<setting>_CERT_FILE`, `_KEY_FILE`, `_CLIENT_CA_FILE`.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    setting: str = "HTTP_SD_TLS"


class ServerTls:
    """The TLS context of this moment: a new one whenever a file changed.

    Never an old one changed in place: authorities can be added to a context and not taken away. Once read,
    a context stays until another can be made, so that files caught half-way through their replacement
    neither open the port nor close it. `trust` is the content of `client_ca`: where it is another, whoever
    was believed before may have to be asked again.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Read the files; raises AccessError, naming the setting, where one cannot be used."""
        self._made = FromFiles(_paths(files), lambda: _build(files))

    @property
    def context(self) -> ssl.SSLContext:
        """The context for what is accepted from now on."""
        return self._made.value[0]

    @property
    def trust(self) -> bytes:
        """The authorities of clients' certificates, as their file holds them."""
        return self._made.value[1]

    def refresh(self) -> bool:
        """Read the files again where one changed, and say whether `context` is a new one.

        Raises AccessError, once for each change, where they cannot be used.
        """
        return self._made.refresh()


def _paths(files: TlsFiles) -> list[Path]:
    return [files.certificate, files.key, *([files.client_ca] if files.client_ca else [])]


def _build(files: TlsFiles) -> tuple[ssl.SSLContext, bytes]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # No resumption: whoever connects shows its certificate, and no session is kept for those who never return.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    trust = b""
    pair = f"{files.setting}_CERT_FILE {files.certificate} with {files.setting}_KEY_FILE {files.key}"
    try:
        # The password keeps OpenSSL from asking on the terminal for an encrypted key's.
        context.load_cert_chain(files.certificate, files.key, password="")
    except (OSError, ValueError) as error:
        raise AccessError(f"{pair} cannot be used: {_reason(error)}") from None
    if files.client_ca is not None:
        try:
            trust = files.client_ca.read_bytes()
            context.load_verify_locations(cadata=trust.decode("ascii", "replace"))
        except (OSError, ValueError) as error:
            raise AccessError(
                f"{files.setting}_CLIENT_CA_FILE {files.client_ca} cannot be used: {_reason(error)}"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context, trust


def _reason(error: OSError | ValueError) -> str:
    """Return the plain words for it, without the place in Python's source."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or "it holds no certificate").lower().replace("_", " ")
    return (isinstance(error, OSError) and error.strerror) or str(error)
