"""Settings of the proxy."""

from dataclasses import dataclass

from k8s_consul_registrar.model import Kind, Source
from k8s_consul_registrar.proxy.routes import PERMITTED_PATHS
from k8s_consul_registrar.settings import parsers as parse
from k8s_consul_registrar.settings.common import ModeSettings, PodSelection
from k8s_consul_registrar.settings.field import Reader, Section, Setting, section
from k8s_consul_registrar.settings.parsers import Parser

LISTENING = "Proxy"
PODS = "Pods through the proxy"
# The first path is always relayed.
_PATHS = parse.choices(*PERMITTED_PATHS)


@dataclass(frozen=True, slots=True)
class InboundSettings(Section, group="Clients of the proxy"):
    """The proof that clients must give; without any of these settings the port is open to all."""

    bearer_token_file: str = Setting("PROXY_BEARER_TOKEN_FILE", parse.secret_file).means(
        "File with bearer tokens, one per line, of which each scrape must send one as `Authorization: Bearer`. "
        "Read again when it changes. Unset: anyone who reaches the port may scrape"
    )
    cert_file: str = Setting("TLS_CERT_FILE", parse.file).means(
        "File with the proxy's certificate chain. Clients must then use https. Read again when it changes, as "
        "are the two below"
    )
    key_file: str = Setting("TLS_KEY_FILE", parse.secret_file).means("File with the key of that certificate")
    client_ca_file: str = Setting("TLS_CLIENT_CA_FILE", parse.file).means(
        "File with CAs. Clients must show a certificate that one of them signed"
    )

    @property
    def is_authenticated(self) -> bool:
        """True if clients must prove who they are."""
        return bool(self.bearer_token_file or self.client_ca_file)

    def check(self, reader: Reader) -> None:
        """Report files of TLS that need another one."""
        reader.require_server_tls("TLS")


@dataclass(frozen=True, slots=True)
class KubeletSettings(Section, group="Kubelets"):
    """Verification of kubelets, and the certificate shown to them instead of a token."""

    ca_file: str = Setting("KUBELET_CA_FILE", parse.file).means(
        "File with the CA of the kubelets' certificates. Unset: the cluster's CA"
    )
    skip_verify: bool = Setting("KUBELET_INSECURE_SKIP_TLS_VERIFY", parse.boolean, "false").means(
        "`true`: accept any certificate of a kubelet"
    )
    tls_server_name: str = Setting("KUBELET_TLS_SERVER_NAME", parse.choice("ip", "node"), "ip").means(
        "What a kubelet's certificate must name: `ip`, the address that is connected to, or `node`, its Node"
    )
    client_cert_file: str = Setting("KUBELET_CLIENT_CERT_FILE", parse.file).means(
        "File with a client certificate for kubelets, used instead of a token. Read again when it changes"
    )
    client_key_file: str = Setting("KUBELET_CLIENT_KEY_FILE", parse.secret_file).means(
        "File with the key of that certificate"
    )

    def check(self, reader: Reader) -> None:
        """Report a certificate without its key, and a key without its certificate."""
        reader.require_pair("KUBELET_CLIENT_CERT_FILE", "KUBELET_CLIENT_KEY_FILE")


@dataclass(frozen=True, slots=True)
class ProxiedPods(PodSelection, group=PODS):
    """The Pods that are relayed, and how they prove who they are."""

    ca_file: str = Setting("POD_CA_FILE", parse.file).means(
        "File with the CAs of Pods that are scraped over https. Unset: the system's CAs"
    )
    skip_verify: bool = Setting("POD_INSECURE_SKIP_TLS_VERIFY", parse.boolean, "false").means(
        "`true`: accept any certificate of a Pod"
    )
    content_type_fallback: str = Setting(
        "POD_CONTENT_TYPE_FALLBACK",
        parse.matching(
            r"[A-Za-z0-9!#$&^_.+-]+/[\x20-\x7e]{1,150}", "is no media type, as `text/plain; version=0.0.4`"
        ),
    ).means(
        "The `Content-Type` passed on for Pods that send none, such as `text/plain; version=0.0.4`; Prometheus 3 "
        "fails a scrape without one. Unset: none"
    )

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources that are listed separately."""
        return tuple(Source(Kind.POD, namespace) for namespace in self.namespaces or ("",))


@dataclass(frozen=True, slots=True)
class ProxySettings(ModeSettings, group="Limits and shutdown"):
    """All settings of the proxy; times are in seconds."""

    port: int = Setting("PORT", parse.port, "8080", group=LISTENING).means(
        "HTTP port of the proxy, on IPv4 and IPv6"
    )
    paths: tuple[str, ...] = Setting(
        "PROXY_PATHS",
        Parser(lambda given: tuple(dict.fromkeys((PERMITTED_PATHS[0], *_PATHS.parse(given)))), _PATHS.schema),
        group=LISTENING,
    ).means(
        f"Comma-separated kubelet paths to relay besides `{PERMITTED_PATHS[0]}`: "
        + ", ".join(f"`{path}`" for path in PERMITTED_PATHS[1:])
    )
    allow_loopback: bool = Setting("PROXY_ALLOW_LOOPBACK", parse.boolean, "false", group=LISTENING).means(
        "`true`: relay to Nodes with loopback addresses, for trials"
    )
    kubelets: KubeletSettings = section(KubeletSettings)
    inbound: InboundSettings = section(InboundSettings)
    relays_pods: bool = Setting("PROXY_PODS", parse.boolean, "false", group=PODS).means(
        "`true`: relay annotated Pods too, at `/api/v1/namespaces/<namespace>/pods/<pod>/metrics`. Needs "
        "`PROXY_BEARER_TOKEN_FILE` or `TLS_CLIENT_CA_FILE`, and permission to list and watch Pods"
    )
    are_pods_open: bool = Setting("PROXY_PODS_ANONYMOUS", parse.boolean, "false", group=PODS).means(
        "`true`: relay Pods for clients without proof too, so that every author of a Pod can open one of its "
        "ports to all who reach the proxy"
    )
    pods: ProxiedPods | None = section(ProxiedPods, when="PROXY_PODS")
    stale_nodes_max: float = Setting("STALE_NODES_MAX", parse.seconds(), "3600").means(
        "Seconds for which the last known Nodes and Pods are used while the API server cannot be reached"
    )
    scrape_timeout_max: float = Setting("SCRAPE_TIMEOUT_MAX", parse.seconds(0.1), "120").means(
        "Longest scrape in seconds, whatever timeout the client announces"
    )
    concurrency_per_node: int = Setting("SCRAPE_CONCURRENCY_PER_NODE", parse.integer(1, 1000), "8").means(
        "Concurrent scrapes of one Node; further ones wait"
    )
    concurrency: int = Setting("SCRAPE_CONCURRENCY", parse.integer(1, 100_000), "512").means(
        "Concurrent scrapes of all Nodes, and as many of Pods; further ones wait"
    )
    workers: int = Setting("PROXY_WORKERS", parse.integer(1, 64), "1").means(
        "Processes that relay, for more than one core. Several share the limits above evenly"
    )
    drain_delay: float = Setting("DRAIN_DELAY", parse.seconds(), "3").means(
        "Seconds for which connections are still accepted after SIGTERM, until kube-proxy has noticed"
    )
    shutdown_grace: float = Setting("SHUTDOWN_GRACE", parse.seconds(), "25").means(
        "Seconds for running scrapes to finish after that"
    )

    def check(self, reader: Reader) -> None:
        """Report what does not go together across the sections."""
        if self.port and self.port == self.common.admin_port:
            reader.problem("ADMIN_PORT", f"{self.port} is PORT as well: health and metrics stay apart")
        if self.pods is None:
            for name in (
                "PROXY_PODS_ANONYMOUS",
                "POD_CA_FILE",
                "POD_INSECURE_SKIP_TLS_VERIFY",
                "POD_CONTENT_TYPE_FALLBACK",
            ):
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
