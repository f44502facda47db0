"""TLS: every context, every key pair, and every explanation of a certificate that cannot be used or verified.

Contexts are made of PEM text, whatever stands between its blocks. A context is never changed: a CA can be added
to one and not removed. Each is made once for its certificates, and shared by all connections until they change.
"""

import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.pem import certificates, facts_of, private_file, private_key
from k8s_consul_registrar.rotating import Derived, Rotating, fixed, read_file, reason
from k8s_consul_registrar.telemetry import get_logger

C = TypeVar("C", "Trust", "ServerCertificate")

log = get_logger("tls")

# Values: what a context is made of. They travel to worker processes, so their fields are plain.


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate (with its chain) and its key, both PEM; `origin` names both in error texts."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    origin: str = ""


@dataclass(frozen=True)
class Trust:
    """A client's side of TLS: the CAs it trusts (PEM), and the certificate it shows.

    An empty `ca` stands for the system's CAs; `ca_setting` says where `ca` came from, for error texts.
    """

    ca: str = field(default="", repr=False)
    is_verified: bool = True
    ca_setting: str = ""
    pair: KeyPair | None = field(default=None, repr=False)

    @property
    def source(self) -> str:
        """Where the CAs come from, for error texts."""
        return self.ca_setting if self.ca else "the system's certificates"

    @cached_property
    def context(self) -> ssl.SSLContext:
        """The context of a client; raises AccessError, naming the setting, if a CA or the pair cannot be used."""
        context = _context(ssl.PROTOCOL_TLS_CLIENT)
        # As Go does, for which most clusters' certificates are made: an intermediate is an anchor, too, and a
        # common name is no identity (RFC 9525, 2).
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.hostname_checks_common_name = False
        if not self.is_verified:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.ca:
            _believe(context, self.ca, self.ca_setting)
        else:
            context.load_default_certs()
        if self.pair is not None:
            _show(context, self.pair)
        return context


@dataclass(frozen=True)
class ServerCertificate:
    """A server's side of TLS: its certificate, and the CAs of its clients (PEM).

    With an empty `client_ca` no client needs a certificate; `ca_setting` names it in error texts.
    """

    pair: KeyPair = field(repr=False)
    client_ca: str = field(default="", repr=False)
    ca_setting: str = ""

    @cached_property
    def context(self) -> ssl.SSLContext:
        """The context of a server; raises AccessError, naming the setting, if a CA or the pair cannot be used."""
        context = _context(ssl.PROTOCOL_TLS_SERVER)
        # No resumption: each connection shows its certificate, and no session is kept for clients that never return.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
        _show(context, self.pair)
        if self.client_ca:
            _believe(context, self.client_ca, self.ca_setting)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


ServerTls = Derived[ServerCertificate]


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION  # a peer could ask for one after another
    # As before Python 3.13, whose default refuses CAs without key identifiers: kubeadm and older tools make them.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def key_pair_files(
    certificate: str | Path, key: str | Path, certificate_setting: str, key_setting: str
) -> Rotating[KeyPair]:
    """Return a certificate and its key; raises AccessError naming the settings and the files."""

    def load() -> KeyPair:
        origin = f"{certificate_setting} {certificate} with {key_setting} {key}"
        read = read_file(Path(certificate), certificate_setting), read_file(Path(key), key_setting)
        return checked(KeyPair(*read, origin))

    return Rotating(certificate_setting, [Path(certificate), Path(key)], load)


def client_tls(
    peer: "Peer", ca: str = "", certificate: str = "", key: str = "", *, is_verified: bool = True
) -> Derived[Trust]:
    """Return the TLS of a client, made of the files of a peer's settings; an empty name is no file.

    Raises AccessError naming the setting and the file.
    """
    pair: Rotating[KeyPair] | Rotating[None] = fixed(None)
    if certificate:
        # A certificate's file may hold its key as well.
        pair = key_pair_files(certificate, key or certificate, peer.certificate, peer.key)
    return Derived(
        lambda ca_pem, shown: _ready(Trust(ca_pem, is_verified, f"{peer.ca} {ca}" if ca else "", shown)),
        _ca_file(Path(ca), peer.ca) if ca else fixed(""),
        pair,
    )


def server_tls(
    certificate: str | Path, key: str | Path, client_ca: str | Path | None = None, *, setting: str
) -> ServerTls:
    """Return the TLS of a server, made of the files of `<setting>_CERT_FILE`, `_KEY_FILE` and `_CLIENT_CA_FILE`.

    Raises AccessError naming the setting and the file.
    """
    ca_setting = f"{setting}_CLIENT_CA_FILE"
    return Derived(
        lambda pair, ca: _ready(ServerCertificate(pair, ca, f"{ca_setting} {client_ca}")),
        key_pair_files(certificate, key, f"{setting}_CERT_FILE", f"{setting}_KEY_FILE"),
        _ca_file(Path(client_ca), ca_setting, _refuse_leaf) if client_ca else fixed(""),
    )


def _ca_file(path: Path, setting: str, check: Callable[[Trust], None] = lambda _: None) -> Rotating[str]:
    def load() -> str:
        trust = trust_in(read_file(path, setting), f"{setting} {path}")
        check(trust)
        return trust.ca

    return Rotating(setting, [path], load)


def trust_in(ca: bytes | None, setting: str) -> Trust:
    """Return the trust in the certificates of a bundle, or in the system's without one.

    Raises AccessError, naming the setting, if they cannot be used.
    """
    return _ready(Trust("" if ca is None else certificates(ca, setting), ca_setting=setting))


def _ready(value: C) -> C:
    """Build the context now, so that no connection waits for it."""
    _ = value.context
    return value


def checked(pair: KeyPair) -> KeyPair:
    """Return the pair if it can be shown; raises AccessError, naming its origin, otherwise."""
    _show(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), pair)
    problem = out_of_date(pair.certificate)
    if problem:
        log.warning("a certificate of our own is not valid now", problem=f"{pair.origin}: {problem}")
    return pair


def _believe(context: ssl.SSLContext, ca: str, setting: str) -> None:
    try:
        context.load_verify_locations(cadata=ca)
    except (OSError, ValueError, TypeError) as error:
        raise AccessError(f"{setting}: not a usable CA certificate: {_words(error)}") from None


def _show(context: ssl.SSLContext, pair: KeyPair) -> None:
    chain = certificates(pair.certificate, pair.origin).encode()
    try:
        with private_file(chain + private_key(pair.key, pair.origin)) as path:
            # The password keeps OpenSSL from asking on the terminal for an encrypted key's.
            context.load_cert_chain(path, password="")
    except (OSError, ValueError, TypeError) as error:
        raise AccessError(f"{pair.origin}: the certificate and key cannot be used: {_words(error)}") from None


def out_of_date(certificate: bytes) -> str:
    """Say why a certificate is not valid now, empty if it is, or if its dates cannot be read."""
    now, facts = time.time(), facts_of(certificate)
    if facts and now > ssl.cert_time_to_seconds(facts["notAfter"]):
        return f"the certificate expired on {facts['notAfter']}"
    if facts and now < ssl.cert_time_to_seconds(facts["notBefore"]):
        return f"the certificate is not valid before {facts['notBefore']}"
    return ""


def _refuse_leaf(trust: Trust) -> None:
    """Raise AccessError if the only certificate can neither have signed a client's nor be a client's own."""
    stats, facts = trust.context.cert_store_stats(), facts_of(trust.ca.encode())
    if stats["x509"] == 1 and not stats["x509_ca"] and facts and facts["issuer"] != facts["subject"]:
        raise AccessError(f"{trust.ca_setting}: {_ONLY_LEAVES}; name the file of the CA that signed it")


class Cause(Enum):
    """Causes of a TLS connection that did not come about."""

    UNKNOWN_CA = auto()
    OTHER_NAME = auto()
    OUT_OF_DATE = auto()
    NO_TLS = auto()
    OUR_CERTIFICATE = auto()
    NOT_READY = auto()
    OTHER = auto()


class Explanation(NamedTuple):
    """The cause of a failed TLS connection, and its remedy."""

    cause: Cause
    problem: str
    remedy: str

    @property
    def is_unverified(self) -> bool:
        """True if the peer's certificate could not be verified."""
        return self.cause in (Cause.UNKNOWN_CA, Cause.OTHER_NAME, Cause.OUT_OF_DATE)

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


@dataclass(frozen=True, slots=True)
class Peer:
    """A kind of server we connect to: the remedies for TLS that fails, and the settings that name our files."""

    remedies: Mapping[Cause, str]
    ca: str
    certificate: str = ""
    key: str = ""


_ONLY_LEAVES = "holds no CA certificate, only one of a server or client"
_RENEW = "it or its authority's is to be renewed, unless the clock here is wrong"
CONSUL = Peer(
    {
        Cause.UNKNOWN_CA: "CONSUL_CACERT must name a file with the CA that signed it",
        Cause.OTHER_NAME: "CONSUL_TLS_SERVER_NAME can give a name that the certificate has",
        Cause.OUT_OF_DATE: _RENEW,
        Cause.NO_TLS: "CONSUL_ADDRESS must begin with http://, or name Consul's https port",
        Cause.OUR_CERTIFICATE: "CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY must name one that Consul accepts",
    },
    "CONSUL_CACERT",
    "CONSUL_CLIENT_CERT",
    "CONSUL_CLIENT_KEY",
)
API_SERVER = Peer(
    {
        Cause.UNKNOWN_CA: "certificate-authority must hold the CA that signed it",
        Cause.OTHER_NAME: "tls-server-name of the kubeconfig can give a name that the certificate has",
        Cause.OUT_OF_DATE: _RENEW,
        Cause.NO_TLS: "server of the kubeconfig must begin with http://, or name the https port",
        Cause.OUR_CERTIFICATE: "client-certificate of the kubeconfig must be one that the API server accepts",
    },
    "certificate-authority",
)
_NO_CHECK = "set KUBELET_INSECURE_SKIP_TLS_VERIFY=true"
KUBELET = Peer(
    {
        Cause.UNKNOWN_CA: "set KUBELET_CA_FILE to the CA that signed it; where kubelets sign for themselves, have the "
        f"cluster sign (serverTLSBootstrap: true) or {_NO_CHECK}",
        Cause.OTHER_NAME: "set KUBELET_TLS_SERVER_NAME=node where it names the Node and not the address; otherwise "
        f"have the CA of KUBELET_CA_FILE sign another (serverTLSBootstrap: true) or {_NO_CHECK}",
        Cause.OUT_OF_DATE: "have the kubelet's serving certificate renewed (kubectl get csr)",
        Cause.NO_TLS: "is this the kubelet's https port (10250)?",
        Cause.OUR_CERTIFICATE: "KUBELET_CLIENT_CERT_FILE must name one of the kubelet's clientCAFile",
        Cause.NOT_READY: "a kubelet without a serving certificate waits for its approval: kubectl get csr",
    },
    "KUBELET_CA_FILE",
    "KUBELET_CLIENT_CERT_FILE",
    "KUBELET_CLIENT_KEY_FILE",
)
POD = Peer(
    {
        Cause.UNKNOWN_CA: "set POD_CA_FILE to the CA that signed it, or POD_INSECURE_SKIP_TLS_VERIFY=true",
        Cause.OTHER_NAME: "have the CA of POD_CA_FILE sign one for the Pod's address, or set "
        "POD_INSECURE_SKIP_TLS_VERIFY=true",
        Cause.OUT_OF_DATE: _RENEW,
        Cause.NO_TLS: "take the annotation prometheus.io/scheme away, or name the https port",
        Cause.OUR_CERTIFICATE: "the proxy shows Pods no certificate",
    },
    "POD_CA_FILE",
)
# OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID, _CERT_HAS_EXPIRED, _HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH.
_CAUSES = {9: Cause.OUT_OF_DATE, 10: Cause.OUT_OF_DATE, 62: Cause.OTHER_NAME, 64: Cause.OTHER_NAME}
# OpenSSL's names for what follows from plain HTTP where TLS belongs.
_PLAIN = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
# Alerts about a certificate (RFC 8446, 6.2): a server sends them about the client's.
_OF_OUR_CERTIFICATE = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")


def explain(
    error: BaseException, peer: Peer, context: ssl.SSLContext | None = None, *, trusted: str = ""
) -> Explanation | None:
    """Explain why TLS with a peer failed, None if that is not what the error is about.

    `context` is the one that was used, and `trusted` says where its CAs come from.
    """
    inner = _tls_error(error)
    if inner is None:
        return None
    if isinstance(inner, ssl.SSLCertVerificationError):
        cause = _CAUSES.get(inner.verify_code, Cause.UNKNOWN_CA)
        problem = f"its certificate cannot be verified: {printable(inner.verify_message)}"
        remedy = peer.remedies[cause]
        if cause is Cause.UNKNOWN_CA:
            stats = context.cert_store_stats() if context else {"x509": 0}
            is_leaf = stats["x509"] and not stats["x509_ca"]
            now = f"{trusted or peer.ca} {_ONLY_LEAVES}" if is_leaf else trusted
            remedy += f" (now: {now})" if now else ""
        return Explanation(cause, problem, remedy)
    words, alert = _words(inner), (inner.reason or "").partition("ALERT_")[2]
    if inner.reason in _PLAIN:
        cause, problem = Cause.NO_TLS, "it does not speak TLS"
    elif any(part in alert for part in _OF_OUR_CERTIFICATE):
        cause, problem = Cause.OUR_CERTIFICATE, f"it does not accept our certificate, or lack of one: {words}"
    elif alert == "INTERNAL_ERROR":
        cause, problem = Cause.NOT_READY, f"it cannot make a TLS connection: {words}"
    else:
        cause, problem = Cause.OTHER, f"TLS failed: {words}"
    return Explanation(cause, problem, peer.remedies.get(cause, ""))


def _tls_error(error: BaseException) -> ssl.SSLError | None:
    """Return the TLS error behind another: aiohttp's hold it in attributes."""
    for name in ("certificate_error", "os_error", "__cause__"):
        inner = getattr(error, name, None)
        if isinstance(inner, ssl.SSLError):
            return inner
    return error if isinstance(error, ssl.SSLError) else None


def _words(error: Exception) -> str:
    """Return plain words for OpenSSL's error: no text that may quote a secret, no place in Python's source."""
    if not isinstance(error, ssl.SSLError):
        return reason(error)
    name = error.reason or "it holds no certificate"
    explained = {"KEY_VALUES_MISMATCH": ": the key is another certificate's"}
    return name.lower().replace("_", " ") + explained.get(name, "")


def printable(text: str) -> str:
    """Return a library's text cut short and in ASCII: it may quote what a peer sent."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:200])


@contextmanager
def without_authorities() -> Iterator[None]:
    """Surround the import of aiohttp, which reads the system's authorities as it loads.

    It reads them twice, which takes 50 ms and a megabyte each time, for requests that bring no TLS context; every
    request here brings one. A request that brought none would trust no server.
    """
    load, find = ssl.create_default_context, ssl.SSLContext.set_default_verify_paths
    ssl.create_default_context = lambda *_, **__: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ssl.SSLContext.set_default_verify_paths = lambda _: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ssl.create_default_context = load
        ssl.SSLContext.set_default_verify_paths = find  # type: ignore[method-assign]
