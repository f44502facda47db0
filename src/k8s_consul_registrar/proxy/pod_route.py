"""Which Pods may be scraped through the proxy, and where a request target about one leads."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import quote, urlencode

from k8s_consul_registrar.model import Pod
from k8s_consul_registrar.proxy.nodes import POD, POD_TLS, Endpoint, NodeTable, dialable_spelling
from k8s_consul_registrar.proxy.outcomes import Outcome, Refusal
from k8s_consul_registrar.proxy.route import UNKNOWN_PATH, Route
from k8s_consul_registrar.targets.reasons import Rejected
from k8s_consul_registrar.targets.scrape_config import ScrapeConfig, is_scraped, pod_scrape, require_declared

POD_PREFIX = b"/api/v1/namespaces/"
# What Go's net/url leaves as it is in a path, so that a Pod is asked by us what Prometheus would ask it.
_UNESCAPED = "$&+,/:;=@"
# A Pod's author writes the path; beyond this nothing is relayed.
LONGEST_PATH = 2048

# Names as the API server takes them (Kubernetes, "Object Names and IDs"). They are looked up and never become
# part of a request, so one that looks like an address or holds two dots leads to the Pod of that name or nowhere.
_TARGET = re.compile(
    rb"/api/v1/namespaces/(?P<namespace>[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)"
    rb"/pods/(?P<name>[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)"
    rb"(?::(?P<port>[1-9][0-9]{0,4}))?"
    rb"/metrics"
    rb"(?:\?[\x21\x22\x24-\x7e]*)?"
)

UNKNOWN_POD = Refusal(
    404, Outcome.UNKNOWN_POD, "no Pod of this name is annotated to be scraped, or not at this port"
)
PODS_UNKNOWN = Refusal(503, Outcome.PODS_UNKNOWN, "the Pods of the cluster are not known yet")


class ProxiedPod(NamedTuple):
    """A Pod that may be scraped, a route for each of its ports in the order of its annotation."""

    routes: tuple[Route, ...]
    has_host_network: bool


def proxied_pod(pod: Pod, prefix: str, *, allow_loopback: bool = False) -> ProxiedPod | None:
    """Return how a Pod is scraped, None where it does not ask for it or may not be.

    `prefix` begins its annotations. Its addresses are bound as a Node's are: a kubelet writes them.
    """
    if not is_scraped(pod, prefix):
        return None
    try:
        scrape = pod_scrape(pod, prefix)
        require_declared(pod, scrape.ports)
    except Rejected:
        return None
    address = dialable_spelling(scrape.address, allow_loopback=allow_loopback)
    path = _asked_path(scrape)
    if not address or len(path) > LONGEST_PATH:
        return None
    peer = POD_TLS if scrape.scheme == "https" else POD
    routes = tuple(Route(Endpoint(address, port, address, pod.uid, peer), path) for port in scrape.ports)
    return ProxiedPod(routes, pod.host_network)


def _asked_path(scrape: ScrapeConfig) -> str:
    """Return path and query as Prometheus would write them; a parameter without a value says nothing."""
    path = quote(scrape.path, safe=_UNESCAPED, errors="replace")
    query = urlencode(
        sorted((name, value) for name, value in scrape.params.items() if value), errors="replace"
    )
    return f"{path}?{query}" if query else path


class Pods:
    """The Pods of this moment, replaced one at a time; nothing of all of them is ever copied.

    `on_gone` hears of each endpoint that may no longer be asked, so that connections to it are closed;
    `on_put` of every Pod that is put.
    """

    def __init__(self) -> None:
        self._pods: dict[tuple[str, str], ProxiedPod] = {}
        self._endpoints: set[Endpoint] = set()
        self.known = False
        self.on_gone: Callable[[Endpoint], None] = lambda _: None
        self.on_put: Callable[[str, str, ProxiedPod | None], None] = lambda *_: None

    def __len__(self) -> int:
        return len(self._pods)

    def put(self, namespace: str, name: str, pod: ProxiedPod | None) -> None:
        """Take in a Pod as it is now, None where it may not be scraped or is gone."""
        key = (namespace, name)
        before = self._pods.pop(key, None)
        if pod is not None:
            self._pods[key] = pod
        old = {route.endpoint for route in before.routes} if before else set()
        new = {route.endpoint for route in pod.routes} if pod else set()
        self._endpoints |= new
        for endpoint in old - new:
            self._endpoints.discard(endpoint)
            self.on_gone(endpoint)
        self.on_put(namespace, name, pod)

    def items(self) -> Iterator[tuple[tuple[str, str], ProxiedPod]]:
        """Yield each with its namespace and name."""
        return iter(self._pods.items())

    def is_current(self, endpoint: Endpoint) -> bool:
        """Say whether an endpoint may still be asked: its Pod may have gone while a scrape of it waited."""
        return self.known and endpoint in self._endpoints

    def get(self, namespace: str, name: str) -> ProxiedPod | None:
        """Return a Pod."""
        return self._pods.get((namespace, name))

    def forget(self) -> None:
        """Serve none until `known` is set again: what was known is too old to be trusted."""
        self.known = False
        for endpoint in self._endpoints:
            self.on_gone(endpoint)

    def names(self) -> Iterator[tuple[str, str]]:
        """Yield the UID and `namespace/name` of each."""
        for (namespace, name), pod in self._pods.items():
            yield pod.routes[0].endpoint.uid, f"{namespace}/{name}"


def find_pod(target: bytes, pods: Pods, nodes: NodeTable) -> Route | Refusal:
    """Return where a request target about a Pod leads, or why it leads nowhere.

    The whole target must match one shape byte for byte, without any escape; a query is dropped, the Pod's
    annotations say what is asked. Without a port the first one counts.
    """
    match = _TARGET.fullmatch(target)
    if match is None:
        return UNKNOWN_PATH
    if not pods.known:
        return PODS_UNKNOWN
    pod = pods.get(match["namespace"].decode(), match["name"].decode())
    if pod is None:
        return UNKNOWN_POD
    port = int(match["port"]) if match["port"] else pod.routes[0].endpoint.port
    for route in pod.routes:
        if route.endpoint.port == port:
            return UNKNOWN_POD if _is_forbidden(route.endpoint, pod, nodes) else route
    return UNKNOWN_POD


def _is_forbidden(endpoint: Endpoint, pod: ProxiedPod, nodes: NodeTable) -> bool:
    """Return True if a Pod claims what is not its own: the API server, a kubelet, or its node without hostNetwork."""
    where = (endpoint.address, endpoint.port)
    if where in nodes.api_server or where in nodes.by_address:
        return True
    return endpoint.address in nodes.addresses and not pod.has_host_network
