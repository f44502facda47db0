"""The errors raised on purpose, named by culprit, and the reasons for which objects are rejected."""

import re
from enum import StrEnum

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
    """Causes of rejections: a fixed set, so that they can be label values of a metric."""

    NO_IP = "no_ip"
    INVALID_IP = "invalid_ip"
    NO_PORT = "no_port"
    AMBIGUOUS_PORT = "ambiguous_port"
    INVALID_PORT = "invalid_port"
    UNKNOWN_PORT_NAME = "unknown_port_name"
    TOO_MANY_PORTS = "too_many_ports"
    UNDECLARED_PORT = "undeclared_port"
    NO_HOST_IP = "no_host_ip"
    NOT_PROXIED = "not_proxied"
    INVALID_PATH = "invalid_path"
    INVALID_SCHEME = "invalid_scheme"
    INVALID_PARAM = "invalid_param"
    INVALID_INTERVAL = "invalid_interval"
    META_TOO_LONG = "meta_too_long"
    META_TOO_MANY = "meta_too_many"
    INVALID_META = "invalid_meta"
    EMPTY_NAME = "empty_name"
    INVALID_NAME = "invalid_name"
    NAME_TOO_LONG = "name_too_long"
    NAME_TAKEN = "name_taken"
    INVALID_TAG = "invalid_tag"
    NO_ADDRESS = "no_address"
    ADDRESS_TAKEN = "address_taken"
    ID_TAKEN = "id_taken"
    UNDECODABLE = "undecodable"


class Note(StrEnum):
    """Ways in which a target differs from what its object asks for: label values of a metric."""

    INTERVAL_RAISED = "interval_raised"


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
