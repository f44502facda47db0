"""Whom the proxy lets ask, who it is to kubelets, and which Pods go through it, as frozen values."""

from dataclasses import dataclass

from k8s_consul_registrar.model import Kind, Source
from k8s_consul_registrar.settings.reader import Reader
from k8s_consul_registrar.settings.selection import annotation_prefix, namespaces, selector


@dataclass(frozen=True, slots=True)
class InboundSettings:
    """What callers must show; an open port where nothing is set."""

    bearer_token_file: str
    cert_file: str
    key_file: str
    client_ca_file: str

    @property
    def is_authenticated(self) -> bool:
        """Whether whoever asks must prove who he is."""
        return bool(self.bearer_token_file or self.client_ca_file)


@dataclass(frozen=True, slots=True)
class KubeletSettings:
    """Whom we believe to be a kubelet, and the certificate that we show it instead of a token."""

    ca_file: str
    skip_verify: bool
    tls_server_name: str
    client_cert_file: str
    client_key_file: str


@dataclass(frozen=True, slots=True)
class ProxiedPods:
    """Which Pods go through the proxy, and whom we believe to be one."""

    namespaces: tuple[str, ...]
    label_selector: str
    annotation_prefix: str
    ca_file: str
    skip_verify: bool

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is followed, each by itself."""
        return tuple(Source(Kind.POD, namespace) for namespace in self.namespaces or ("",))


def read_inbound(reader: Reader) -> InboundSettings:
    """Read what callers must show."""
    settings = InboundSettings(
        reader.text("PROXY_BEARER_TOKEN_FILE"),
        reader.text("TLS_CERT_FILE"),
        reader.text("TLS_KEY_FILE"),
        reader.text("TLS_CLIENT_CA_FILE"),
    )
    _require_pair(reader, "TLS_CERT_FILE", "TLS_KEY_FILE")
    if settings.client_ca_file and not settings.cert_file:
        reader.problem("TLS_CLIENT_CA_FILE", "needs TLS_CERT_FILE: without TLS no caller has a certificate")
    return settings


def read_kubelets(reader: Reader) -> KubeletSettings:
    """Read who kubelets are and who we are to them."""
    _require_pair(reader, "KUBELET_CLIENT_CERT_FILE", "KUBELET_CLIENT_KEY_FILE")
    return KubeletSettings(
        ca_file=reader.text("KUBELET_CA_FILE"),
        skip_verify=reader.boolean("KUBELET_INSECURE_SKIP_TLS_VERIFY"),
        tls_server_name=reader.choice("KUBELET_TLS_SERVER_NAME", ("ip", "node")),
        client_cert_file=reader.text("KUBELET_CLIENT_CERT_FILE"),
        client_key_file=reader.text("KUBELET_CLIENT_KEY_FILE"),
    )


def read_proxied_pods(reader: Reader, inbound: InboundSettings) -> ProxiedPods | None:
    """Read which Pods go through the proxy, None where none do."""
    is_on = reader.boolean("PROXY_PODS")
    is_anonymous = reader.boolean("PROXY_PODS_ANONYMOUS")
    pods = ProxiedPods(
        namespaces(reader),
        selector(reader, "POD_LABEL_SELECTOR"),
        annotation_prefix(reader),
        reader.text("POD_CA_FILE"),
        reader.boolean("POD_INSECURE_SKIP_TLS_VERIFY"),
    )
    if not is_on:
        for name in ("PROXY_PODS_ANONYMOUS", "POD_CA_FILE", "POD_INSECURE_SKIP_TLS_VERIFY"):
            if reader.is_set(name):
                reader.warnings.append(f"{name} has no effect without PROXY_PODS")
        return None
    if is_anonymous:
        reader.warnings.append(
            "PROXY_PODS_ANONYMOUS: every author of a Pod can open a port of it to whoever reaches the proxy"
        )
    elif not inbound.is_authenticated:
        reader.problem(
            "PROXY_PODS",
            "Pods are relayed only to callers that show who they are: set PROXY_BEARER_TOKEN_FILE or "
            "TLS_CLIENT_CA_FILE, or PROXY_PODS_ANONYMOUS=true to let every author of a Pod open a port of it",
        )
    return pods


def _require_pair(reader: Reader, certificate: str, key: str) -> None:
    for name, other in ((certificate, key), (key, certificate)):
        if reader.is_set(name) and not reader.is_set(other):
            reader.problem(other, f"is missing: {name} needs it")
