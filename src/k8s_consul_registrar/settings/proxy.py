"""Settings of the proxy."""

from dataclasses import dataclass
from typing import ClassVar

from k8s_consul_registrar.model import Kind, Source
from k8s_consul_registrar.proxy.routes import PERMITTED_PATHS
from k8s_consul_registrar.settings import parsers as parse
from k8s_consul_registrar.settings.common import ModeSettings, PodSelection
from k8s_consul_registrar.settings.field import Reader, Section, section, setting
from k8s_consul_registrar.settings.parsers import Parser

LISTENING = "Proxy"
KUBELETS = "Kubelets"
CLIENTS = "Clients of the proxy"
PODS = "Pods through the proxy"
LIMITS = "Limits and shutdown"
# The first path is always relayed.
_PATHS = parse.choices(*PERMITTED_PATHS)


def _require_pair(reader: Reader, certificate: str, key: str) -> None:
    for name, other in ((certificate, key), (key, certificate)):
        if reader.is_set(name) and not reader.is_set(other):
            reader.problem(other, f"is missing: {name} needs it")


@dataclass(frozen=True, slots=True)
class InboundSettings(Section):
    """The proof that clients must give; without any of these settings the port is open to all."""

    GROUP: ClassVar[str] = CLIENTS

    bearer_token_file: str = setting(
        "PROXY_BEARER_TOKEN_FILE",
        parse.secret_file,
        "File with bearer tokens, one per line, of which each scrape must send one as `Authorization: Bearer`. "
        "Read again when it changes. Unset: anyone who reaches the port may scrape",
    )
    cert_file: str = setting(
        "TLS_CERT_FILE",
        parse.file,
        "File with the proxy's certificate chain. Clients must then use https. Read again when it changes, as "
        "are the two below",
    )
    key_file: str = setting("TLS_KEY_FILE", parse.secret_file, "File with the key of that certificate")
    client_ca_file: str = setting(
        "TLS_CLIENT_CA_FILE",
        parse.file,
        "File with CAs. Clients must show a certificate that one of them signed",
    )

    @property
    def is_authenticated(self) -> bool:
        """True if clients must prove who they are."""
        return bool(self.bearer_token_file or self.client_ca_file)

    def check(self, reader: Reader) -> None:
        """Report files of TLS that need another one."""
        _require_pair(reader, "TLS_CERT_FILE", "TLS_KEY_FILE")
        if self.client_ca_file and not self.cert_file:
            reader.problem(
                "TLS_CLIENT_CA_FILE", "needs TLS_CERT_FILE: without TLS no client shows a certificate"
            )


@dataclass(frozen=True, slots=True)
class KubeletSettings(Section):
    """How kubelets prove who they are, and the certificate shown to them instead of a token."""

    GROUP: ClassVar[str] = KUBELETS

    ca_file: str = setting(
        "KUBELET_CA_FILE",
        parse.file,
        "File with the CA of the kubelets' certificates. Unset: the cluster's CA",
    )
    skip_verify: bool = setting(
        "KUBELET_INSECURE_SKIP_TLS_VERIFY",
        parse.boolean,
        "`true`: accept any certificate of a kubelet",
        default="false",
    )
    tls_server_name: str = setting(
        "KUBELET_TLS_SERVER_NAME",
        parse.choice("ip", "node"),
        "What a kubelet's certificate must name: `ip`, the address that is connected to, or `node`, its Node",
        default="ip",
    )
    client_cert_file: str = setting(
        "KUBELET_CLIENT_CERT_FILE",
        parse.file,
        "File with a client certificate for kubelets, used instead of a token. Read again when it changes",
    )
    client_key_file: str = setting(
        "KUBELET_CLIENT_KEY_FILE", parse.secret_file, "File with the key of that certificate"
    )

    def check(self, reader: Reader) -> None:
        """Report a certificate without its key, and a key without its certificate."""
        _require_pair(reader, "KUBELET_CLIENT_CERT_FILE", "KUBELET_CLIENT_KEY_FILE")


@dataclass(frozen=True, slots=True)
class ProxiedPods(PodSelection):
    """The Pods that are relayed, and how they prove who they are."""

    GROUP: ClassVar[str] = PODS

    ca_file: str = setting(
        "POD_CA_FILE",
        parse.file,
        "File with the CAs of Pods that are scraped over https. Unset: the system's CAs",
    )
    skip_verify: bool = setting(
        "POD_INSECURE_SKIP_TLS_VERIFY",
        parse.boolean,
        "`true`: accept any certificate of a Pod",
        default="false",
    )

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources that are listed separately."""
        return tuple(Source(Kind.POD, namespace) for namespace in self.namespaces or ("",))


@dataclass(frozen=True, slots=True)
class ProxySettings(ModeSettings):
    """All settings of the proxy; times are in seconds."""

    GROUP: ClassVar[str] = LIMITS

    port: int = setting(
        "PORT", parse.port, "HTTP port of the proxy, on IPv4 and IPv6", default="8080", group=LISTENING
    )
    paths: tuple[str, ...] = setting(
        "PROXY_PATHS",
        Parser(lambda given: tuple(dict.fromkeys((PERMITTED_PATHS[0], *_PATHS.parse(given)))), _PATHS.schema),
        f"Comma-separated kubelet paths to relay besides `{PERMITTED_PATHS[0]}`: "
        + ", ".join(f"`{path}`" for path in PERMITTED_PATHS[1:]),
        group=LISTENING,
    )
    allow_loopback: bool = setting(
        "PROXY_ALLOW_LOOPBACK",
        parse.boolean,
        "`true`: relay to Nodes with loopback addresses, for trials",
        default="false",
        group=LISTENING,
    )
    kubelets: KubeletSettings = section(KubeletSettings)
    inbound: InboundSettings = section(InboundSettings)
    relays_pods: bool = setting(
        "PROXY_PODS",
        parse.boolean,
        "`true`: relay annotated Pods too, at `/api/v1/namespaces/<namespace>/pods/<pod>/metrics`. Needs "
        "`PROXY_BEARER_TOKEN_FILE` or `TLS_CLIENT_CA_FILE`, and permission to list and watch Pods",
        default="false",
        group=PODS,
    )
    are_pods_open: bool = setting(
        "PROXY_PODS_ANONYMOUS",
        parse.boolean,
        "`true`: relay Pods for clients without proof too, so that every author of a Pod can open one of its "
        "ports to all who reach the proxy",
        default="false",
        group=PODS,
    )
    pods: ProxiedPods | None = section(ProxiedPods, when="PROXY_PODS")
    stale_nodes_max: float = setting(
        "STALE_NODES_MAX",
        parse.seconds(),
        "Seconds for which the last known Nodes and Pods are used while the API server cannot be reached",
        default="3600",
    )
    scrape_timeout_max: float = setting(
        "SCRAPE_TIMEOUT_MAX",
        parse.seconds(0.1),
        "Longest scrape in seconds, whatever timeout the client announces",
        default="120",
    )
    concurrency_per_node: int = setting(
        "SCRAPE_CONCURRENCY_PER_NODE",
        parse.integer(1, 1000),
        "Concurrent scrapes of one Node; further ones wait",
        default="8",
    )
    concurrency: int = setting(
        "SCRAPE_CONCURRENCY",
        parse.integer(1, 100_000),
        "Concurrent scrapes of all Nodes, and as many of Pods; further ones wait",
        default="512",
    )
    workers: int = setting(
        "PROXY_WORKERS",
        parse.integer(1, 64),
        "Processes that relay, for more than one core. Several share the limits above evenly",
        default="1",
    )
    drain_delay: float = setting(
        "DRAIN_DELAY",
        parse.seconds(),
        "Seconds for which connections are still accepted after SIGTERM, until kube-proxy has noticed",
        default="3",
    )
    shutdown_grace: float = setting(
        "SHUTDOWN_GRACE", parse.seconds(), "Seconds for running scrapes to finish after that", default="25"
    )

    def check(self, reader: Reader) -> None:
        """Report what does not go together across the sections."""
        if self.port and self.port == self.common.admin_port:
            reader.problem("ADMIN_PORT", f"{self.port} is PORT as well: health and metrics stay apart")
        if self.pods is None:
            for name in ("PROXY_PODS_ANONYMOUS", "POD_CA_FILE", "POD_INSECURE_SKIP_TLS_VERIFY"):
                if reader.is_set(name):
                    reader.warnings.append(f"{name} has no effect without PROXY_PODS")
        elif self.are_pods_open:
            reader.warnings.append(
                "PROXY_PODS_ANONYMOUS: every author of a Pod can open one of its ports to all who reach the proxy"
            )
        elif not self.inbound.is_authenticated:
            reader.problem(
                "PROXY_PODS",
                "Pods are relayed only to clients that prove who they are: set PROXY_BEARER_TOKEN_FILE or "
                "TLS_CLIENT_CA_FILE, or PROXY_PODS_ANONYMOUS=true to let every author of a Pod open a port of it",
            )
