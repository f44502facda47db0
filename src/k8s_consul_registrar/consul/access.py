"""Where Consul is and who we are there."""

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.files import Followed

# OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH.
NAME_MISMATCHES = (62, 64)
# OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED.
OUT_OF_DATE = (9, 10)
# How long a token read from its file is used before the file is looked at again, in seconds.
TOKEN_FILE_AGE = 5.0


@dataclass(frozen=True, slots=True)
class ConsulAddress:
    """Where Consul listens: `url` (scheme, host, port, path prefix), or a Unix socket's path."""

    url: str
    socket: str = ""

    def __str__(self) -> str:
        return f"unix://{self.socket}" if self.socket else self.url


@dataclass(frozen=True, slots=True)
class ConsulAccess:
    """Everything a connection to Consul needs; `namespace` and `partition` are Consul Enterprise's.

    `tls` is for an https address, and may be None where the system's defaults do.
    """

    address: ConsulAddress
    token: str = field(default="", repr=False)
    token_file: str = ""
    tls: Followed[ssl.SSLContext] | None = field(default=None, repr=False)
    tls_server_name: str = ""
    namespace: str = ""
    partition: str = ""


class ConsulToken:
    """The ACL token: the one that was given, or the content of a file that is read again as it changes."""

    def __init__(self, access: ConsulAccess, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = Path(access.token_file) if access.token_file else None
        self._token = access.token
        self._clock = clock
        self._read_at: float | None = None
        self.version = 0  # how many times the token was seen to change

    def current(self) -> str:
        """Return the token, empty for none; raises `AccessError` when its file was never readable."""
        if self._file is None:
            return self._token
        now = self._clock()
        if self._read_at is None or now - self._read_at >= TOKEN_FILE_AGE:
            try:
                self._accept(self._file.read_text(encoding="utf-8").strip())
            except (OSError, UnicodeDecodeError) as error:
                # A file that is being replaced is missing for a moment; what was read still holds.
                if self._read_at is None:
                    raise AccessError(
                        f"CONSUL_HTTP_TOKEN_FILE {self._file} cannot be read: {error}"
                    ) from None
            self._read_at = now
        return self._token

    def _accept(self, token: str) -> None:
        if self._read_at is not None and token != self._token:
            self.version += 1
        self._token = token


def unverified(error: ssl.SSLCertVerificationError) -> str:
    """Say why Consul's certificate is not believed, and what repairs it."""
    if error.verify_code in NAME_MISMATCHES:
        hint = "CONSUL_TLS_SERVER_NAME can give a name that the certificate has"
    elif error.verify_code in OUT_OF_DATE:
        hint = "it or its authority's is to be renewed, unless the clock here is wrong"
    else:
        hint = "CONSUL_CACERT must name a file with the authority that signed it"
    return f"its certificate cannot be verified: {error.verify_message}; {hint}"


def followed_tls(
    *, ca_file: str = "", cert_file: str = "", key_file: str = "", verify: bool = True
) -> Followed[ssl.SSLContext]:
    """Make the TLS context for an https address, anew where a file changes.

    Raises `AccessError` naming the file at fault.
    """
    return Followed(
        "certificates for Consul",
        [Path(file) for file in (ca_file, cert_file, key_file) if file],
        lambda: build_ssl_context(ca_file=ca_file, cert_file=cert_file, key_file=key_file, verify=verify),
    )


def build_ssl_context(
    *, ca_file: str = "", cert_file: str = "", key_file: str = "", verify: bool = True
) -> ssl.SSLContext:
    """Make the TLS context for an https address; raises `AccessError` naming the file at fault."""
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise AccessError(f"CONSUL_CACERT {ca_file} cannot be used: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file:
        try:
            # The password keeps OpenSSL from asking on the terminal for an encrypted key's.
            context.load_cert_chain(cert_file, key_file or None, password="")
        except (OSError, ssl.SSLError) as error:
            raise AccessError(
                f"CONSUL_CLIENT_CERT {cert_file} with CONSUL_CLIENT_KEY {key_file or '(in the same file)'} "
                f"cannot be used: {error}"
            ) from None
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
