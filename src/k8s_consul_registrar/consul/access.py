"""Access to Consul: its address, its trust, our token."""

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from k8s_consul_registrar.rotating import (
    Rotating,
    clean_token,
    contained,
    read_file,
    refuse_truncated,
)
from k8s_consul_registrar.tls import read_certificates, read_pair, show

# OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH.
NAME_MISMATCHES = (62, 64)
# OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED.
OUT_OF_DATE = (9, 10)

TOKEN_FILE = "CONSUL_HTTP_TOKEN_FILE"  # noqa: S105 - the name of the setting


@dataclass(frozen=True, slots=True)
class ConsulAddress:
    """The address of Consul: `url` (scheme, host, port, path prefix), or a Unix socket's path."""

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
    tls: Rotating[ssl.SSLContext] | None = field(default=None, repr=False)
    tls_server_name: str = ""
    namespace: str = ""
    partition: str = ""


class ConsulToken:
    """The ACL token: the one that was given, or the content of a file that is read again as it changes."""

    def __init__(self, access: ConsulAccess, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = Path(access.token_file)
        self._token = "" if access.token_file else access.token
        self._file: Rotating[str] | None = None
        if access.token_file:
            self._file = Rotating(TOKEN_FILE, [self._path], self._load, is_lazy=True, clock=clock)
        self.version = 0  # how many times the token was seen to change

    def current(self) -> str:
        """Return the token, empty for none; raises AccessError while its file never held one."""
        if self._file is not None:
            token = self._file.current()
            if token != self._token:
                self.version += bool(self._token)
                self._token = token
        return self._token

    def _load(self) -> str:
        setting = f"{TOKEN_FILE} {self._path}"
        token = clean_token(read_file(self._path, TOKEN_FILE), setting)
        refuse_truncated(token, [self._token], self._path, setting)
        return token


def unverified(error: ssl.SSLCertVerificationError) -> str:
    """Say why Consul's certificate is not believed, and what repairs it."""
    if error.verify_code in NAME_MISMATCHES:
        hint = "CONSUL_TLS_SERVER_NAME can give a name that the certificate has"
    elif error.verify_code in OUT_OF_DATE:
        hint = "it or its authority's is to be renewed, unless the clock here is wrong"
    else:
        hint = "CONSUL_CACERT must name a file with the authority that signed it"
    return f"its certificate cannot be verified: {error.verify_message}; {hint}"


def rotating_tls(
    *, ca_file: str = "", cert_file: str = "", key_file: str = "", verify: bool = True
) -> Rotating[ssl.SSLContext]:
    """Make the TLS context for an https address, and another when a file changes.

    Raises AccessError naming the file at fault.
    """
    return Rotating(
        "CONSUL_CACERT" if ca_file else "CONSUL_CLIENT_CERT",
        [Path(file) for file in (ca_file, cert_file, key_file) if file],
        lambda: build_ssl_context(ca_file=ca_file, cert_file=cert_file, key_file=key_file, verify=verify),
    )


def build_ssl_context(
    *, ca_file: str = "", cert_file: str = "", key_file: str = "", verify: bool = True
) -> ssl.SSLContext:
    """Make the TLS context for an https address; raises AccessError naming the file at fault."""
    if ca_file:
        ca = read_certificates(Path(ca_file), "CONSUL_CACERT")
        with contained(f"CONSUL_CACERT {ca_file}"):
            context = ssl.create_default_context(cadata=ca)
    else:
        context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file:
        # A certificate's file may hold its key as well.
        key = Path(key_file or cert_file)
        show(context, read_pair(Path(cert_file), key, "CONSUL_CLIENT_CERT", "CONSUL_CLIENT_KEY"))
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
