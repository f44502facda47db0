"""Pages of a list request: resourceVersion, resourceVersionMatch, limit and continue.

Rules: Kubernetes API Concepts, "Resource versions" and "Retrieving large results sets in chunks";
continue tokens as in apiserver `pkg/storage/continue.go`.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from k8s_consul_registrar.sandbox import api_errors
from k8s_consul_registrar.sandbox.resources import Resource
from k8s_consul_registrar.sandbox.selection import Selection
from k8s_consul_registrar.sandbox.store import HistoryExpiredError, Store, Stored

_TOO_OLD = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new "
    "list without the continue parameter, or use the continue token in this response to retrieve the "
    "remainder of the results. Continuing with the provided token results in an inconsistent list - objects "
    "that were created, modified, or deleted between the time the first chunk was returned and now may show "
    "up in the list."
)
_INCONSISTENT = -1  # the revision in a token that continues with the current list


class _Continue(msgspec.Struct, frozen=True):
    rv: int
    start: str
    v: str = "meta.k8s.io/v1"


@dataclass(frozen=True, slots=True)
class Page:
    """The objects of one list response, and the metadata of the list."""

    items: list[Stored]
    metadata: dict[str, Any]


def parse_version(text: str) -> int:
    """Return a resourceVersion as a number, 0 when empty; ApiError 400 if it is none."""
    if text and not text.isdecimal():
        raise api_errors.bad_request(
            f"Invalid value: {text!r}: strconv.ParseUint: parsing {text!r}: invalid syntax"
        )
    return int(text or 0)


def list_page(store: Store, resource: Resource, selection: Selection, query: Mapping[str, str]) -> Page:
    """Return one page; ApiError 400, 410 (expired), 422 or 504 (from the future) like an API server."""
    match, version_text = query.get("resourceVersionMatch", ""), query.get("resourceVersion", "")
    token = query.get("continue", "")
    _validate(match, version_text, token, query)
    limit_text = query.get("limit", "")
    limit = int(limit_text) if limit_text.isdecimal() else 0
    if token:
        return _continued(store, resource, selection, _decode(token), limit)
    version = parse_version(version_text)
    if version > store.revision:
        raise api_errors.too_large(version, store.revision)
    if match == "Exact":
        try:
            return _cut(store, resource, selection, limit, at=version)
        except HistoryExpiredError:
            raise api_errors.expired("The resourceVersion for the provided list is too old.") from None
    if version_text == "0":  # served from the watch cache, which has no pages
        limit = 0
    return _cut(store, resource, selection, limit)


def _continued(store: Store, resource: Resource, selection: Selection, token: _Continue, limit: int) -> Page:
    start = token.start.removeprefix("/")
    if token.rv == _INCONSISTENT:
        return _cut(store, resource, selection, limit, start=start)
    try:
        return _cut(store, resource, selection, limit, start=start, at=token.rv)
    except HistoryExpiredError:
        fresh = _encode(_Continue(_INCONSISTENT, token.start))
        raise api_errors.expired(_TOO_OLD, continue_token=fresh) from None


def _cut(
    store: Store,
    resource: Resource,
    selection: Selection,
    limit: int,
    *,
    start: str = "",
    at: int | None = None,
) -> Page:
    """Return the first `limit` of the selected items, or all for 0, with a continue token."""
    if limit and selection.is_everything:  # costs a page, not the whole list
        items, left = store.page(resource, limit, start=start, at=at)
    else:
        items = [stored for stored in store.select(resource, start=start, at=at) if selection.matches(stored)]
        left = max(0, len(items) - limit) if limit else 0
        items = items[:limit] if limit else items
    version = store.revision if at is None else at
    metadata: dict[str, Any] = {"resourceVersion": str(version)}
    if left:
        metadata["continue"] = _encode(_Continue(version, f"/{items[-1].key}\x00"))
        if not (selection.labels or selection.fields):  # a real server cannot count the matches
            metadata["remainingItemCount"] = left
    return Page(items, metadata)


def _validate(match: str, version: str, token: str, query: Mapping[str, str]) -> None:
    """Apply apimachinery's `ValidateListOptions` to a list."""
    if match and not version:
        problem = "resourceVersionMatch is forbidden unless resourceVersion is provided"
        raise api_errors.forbidden_option("resourceVersionMatch", problem)
    if match and token:
        problem = "resourceVersionMatch is forbidden when continue is provided"
        raise api_errors.forbidden_option("resourceVersionMatch", problem)
    if match == "Exact" and version == "0":
        problem = 'resourceVersionMatch "exact" is forbidden for resourceVersion "0"'
        raise api_errors.forbidden_option("resourceVersionMatch", problem)
    if match not in ("", "Exact", "NotOlderThan"):
        problem = f'Unsupported value: "{match}": supported values: "Exact", "NotOlderThan", ""'
        raise api_errors.invalid(
            "ListOptions",
            group="meta.k8s.io",
            field="resourceVersionMatch",
            cause="FieldValueNotSupported",
            problem=problem,
        )
    if "sendInitialEvents" in query:
        raise api_errors.forbidden_option("sendInitialEvents", "sendInitialEvents is forbidden for list")
    if token and version not in ("", "0"):
        raise api_errors.bad_request("specifying resource version is not allowed when using continue")


def _encode(token: _Continue) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(token)).rstrip(b"=").decode()


def _decode(text: str) -> _Continue:
    problem = "invalid continue token: continue key is not valid: "
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise api_errors.bad_request(f"{problem}illegal base64 data at input byte 0") from None
    try:
        return msgspec.json.decode(data, type=_Continue)
    except msgspec.MsgspecError:
        first = data[:1].decode("latin-1")
        raise api_errors.bad_request(
            f"{problem}invalid character '{first}' looking for beginning of value"
        ) from None
