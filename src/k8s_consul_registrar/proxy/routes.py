"""Routes of requests: the kubelet or Pod that a raw request target names, and whether it may be scraped."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import quote, urlencode, urljoin, urlsplit

from k8s_consul_registrar.errors import Rejected
from k8s_consul_registrar.model import Pod
from k8s_consul_registrar.proxy.nodes import KUBELET, POD, POD_TLS, Endpoint, NodeTable, dialable_spelling
from k8s_consul_registrar.proxy.refusals import Outcome, Refusal
from k8s_consul_registrar.targets.annotations import ScrapeSet
from k8s_consul_registrar.targets.scrape_config import (
    PRIMARY,
    is_scraped,
    parse_ip,
    pod_scrape,
    require_declared,
)
from k8s_consul_registrar.targets.service_names import KUBELET_PATHS

# No other path of a kubelet is ever relayed.
PERMITTED_PATHS = KUBELET_PATHS

# Our own form names a Node by address and port, the API server's form by name: a Node may be named like
# another's address, so neither is looked up as the other.
_NODE_TARGET = re.compile(
    rb"/api/v1/nodes/"
    rb"(?:"
    rb"(?:(?P<v4>[0-9]{1,3}(?:\.[0-9]{1,3}){3})"
    rb"|\[(?P<v6>[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]{1,40})\]"
    rb"|%5[Bb](?P<escaped>[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]{1,40})%5[Dd])"
    rb":(?P<port>[1-9][0-9]{0,4})"
    rb"|(?P<name>[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)/proxy"
    rb")"
    rb"(?P<path>(?:/[a-z]+){1,2})"
    rb"(?:\?[\x21\x22\x24-\x7e]*)?"
)

# Visible ASCII (RFC 3986): no byte of it ends a line or means something else to another reader.
_LOCATION = re.compile(rb"[\x21-\x7e]{1,4096}")
POD_PREFIX = b"/api/v1/namespaces/"

NOT_A_PATH = Refusal(400, Outcome.BAD_REQUEST, "the request target must be an absolute path")
UNKNOWN_PATH = Refusal(
    404,
    Outcome.UNKNOWN_PATH,
    "no such path; ask for /api/v1/nodes/<node ip>:<kubelet port>/metrics/cadvisor "
    "or /api/v1/nodes/<node name>/proxy/metrics/cadvisor",
)
CLOSED_PATH = Refusal(
    404,
    Outcome.UNKNOWN_PATH,
    "PROXY_PATHS does not allow this path; it can name /metrics, /metrics/resource and /metrics/probes",
)
NO_PODS = Refusal(
    404, Outcome.UNKNOWN_PATH, "this proxy relays no Pods; PROXY_PODS=true lets it (and needs authentication)"
)
UNKNOWN_NODE = Refusal(
    404, Outcome.UNKNOWN_NODE, "no current Node of the cluster has this name, or this address and port"
)
NODES_UNKNOWN = Refusal(503, Outcome.NODES_UNKNOWN, "the Nodes of the cluster are not known yet")


class Route(NamedTuple):
    """An allowed scrape: one path of one kubelet or Pod."""

    endpoint: Endpoint
    path: str


def find_route(
    target: bytes, table: NodeTable, paths: frozenset[str], *, known: bool = True
) -> Route | Refusal:
    """Return the kubelet that a request target names, or why there is none.

    The whole target must match one of two shapes byte for byte; only the brackets of an IPv6 literal may be
    escaped, as Prometheus does. A query is dropped. `known` is False until there is a table.
    """
    if not target.startswith(b"/"):
        return NOT_A_PATH
    match = _NODE_TARGET.fullmatch(target)
    if match is None:
        return NO_PODS if target.startswith(POD_PREFIX) else UNKNOWN_PATH
    path = match["path"].decode()
    if path not in paths:
        return CLOSED_PATH if path in PERMITTED_PATHS else UNKNOWN_PATH
    if not known:
        return NODES_UNKNOWN
    endpoint: Endpoint | None
    if match["name"] is not None:
        endpoint = table.by_name.get(match["name"].decode())
    else:
        endpoint = _by_address(match["v4"] or match["v6"] or match["escaped"], int(match["port"]), table)
    return Route(endpoint, path) if endpoint is not None else UNKNOWN_NODE


def _by_address(literal: bytes, port: int, table: NodeTable) -> Endpoint | None:
    address = parse_ip(literal.decode())
    return None if address is None else table.by_address.get((str(address), port))


# Characters that Go's net/url leaves unescaped in a path: a Pod is asked the same as by Prometheus itself.
_UNESCAPED = "$&+,/:;=@"
# A Pod's author writes the path; a longer one is not relayed.
LONGEST_PATH = 2048

# Names as the API server takes them (Kubernetes, "Object Names and IDs"). They are looked up and never become
# part of a request, so one that looks like an address or holds two dots leads to the Pod of that name or nowhere.
_POD_TARGET = re.compile(
    rb"/api/v1/namespaces/(?P<namespace>[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)"
    rb"/pods/(?P<name>[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)"
    rb"(?::(?P<port>[1-9][0-9]{0,4}))?"
    rb"/metrics(?:/(?P<ordinal>[2-9]|1[0-6]))?"
    rb"(?:\?[\x21\x22\x24-\x7e]*)?"
)

UNKNOWN_POD = Refusal(
    404,
    Outcome.UNKNOWN_POD,
    "no Pod of this name is annotated to be scraped at this port, or NAMESPACES or POD_LABEL_SELECTOR leaves it out",
)
PODS_UNKNOWN = Refusal(503, Outcome.PODS_UNKNOWN, "the Pods of the cluster are not known yet")


def redirected(route: Route, location: bytes) -> Route | None:
    """Return the route that a Pod redirects to, None unless it is at the same scheme, address and port.

    The rules for a path of the Pod's annotations hold for it too. A kubelet redirects nowhere.
    """
    endpoint = route.endpoint
    if endpoint.peer == KUBELET or _LOCATION.fullmatch(location) is None:
        return None
    scheme = "https" if endpoint.peer == POD_TLS else "http"
    try:
        url = urlsplit(urljoin(f"{scheme}://{endpoint}{route.path}", location.decode()))
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError:
        return None
    address = parse_ip(url.hostname or "")
    is_same = (url.scheme, str(address), port) == (scheme, endpoint.address, endpoint.port)
    path = f"{url.path}?{url.query}" if url.query else url.path
    if not is_same or "@" in url.netloc or not path.startswith("/") or len(path) > LONGEST_PATH:
        return None
    return Route(endpoint, path)


class ProxiedPod(NamedTuple):
    """A Pod that may be scraped, with a route for each port in the order of its annotation."""

    routes: tuple[Route, ...]
    has_host_network: bool


def proxied_pod(
    pod: Pod, prefix: str, *, allow_loopback: bool = False, family: str = PRIMARY
) -> ProxiedPod | None:
    """Return the routes of a Pod, None if it does not ask to be scraped or may not be.

    `prefix` begins its annotations. The rules for a Node's addresses hold for a Pod's too: a kubelet
    writes both.
    """
    if not is_scraped(pod, prefix):
        return None
    try:
        config = pod_scrape(pod, prefix, family=family)
        require_declared(pod, config.ports)
    except Rejected:
        return None
    address = dialable_spelling(config.address, allow_loopback=allow_loopback)
    routes = tuple(
        Route(
            Endpoint(
                address,
                port.number,
                address,
                pod.uid,
                POD_TLS if port.scrape.scheme == "https" else POD,
                pod.namespace,
            ),
            _asked_path(port.scrape),
        )
        for port in config.ports
    )
    if not address or any(len(route.path) > LONGEST_PATH for route in routes):
        return None
    return ProxiedPod(routes, pod.host_network)


def _asked_path(scrape: ScrapeSet) -> str:
    """Return path and query as Prometheus would write them; a parameter without a value is left out."""
    path = quote(scrape.path, safe=_UNESCAPED, errors="replace")
    query = urlencode(
        sorted((name, value) for name, value in scrape.params.items() if value), errors="replace"
    )
    return f"{path}?{query}" if query else path


class Pods:
    """The current Pods, replaced one at a time and never copied.

    `on_gone` is called with each endpoint that may no longer be asked, so that connections to it are closed;
    `on_put` with every Pod that is put.
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
        """Replace a Pod, None if it may not be scraped or is gone."""
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
        """Yield each Pod with its namespace and name."""
        return iter(self._pods.items())

    def is_current(self, endpoint: Endpoint) -> bool:
        """Return True if an endpoint may still be asked: its Pod may have gone while a scrape waited."""
        return self.known and endpoint in self._endpoints

    def get(self, namespace: str, name: str) -> ProxiedPod | None:
        """Return a Pod."""
        return self._pods.get((namespace, name))

    def forget(self) -> None:
        """Serve no Pod until `known` is set again: what was known is too old."""
        self.known = False
        for endpoint in self._endpoints:
            self.on_gone(endpoint)

    def names(self) -> Iterator[tuple[str, str]]:
        """Yield the UID and `namespace/name` of each Pod."""
        for (namespace, name), pod in self._pods.items():
            yield pod.routes[0].endpoint.uid, f"{namespace}/{name}"


def find_pod(target: bytes, pods: Pods, nodes: NodeTable) -> Route | Refusal:
    """Return the route to the Pod that a request target names, or why there is none.

    The whole target must match one shape byte for byte, without any escape. A query is dropped: the Pod's
    annotations say what is asked. Without a port the first one counts, without an ordinal the first scrape of
    that port.
    """
    match = _POD_TARGET.fullmatch(target)
    if match is None:
        return UNKNOWN_PATH
    if not pods.known:
        return PODS_UNKNOWN
    pod = pods.get(match["namespace"].decode(), match["name"].decode())
    if pod is None:
        return UNKNOWN_POD
    port = int(match["port"]) if match["port"] else pod.routes[0].endpoint.port
    routes = [route for route in pod.routes if route.endpoint.port == port]
    ordinal = int(match["ordinal"] or 1)
    if ordinal > len(routes):
        return UNKNOWN_POD
    route = routes[ordinal - 1]
    return UNKNOWN_POD if _is_forbidden(route.endpoint, pod, nodes) else route


def _is_forbidden(endpoint: Endpoint, pod: ProxiedPod, nodes: NodeTable) -> bool:
    """Return True if a Pod claims what is not its own: the API server, a kubelet, or its node without hostNetwork."""
    where = (endpoint.address, endpoint.port)
    if where in nodes.api_server or where in nodes.by_address:
        return True
    return endpoint.address in nodes.addresses and not pod.has_host_network
