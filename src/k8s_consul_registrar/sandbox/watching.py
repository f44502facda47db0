"""Events of a watch request, as newline-delimited JSON; pure.

Rules: Kubernetes API Concepts, "Efficient detection of changes" and "Streaming lists"; selectors as in
apiserver `pkg/storage/cacher`: an object that begins or ceases to match is ADDED or DELETED.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from k8s_consul_registrar.sandbox import api_errors
from k8s_consul_registrar.sandbox.api_errors import ApiError
from k8s_consul_registrar.sandbox.listing import parse_version
from k8s_consul_registrar.sandbox.resources import Resource
from k8s_consul_registrar.sandbox.selection import Selection
from k8s_consul_registrar.sandbox.store import Change, Stored

_TRUE = frozenset({"1", "true", "True", "t", "T", "TRUE"})


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """The options of a watch request; `timeout` is in seconds, None without one."""

    version: int
    starts_with_state: bool
    ends_state_with_bookmark: bool
    wants_bookmarks: bool
    timeout: int | None


def is_true(text: str) -> bool:
    """Return True if a query parameter is on, in the spellings of Go's ParseBool."""
    return text in _TRUE


def parse_options(query: Mapping[str, str], *, can_stream_lists: bool) -> WatchOptions:
    """Return the options of a watch; ApiError 422 for combinations that an API server refuses."""
    match, version = query.get("resourceVersionMatch", ""), query.get("resourceVersion", "")
    initial = query.get("sendInitialEvents")
    if initial is None and match:
        problem = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided"
        raise api_errors.forbidden_option("resourceVersionMatch", problem)
    if initial is not None and match != "NotOlderThan":
        problem = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
        raise api_errors.forbidden_option("resourceVersionMatch", problem)
    if initial is not None and not can_stream_lists:
        problem = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
        raise api_errors.forbidden_option("sendInitialEvents", problem)
    wants_bookmarks = is_true(query.get("allowWatchBookmarks", ""))
    timeout = query.get("timeoutSeconds", "")
    return WatchOptions(
        version=parse_version(version),
        starts_with_state=is_true(initial) if initial is not None else version in ("", "0"),
        ends_state_with_bookmark=wants_bookmarks and initial is not None and is_true(initial),
        wants_bookmarks=wants_bookmarks,
        timeout=int(timeout) if timeout.isdecimal() and int(timeout) > 0 else None,
    )


def initial_events(resource: Resource, stored: Iterable[Stored]) -> Iterator[bytes]:
    """Return an ADDED event for each object."""
    for item in stored:
        yield _event(b"ADDED", resource, item)


def change_events(resource: Resource, changes: Iterable[Change], selection: Selection) -> Iterator[bytes]:
    """Return the events of changes for a watch of a selection."""
    for change in changes:
        before = change.before if change.before and selection.matches(change.before) else None
        after = change.after if change.after and selection.matches(change.after) else None
        if after is not None:
            yield _event(b"MODIFIED" if before else b"ADDED", resource, after)
        elif before is not None:
            yield _event(b"DELETED", resource, before.at(change.revision))


def bookmark(resource: Resource, version: int, *, ends_state: bool = False) -> bytes:
    """Return a BOOKMARK event; `ends_state` marks the end of streamed initial events."""
    annotations = b',"annotations":{"k8s.io/initial-events-end":"true"}' if ends_state else b""
    return b'{"type":"BOOKMARK","object":%s"metadata":{"resourceVersion":"%d"%s},%s}}\n' % (
        resource.type_prefix,
        version,
        annotations,
        resource.empty_body,
    )


def error_event(error: ApiError) -> bytes:
    """Return the ERROR event that ends a watch."""
    return b'{"type":"ERROR","object":%s}\n' % msgspec.json.encode(error.status())


def _event(kind: bytes, resource: Resource, stored: Stored) -> bytes:
    return b'{"type":"%s","object":%s%s}\n' % (kind, resource.type_prefix, stored.body[1:])
