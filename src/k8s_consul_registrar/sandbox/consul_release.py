"""Releases of Consul, and the options of a sandbox Consul; values only.

Only 1.8 is compared with a real server (1.8.7) by the tests. The later releases are simulated from Consul's
sources and change log: each field names the change it stands for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from types import MappingProxyType

Scope = tuple[
    str, str
]  # the subject of a read: ("node", name), ("checks", node), ("service", name) or a table
NODES: Scope = ("nodes", "")
SERVICES: Scope = ("services", "")
CHECKS: Scope = ("checks", "")

_BODY_LIMIT = 512 * 1024  # bytes


class FilteredMark(Enum):
    """The tokens whose reads carry `X-Consul-Results-Filtered-By-ACLs` when ACLs left something out."""

    NONE = "none"
    ANY_TOKEN = "any token"  # since 1.11; a request without a token still has no mark
    NAMED_TOKEN = "named token"  # since 1.21.5 not for the anonymous token either


class DeregisterToken(Enum):
    """The token by which an agent removes a deregistered service from the catalog."""

    SERVICE = "the token that the service was registered with"
    AGENT = "the agent's own"  # since 1.15 (#16097)


class TooManyConnections(Enum):
    """The answer to a connection beyond `limits.http_max_conns_per_client`."""

    CLOSE = "close"
    STATUS_429 = "429"  # since 1.9 (#8221)


@dataclass(frozen=True, slots=True)
class ConsulRelease:
    """The ways in which a release of Consul answers differently from another."""

    version: str
    # Reads whose index is the index of whole tables, by the first part of their scope; since 1.13 (#12399) it
    # is their own. Such a read wakes for its own changes only, in either case.
    table_indexes: Mapping[str, tuple[Scope, ...]] = field(default_factory=lambda: MappingProxyType({}))
    most_operations: int = 128  # of a transaction, since 1.14 (#14599)
    has_version_endpoint: bool = True  # /v1/agent/version, since 1.14
    filtered_mark: FilteredMark = FilteredMark.ANY_TOKEN
    deregister_token: DeregisterToken = DeregisterToken.AGENT
    knows_deregistered: bool = True  # 404 for an agent's unknown service, since 1.12
    explains_denials: bool = True  # "Permission denied: token with AccessorID … lacks …", since 1.12
    bad_request: str = ""  # the beginning of the text of some 400s
    too_many_connections: TooManyConnections = TooManyConnections.STATUS_429
    has_request_limits: bool = True  # limits.request_limits, since 1.15
    longest_answer: float = 0.0  # seconds until the server drops an answer, 0: never; 1.22 (#22739)
    has_ports: bool = False  # services with several ports, since 1.22
    may_rename: bool = True  # False: a transaction never changes a service's name, since 2.0.x (#23560)
    largest_body: int = 0  # bytes of any request, 0: no limit but the transactions'; since 2.0


CONSUL_1_8 = ConsulRelease(
    "1.8.7",
    table_indexes=MappingProxyType({"node": (NODES, SERVICES), "checks": (CHECKS,)}),
    most_operations=64,
    has_version_endpoint=False,
    filtered_mark=FilteredMark.NONE,
    deregister_token=DeregisterToken.SERVICE,
    knows_deregistered=False,
    explains_denials=False,
    bad_request="Bad request: ",
    too_many_connections=TooManyConnections.CLOSE,
    has_request_limits=False,
)
CONSUL_1_15 = ConsulRelease("1.15.10")
CONSUL_1_22 = replace(
    CONSUL_1_15,
    version="1.22.2",
    filtered_mark=FilteredMark.NAMED_TOKEN,
    longest_answer=30.0,
    has_ports=True,
)
CONSUL_2_1 = replace(
    CONSUL_1_22, version="2.1.0", longest_answer=15 * 60, may_rename=False, largest_body=_BODY_LIMIT
)

RELEASES: Mapping[str, ConsulRelease] = MappingProxyType(
    {"1.8": CONSUL_1_8, "1.15": CONSUL_1_15, "1.22": CONSUL_1_22, "2.1": CONSUL_2_1}
)
NEWEST_RELEASE = "2.1"
NEWEST = RELEASES[NEWEST_RELEASE]


class Bearer(StrEnum):
    """The outcome of showing a bearer token to an auth method."""

    BOUND = "bound"  # a binding rule matches it: the login gives all rights
    UNBOUND = "unbound"  # valid, and no binding rule matches it
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class AuthMethod:
    """An auth method of the type `jwt`: the bearer tokens it knows, and the lifetime of what a login gives."""

    bearers: Mapping[str, Bearer]
    name: str = "kubernetes"
    max_token_ttl: float = 0.0  # seconds, 0: the tokens never expire


@dataclass(frozen=True, slots=True)
class ConsulOptions:
    """The set-up of one sandbox Consul.

    `is_enterprise` gives it namespaces, as far as services, checks and questions about rights go. That is
    simulated from Consul's documentation: no Enterprise was at hand to compare it with.

    `token` turns ACLs on, with default deny: it has all rights. Requests without a token and those with one
    of `blind_tokens` see nothing; Consul does not know any other token.

    Limits are off at 0: `most_connections` at once, `read_rate` and `write_rate` in requests a second.
    """

    release: ConsulRelease = CONSUL_1_8
    datacenter: str = "dc1"
    node_name: str = "agent-1"
    node_id: str = "6558b074-796e-2f90-9691-02f0aea2791e"
    is_server: bool = True
    is_enterprise: bool = False
    token: str = ""
    blind_tokens: frozenset[str] = frozenset()
    auth_methods: tuple[AuthMethod, ...] = ()
    most_connections: int = 0
    read_rate: float = 0.0
    write_rate: float = 0.0
