"""The refusals of a Kubernetes API server, as the `Status` objects it sends.

Texts and shapes are those of k8s.io/apimachinery `pkg/api/errors/errors.go`.
"""

from collections.abc import Mapping
from typing import Any

from k8s_consul_registrar.sandbox.resources import Resource


class ApiError(Exception):
    """A refusal: an HTTP status, a reason and a message."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details
        self.metadata = metadata or {}

    @property
    def headers(self) -> dict[str, str]:
        """The response headers of this refusal."""
        seconds = (self.details or {}).get("retryAfterSeconds")
        return {"Retry-After": str(seconds)} if seconds else {}

    def status(self) -> dict[str, Any]:
        """Return the Status object."""
        body: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": dict(self.metadata),
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
        }
        if self.details is not None:
            body["details"] = dict(self.details)
        return {**body, "code": self.code}


def _details(resource: Resource, name: str) -> dict[str, Any]:
    details = {"name": name, "group": resource.group, "kind": resource.plural}
    return {key: value for key, value in details.items() if value}


def unauthorized() -> ApiError:
    """Return the refusal of a request without known credentials."""
    return ApiError(401, "Unauthorized", "Unauthorized")


def forbidden(resource: Resource, subresource: str, name: str, what: str) -> ApiError:
    """Return the refusal for a missing right, which the sentence `what` names."""
    plural = f"{resource.plural}/{subresource}" if subresource else resource.plural
    group = f".{resource.group}" if resource.group else ""
    subject = f'{plural}{group} "{name}"' if name else f"{plural}{group}"
    return ApiError(403, "Forbidden", f"{subject} is forbidden: {what}", details=_details(resource, name))


def not_found(resource: Resource, name: str) -> ApiError:
    """Return the refusal for an object that does not exist."""
    message = f'{resource.qualified} "{name}" not found'
    return ApiError(404, "NotFound", message, details=_details(resource, name))


def already_exists(resource: Resource, name: str) -> ApiError:
    """Return the refusal to create an object that exists."""
    message = f'{resource.qualified} "{name}" already exists'
    return ApiError(409, "AlreadyExists", message, details=_details(resource, name))


def conflict(resource: Resource, name: str, problem: str = "") -> ApiError:
    """Return the refusal if an object is not in the state that the request expects."""
    stale = "the object has been modified; please apply your changes to the latest version and try again"
    message = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {problem or stale}'
    return ApiError(409, "Conflict", message, details=_details(resource, name))


def bad_request(message: str) -> ApiError:
    """Return the refusal of a malformed request."""
    return ApiError(400, "BadRequest", message)


def method_not_allowed() -> ApiError:
    """Return the refusal of a verb that the resource does not have."""
    message = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", message, details={})


def unsupported_patch(given: str) -> ApiError:
    """Return the refusal of a patch type that the sandbox does not apply."""
    known = "application/merge-patch+json, application/strategic-merge-patch+json"
    message = f"the body of the request was in an unknown format - accepted media types include: {known}"
    return ApiError(415, "UnsupportedMediaType", f"{message} (not {given})", details={})


def invalid(kind: str, *, group: str = "", name: str = "", field: str, cause: str, problem: str) -> ApiError:
    """Return the refusal of an object, or of options, with an invalid field; `cause` is a FieldValue… word."""
    qualified = f"{kind}.{group}" if group else kind
    details = {
        "name": name,
        "group": group,
        "kind": kind,
        "causes": [{"reason": cause, "message": problem, "field": field}],
    }
    return ApiError(
        422,
        "Invalid",
        f'{qualified} "{name}" is invalid: {field}: {problem}',
        details={key: value for key, value in details.items() if value},
    )


def forbidden_option(field: str, problem: str) -> ApiError:
    """Return the refusal of a list or watch option (apimachinery `ValidateListOptions`)."""
    problem = f"Forbidden: {problem}"
    return invalid(
        "ListOptions", group="meta.k8s.io", field=field, cause="FieldValueForbidden", problem=problem
    )


def expired(message: str, *, continue_token: str = "") -> ApiError:
    """Return the refusal for a version that is no longer in the history."""
    return ApiError(
        410, "Expired", message, metadata={"continue": continue_token} if continue_token else None
    )


def too_old(asked: int, oldest: int) -> ApiError:
    """Return the refusal of a watch from before the history."""
    return expired(f"too old resource version: {asked} ({oldest})")


def too_large(asked: int, current: int) -> ApiError:
    """Return the refusal of a list from a version that the server has not reached."""
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    return ApiError(
        504,
        "Timeout",
        f"Timeout: Too large resource version: {asked}, current: {current}",
        details={"causes": [cause], "retryAfterSeconds": 1},
    )
