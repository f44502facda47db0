"""The errors raised on purpose, named by culprit, and the reasons for which objects are rejected."""

import re
from enum import StrEnum
from typing import Self

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class OperationalError(Exception):
    """Everything the program raises on purpose; its text is fit for a log line and holds no secret."""


class SettingsError(OperationalError):
    """Settings that cannot be used, with all problems at once; exit 2."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class AccessError(OperationalError):
    """A kubeconfig, credential or file that cannot be read or used."""


class ClusterError(OperationalError):
    """The API server did not give what was asked for; `cause` is a bounded word for metrics."""

    cause = "error"

    def __init_subclass__(cls, *, cause: str) -> None:
        cls.cause = cause


class ClusterUnreachable(ClusterError, cause="unreachable"):
    """No connection to the API server, or it broke, or time ran out: retry."""


class ClusterUnauthorized(ClusterError, cause="unauthorized"):
    """401: the API server does not accept our credentials."""


class ClusterForbidden(ClusterError, cause="forbidden"):
    """403: a permission is missing; the text names it."""


class ClusterExpired(ClusterError, cause="expired"):
    """410: the version or the continue token asked for is gone; list again."""


class ClusterAhead(ClusterError, cause="ahead"):
    """504 with ResourceVersionTooLarge: the version asked for is from another history of the server."""


class ClusterSilent(ClusterError, cause="silent"):
    """A watch brought neither event nor bookmark for too long; it may be dead: resume."""


class ClusterBusy(ClusterError, cause="busy"):
    """429 or 5xx: retry after `retry_after` seconds, None where the API server named none."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClusterConflict(ClusterError, cause="conflict"):
    """409: another client wrote the object first; read it again."""


class ClusterRefused(ClusterError, cause="refused"):
    """Any other answer that cannot be used; `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ConsulError(OperationalError):
    """Consul did not do what was asked for."""


class ConsulUnreachable(ConsulError):
    """No connection to Consul, or it broke, or time ran out: retry."""


class ConsulForbidden(ConsulError):
    """403: the token lacks a right, or is not known."""


class ConsulTokenUnknown(ConsulForbidden):
    """The token is of no use for any request: Consul does not know it, or its file cannot be read."""


class ConsulBusy(ConsulError):
    """Consul cannot answer now: no leader, too many requests, or a fault; `status` is 429 or a 5xx."""

    def __init__(self, message: str, retry_after: float | None = None, status: int = 503) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.status = status


class ConsulFenced(ConsulError):
    """A write that was not sent, or was broken off, because this replica does not lead."""


class ConsulFiltered(ConsulError):
    """A read left out what the token may not see, so absence in it proves nothing."""


class ConsulRefused(ConsulError):
    """Consul refuses this one request; others may still be right. `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class NotConsul(ConsulRefused):
    """An answer that no Consul gives: something else is at its address."""


class Reason(StrEnum):
    """Causes of rejections: a fixed set, so that they can be label values of a metric; `meaning` is for the docs."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> Self:
        """Make a text with a meaning."""
        made = str.__new__(cls, value)
        made._value_ = value
        made.meaning = meaning
        return made

    NO_IP = "no_ip", "the Pod has no IP yet"
    INVALID_IP = "invalid_ip", "the IP of the Pod, or of an endpoint, is no address that can be scraped"
    INVALID_IP_FAMILY = "invalid_ip_family", "the annotated `ip-family` is none of `primary`, `ipv4`, `ipv6`"
    NO_IP_FAMILY = (
        "no_ip_family",
        "the Pod has an IP, and none of the family that is asked for, or the Service has no endpoints of the annotated family",
    )
    NO_PORT = (
        "no_port",
        "no port is annotated, and the containers of the Pod, or the EndpointSlice, have no TCP port",
    )
    AMBIGUOUS_PORT = (
        "ambiguous_port",
        "no port is annotated and several TCP ports could be meant, or the name (annotated, or `metrics` and the like) has different numbers in different containers",
    )
    INVALID_PORT = "invalid_port", "the annotated number is not between 1 and 65535"
    UNKNOWN_PORT_NAME = (
        "unknown_port_name",
        "no container, or no EndpointSlice of the Service, has a TCP port of the annotated name",
    )
    TOO_MANY_PORTS = "too_many_ports", "more than 16 ports are annotated"
    UNDECLARED_PORT = (
        "undeclared_port",
        "through the proxy: the Pod has its Node's network and no container declares that TCP port",
    )
    NO_HOST_IP = (
        "no_host_ip",
        "through the proxy or with `POD_ADDRESS=host`: the Pod's status names no address of its Node, or none of `NODE_IP_FAMILY`",
    )
    NO_HOST_PORT = "no_host_port", "with `POD_ADDRESS=host`: no container has a `hostPort` for that TCP port"
    NOT_PROXIED = (
        "not_proxied",
        "through the proxy or with `POD_ADDRESS=host`: the endpoint of a [Service](services.md) is a Pod that is not annotated itself",
    )
    INVALID_PATH = (
        "invalid_path",
        "a URL in place of the path, control characters in it, or a query that is too long or not UTF-8",
    )
    INVALID_SCHEME = "invalid_scheme", "neither `http` nor `https`"
    INVALID_PARAM = (
        "invalid_param",
        "a parameter's name that Prometheus cannot take, one given twice, or control characters in a value",
    )
    INVALID_INTERVAL = (
        "invalid_interval",
        "an interval or timeout that is no duration of Prometheus or zero, a timeout over its interval, or a timeout without an interval while `SCRAPE_INTERVAL_DEFAULT` is unset",
    )
    META_TOO_LONG = "meta_too_long", "a meta value over Consul's 512 bytes"
    META_TOO_MANY = "meta_too_many", "more meta than Consul takes (56 pairs of an object's own)"
    INVALID_META = "invalid_meta", "control characters in a meta value"
    EMPTY_NAME = (
        "empty_name",
        "a field of the name's template is empty for this object, such as a label it does not have",
    )
    INVALID_NAME = (
        "invalid_name",
        "the name would be `consul`, or has characters that discovery does not escape",
    )
    NAME_TOO_LONG = "name_too_long", "the name would be over 512 bytes"
    NAME_TAKEN = (
        "name_taken",
        "a service that no registrar wrote has this name, anywhere in the catalog; a service of the registrar that already has it keeps it",
    )
    INVALID_TAG = "invalid_tag", "a tag over 512 bytes or with control characters"
    NO_ADDRESS = (
        "no_address",
        "the Node has no IP of the types of `NODE_ADDRESS_TYPES`, or none at all; a Service of type ExternalName has no endpoints",
    )
    ADDRESS_TAKEN = "address_taken", "another Node has this address"
    NAMESPACE_FULL = (
        "namespace_full",
        "the namespace has as many targets as `MAX_TARGETS_PER_NAMESPACE` allows",
    )
    ID_TAKEN = (
        "id_taken",
        "another object has this service ID: Pods `a` with `b--c` and `a--b` with `c` share one; its holder keeps it, else the older object. Or two endpoints of one Service lead to one ID",
    )
    UNDECODABLE = "undecodable", "the API server's object cannot be read"


class Note(StrEnum):
    """Ways in which a target differs from what its object asks for: label values of a metric."""

    INTERVAL_RAISED = "interval_raised"
    META_DROPPED = "meta_dropped"  # of what EXTRA_META and POD_ANNOTATIONS_AS_META name, Consul takes no more
    LABELS_DROPPED = "labels_dropped"  # likewise of the labels of Namespaces and Nodes


class Rejected(Exception):
    """An object asks for a target that cannot be made; `targets` turns it into a `Rejection`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def has_control(text: str) -> bool:
    """Return whether a text has control characters, line separators or lone surrogates."""
    return _CONTROL.search(text) is not None


def quoted(text: str, most: int = 60) -> str:
    """Return untrusted text in quotes: one line, ASCII, at most `most` characters of it."""
    shown = ascii(text[:most])
    return f"{shown}…" if len(text) > most else shown
