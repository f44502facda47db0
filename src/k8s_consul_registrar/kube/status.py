"""What an API server's refusal means: `kind: Status` bodies and HTTP statuses to our errors.

Pure, and shared by requests (an HTTP status) and watches (an ERROR event under a 200).
"""

from dataclasses import dataclass

import msgspec

from k8s_consul_registrar.errors import (
    ClusterAhead,
    ClusterBusy,
    ClusterError,
    ClusterExpired,
    ClusterForbidden,
    ClusterRefused,
    ClusterUnauthorized,
)

MESSAGE_LENGTH = 300
RETRY_AFTER_CAP = 3600.0


@dataclass(frozen=True, slots=True)
class Action:
    """What is asked of the API server, in RBAC's words; an empty `namespace` is the cluster scope."""

    verb: str
    resource: str
    namespace: str = ""

    def __str__(self) -> str:
        where = f"in namespace {self.namespace}" if self.namespace else "at the cluster scope"
        return f"{self.verb} {self.resource} {where}"


class _Cause(msgspec.Struct, frozen=True, gc=False):
    reason: str = ""


class _Details(msgspec.Struct, frozen=True, rename="camel"):
    causes: list[_Cause] | None = None
    retry_after_seconds: int = 0


class Status(msgspec.Struct, frozen=True):
    """The `Status` object an API server refuses with."""

    kind: str
    message: str = ""
    reason: str = ""
    code: int = 0
    details: _Details | None = None

    @property
    def is_ahead(self) -> bool:
        """Whether the version asked for lies in the server's future."""
        causes = (self.details.causes if self.details else None) or ()
        return any(cause.reason == "ResourceVersionTooLarge" for cause in causes)


_STATUS = msgspec.json.Decoder(Status)


def decode_status(body: bytes | msgspec.Raw) -> Status:
    """Decode a refusal's body; one that is no `Status` gives an empty one, so that its text goes nowhere."""
    try:
        status = _STATUS.decode(body)
    except (ValueError, RecursionError):
        return Status(kind="")
    return status if status.kind == "Status" else Status(kind="")


def cluster_error(
    action: Action, code: int, status: Status, *, retry_after: str = "", origin: str = ""
) -> ClusterError:
    """Return the error for a refused action.

    `retry_after` is the header's text, `origin` where our credentials come from.

    Codes and reasons: Kubernetes API conventions, "Response Status Kind"; 410 and "Too large resource
    version": Kubernetes API concepts, "Resource versions".
    """
    said = f"; the server said: {clipped(status.message)}" if status.message else ""
    if code == 401:
        ours = f" ({origin})" if origin else ""
        return ClusterUnauthorized(f"cannot {action}: our credentials are not accepted{ours}{said}")
    if code == 403:
        return ClusterForbidden(f"cannot {action}: grant {action.verb} on {action.resource}{said}")
    if code == 410:
        return ClusterExpired(f"cannot {action}: the version or continue token asked for is gone{said}")
    if status.is_ahead:
        return ClusterAhead(f"cannot {action}: our version lies in the server's future{said}")
    if code == 429 or 500 <= code <= 599:
        return ClusterBusy(
            f"cannot {action}: the API server answered {code}{said}", _wait(status, retry_after)
        )
    return ClusterRefused(f"cannot {action}: the API server answered {code}{said}", code)


def clipped(text: str) -> str:
    """Return a server's text on one line, without control characters, short enough for a log line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 2 * MESSAGE_LENGTH]).split())
    return line if len(line) <= MESSAGE_LENGTH else line[: MESSAGE_LENGTH - 1] + "…"


def _wait(status: Status, header: str) -> float | None:
    """Return the seconds to wait; an API server sends whole seconds, in the header or in the details."""
    if header.isascii() and header.isdigit():
        return min(float(header[:9]), RETRY_AFTER_CAP)
    named = status.details.retry_after_seconds if status.details else 0
    return min(float(named), RETRY_AFTER_CAP) if named > 0 else None
