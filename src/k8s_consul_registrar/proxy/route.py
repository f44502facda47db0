"""Decides, on the raw request target, which kubelet is asked for and whether it may be: the allow-list."""

import re
from typing import NamedTuple

from k8s_consul_registrar.proxy.nodes import Endpoint, NodeTable
from k8s_consul_registrar.proxy.outcomes import Outcome, Refusal
from k8s_consul_registrar.targets.scrape_config import parse_ip

DEFAULT_PATHS = ("/metrics/cadvisor",)
# What a kubelet's `nodes/metrics` permission covers (pkg/kubelet/server/auth.go): nothing else is ever relayed.
PERMITTED_PATHS = ("/metrics/cadvisor", "/metrics", "/metrics/resource", "/metrics/probes")

# Our own form names a Node by address and port, the API server's form by name: a Node may be named like
# another's address, so neither is looked up as the other.
_TARGET = re.compile(
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

NOT_A_PATH = Refusal(400, Outcome.BAD_REQUEST, "the request target must be an absolute path")
UNKNOWN_PATH = Refusal(
    404,
    Outcome.UNKNOWN_PATH,
    "no such path; ask for /api/v1/nodes/<node ip>:<kubelet port>/metrics/cadvisor "
    "or /api/v1/nodes/<node name>/proxy/metrics/cadvisor",
)
UNKNOWN_NODE = Refusal(
    404, Outcome.UNKNOWN_NODE, "no current Node of the cluster has this name, or this address and port"
)
NODES_UNKNOWN = Refusal(503, Outcome.NODES_UNKNOWN, "the Nodes of the cluster are not known yet")


class Route(NamedTuple):
    """A scrape that is allowed: one path of one kubelet."""

    endpoint: Endpoint
    path: str


def find_route(
    target: bytes, table: NodeTable, paths: frozenset[str], *, known: bool = True
) -> Route | Refusal:
    """Return where a request target leads, or why it leads nowhere.

    The whole target must match one of two shapes byte for byte; brackets round an IPv6 literal may be
    escaped, as Prometheus does, and nothing else. A query is dropped. `known` is False while no table is.
    """
    if not target.startswith(b"/"):
        return NOT_A_PATH
    match = _TARGET.fullmatch(target)
    if match is None or (path := match["path"].decode()) not in paths:
        return UNKNOWN_PATH
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


def allowed_paths(wanted: tuple[str, ...]) -> frozenset[str]:
    """Return the paths to relay: the default and what the operator adds.

    Raises ValueError naming what a kubelet's `nodes/metrics` permission does not cover.
    """
    beyond = sorted(set(wanted) - set(PERMITTED_PATHS))
    if beyond:
        raise ValueError(
            f"not covered by nodes/metrics: {', '.join(beyond)}; choose from {', '.join(PERMITTED_PATHS)}"
        )
    return frozenset((*DEFAULT_PATHS, *wanted))
