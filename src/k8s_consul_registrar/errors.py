"""The errors raised on purpose, named by culprit and remedy.

OperationalError
├── SettingsError             the operator's settings: all problems at once; exit 2
├── AccessError               kubeconfig or credentials cannot be read or used
├── ClusterError              the API server
│   ├── ClusterUnreachable    no connection, or it broke, or time ran out: retry
│   ├── ClusterUnauthorized   401: the credentials are not accepted
│   ├── ClusterForbidden      403: a permission is missing
│   ├── ClusterExpired        410: the version asked for is gone; list again
│   ├── ClusterAhead          504 with ResourceVersionTooLarge: our version is from another history
│   ├── ClusterSilent         a watch brought neither event nor bookmark for too long: resume
│   ├── ClusterBusy           429 or 5xx: retry, not before `retry_after`
│   ├── ClusterConflict       409: somebody else wrote the object first; read it again
│   └── ClusterRefused        any other answer we cannot use
└── ConsulError               Consul
    ├── ConsulUnreachable     no connection, or it broke, or time ran out: retry
    ├── ConsulForbidden       403: the token lacks a right
    │   └── ConsulTokenUnknown  403: Consul does not know the token ("ACL not found")
    ├── ConsulBusy            429 or 5xx, no leader among them: retry
    ├── ConsulFenced          we may not write, or no longer: another replica leads
    ├── ConsulFiltered        a read came back with what the token may not see left out
    └── ConsulRefused         a 4xx for this one request: the request is at fault
"""


class OperationalError(Exception):
    """Everything the program raises on purpose; its text is fit for a log line and holds no secret."""


class SettingsError(OperationalError):
    """The settings cannot be used; `problems` lists every one of them."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class AccessError(OperationalError):
    """The kubeconfig or the credentials it names cannot be read or used."""


class ClusterError(OperationalError):
    """The API server did not give what was asked for; `cause` is a bounded word for metrics."""

    cause = "error"


class ClusterUnreachable(ClusterError):
    """No connection to the API server, or it broke, or time ran out."""

    cause = "unreachable"


class ClusterUnauthorized(ClusterError):
    """The API server does not accept our credentials."""

    cause = "unauthorized"


class ClusterForbidden(ClusterError):
    """A permission is missing; the text names it."""

    cause = "forbidden"


class ClusterExpired(ClusterError):
    """The version or the continue token asked for is gone."""

    cause = "expired"


class ClusterAhead(ClusterError):
    """The version asked for lies in the server's future, so it is from another history."""

    cause = "ahead"


class ClusterSilent(ClusterError):
    """A watch brought neither event nor bookmark for too long; it may be dead, or asked of the future."""

    cause = "silent"


class ClusterBusy(ClusterError):
    """The API server asks for patience; `retry_after` is in seconds, None where it named none."""

    cause = "busy"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClusterConflict(ClusterError):
    """Somebody else wrote the object first: it is there already, or no longer the version we mean."""

    cause = "conflict"


class ClusterRefused(ClusterError):
    """An answer that cannot be used; `status` is the HTTP status."""

    cause = "refused"

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ConsulError(OperationalError):
    """Consul did not do what was asked for; `cause` is a bounded word for metrics."""

    cause = "error"


class ConsulUnreachable(ConsulError):
    """No connection to Consul, or it broke, or time ran out."""

    cause = "unreachable"


class ConsulForbidden(ConsulError):
    """The token lacks a right, or is not known."""

    cause = "forbidden"


class ConsulTokenUnknown(ConsulForbidden):
    """The token is of no use for any request: Consul does not know it, or its file cannot be read."""


class ConsulBusy(ConsulError):
    """Consul cannot answer now: no leader, too many requests, or a fault of its own.

    `status` is the HTTP status, 429 or a 5xx.
    """

    cause = "busy"

    def __init__(self, message: str, retry_after: float | None = None, status: int = 503) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.status = status


class ConsulFenced(ConsulError):
    """A write that was not sent, or was broken off, because this replica does not lead."""

    cause = "fenced"


class ConsulFiltered(ConsulError):
    """A read left out what the token may not see, so absence in it proves nothing."""

    cause = "filtered"


class ConsulRefused(ConsulError):
    """Consul refuses this one request; others may still be right. `status` is the HTTP status."""

    cause = "refused"

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
