"""A proxy as its admin endpoints see it, held in memory: for their tests and for pictures of the page."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from k8s_consul_registrar.admin.proxy_api import Certificate, ProxyView, SourceRow
from k8s_consul_registrar.model import Node, NodeAddress
from k8s_consul_registrar.proxy.nodes import POD, Endpoint, Nodes, NodeTable
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.proxy.routes import Pods, ProxiedPod, Route
from k8s_consul_registrar.proxy.stats import NO_STATS, Failure, LastScrape, ProxyStats

UNVERIFIED = (
    "the kubelet cannot be scraped: its certificate cannot be verified: self-signed certificate; set KUBELET_CA_FILE "
    "to the CA that signed it; where kubelets sign for themselves, have the cluster sign (serverTLSBootstrap: true)"
)


@dataclass
class Relay:
    """A proxy that relays nothing: a test says what it did."""

    figures: ProxyStats = NO_STATS
    failed: list[Failure] = field(default_factory=list)
    latest: dict[Endpoint, LastScrape] = field(default_factory=dict)

    def stats(self) -> ProxyStats:
        return self.figures

    def failures(self) -> list[Failure]:
        return self.failed

    def last_scrapes(self) -> Mapping[Endpoint, LastScrape]:
        return self.latest


def a_node(name: str, *addresses: str) -> Node:
    """Return a Ready Node at these addresses."""
    return Node(
        name=name,
        uid=f"uid-{name}",
        created="2026-01-01T00:00:00Z",
        addresses=tuple(NodeAddress("InternalIP", one) for one in addresses),
        ready=True,
    )


@dataclass
class SeenProxy:
    """A proxy of some Nodes and Pods, and its view."""

    relay: Relay = field(default_factory=Relay)
    nodes: Nodes = field(default_factory=Nodes)
    pods: Pods = field(default_factory=Pods)
    sources: list[SourceRow] = field(default_factory=lambda: [SourceRow("nodes", 0, 0.0, "")])
    certificates: list[Certificate] = field(default_factory=list)
    unready: str = ""
    facts: dict[str, object] = field(
        default_factory=lambda: {
            "api_server": "https://10.96.0.1:443",
            "port": 31112,
            "tls": True,
            "authentication": True,
        }
    )
    settings: dict[str, str] = field(default_factory=dict)

    def view(self) -> ProxyView:
        """Return what its endpoints read."""
        return ProxyView(
            self.relay,
            self.nodes,
            self.pods,
            lambda: self.sources,
            lambda: self.certificates,
            lambda: self.unready,
            self.facts,
            self.settings,
        )

    def put_nodes(self, *nodes: Node) -> None:
        """Let these be the Nodes."""
        self.nodes.replace(NodeTable.of(nodes))

    def put_pod(self, namespace: str, name: str, address: str, port: int = 9102) -> Endpoint:
        """Add a Pod, and return where it is scraped."""
        endpoint = Endpoint(address, port, address, f"uid-{namespace}-{name}", POD)
        self.pods.put(namespace, name, ProxiedPod((Route(endpoint, "/metrics"),), has_host_network=False))
        return endpoint

    def scraped(
        self, endpoint: Endpoint, seconds: float, ago: float = 1.0, expires_in: float | None = None
    ) -> None:
        """Note a scrape that was answered, by an upstream whose certificate expires in some seconds."""
        now = time.time()
        expires_at = None if expires_in is None else now + expires_in
        self.relay.latest[endpoint] = LastScrape(now - ago, seconds, Outcome.OK, expires_at)

    def failed(self, endpoint: Endpoint, outcome: Outcome, reason: str, ago: float = 1.0) -> None:
        """Note a scrape that failed."""
        self.relay.failed.append(Failure(time.time() - ago, endpoint, outcome, reason))
        self.relay.latest[endpoint] = LastScrape(time.time() - ago, 0.02, outcome)


def busy_proxy(nodes: int = 60, pods: int = 240) -> SeenProxy:
    """Return a proxy of a cluster on a day when a little of everything is wrong."""
    seen = SeenProxy()
    seen.put_nodes(
        a_node("control-plane-1", "192.0.2.250"),
        a_node("worker-x", "192.0.2.251", "192.0.2.10"),
        *(a_node(f"worker-{number:02}", f"192.0.2.{number}") for number in range(1, nodes)),
    )
    for number, endpoint in enumerate(seen.nodes.current.by_name.values()):
        if number % 13 == 5:
            seen.failed(endpoint, Outcome.UNVERIFIED, UNVERIFIED, ago=number / 5)
        elif number % 29 != 7:
            days = 0.6 if number == 3 else 40.5 + number
            seen.scraped(endpoint, 0.012 + number % 7 / 100, ago=number / 5, expires_in=days * 86400)
    for number in range(pods):
        team = ("shop", "search", "media")[number % 3]
        endpoint = seen.put_pod(team, f"cart-{number:03}", f"198.18.0.{number + 1}")
        if number % 41 == 3:
            seen.failed(endpoint, Outcome.POD_UNREACHABLE, "the Pod cannot be reached: connection refused")
        else:
            seen.scraped(endpoint, 0.004 + number % 5 / 1000, ago=number % 15)
    seen.sources = [SourceRow("nodes", nodes + 1, 0.0, ""), SourceRow("pods", 12_480, 0.0, "")]
    seen.certificates = [
        Certificate("TLS_CERT_FILE", time.time() + 61.5 * 86400),
        Certificate("KUBELET_CLIENT_CERT_FILE", time.time() + 9.5 * 86400),
    ]
    seen.settings = {
        "PORT": "31112",
        "PROXY_PODS": "true",
        "PROXY_WORKERS": "4",
        "PROXY_BEARER_TOKEN_FILE": "/token",
    }
    outcomes = dict.fromkeys(Outcome, 0) | {
        Outcome.OK: 48_211,
        Outcome.UNVERIFIED: 214,
        Outcome.UNKNOWN_PATH: 3,
    }
    seen.relay.figures = replace(
        NO_STATS, outcomes=outcomes, callers=12, kept=nodes + pods, running=3, workers=4, nodes_known=True
    )
    return seen
