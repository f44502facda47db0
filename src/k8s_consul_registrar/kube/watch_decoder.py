"""Watch streams: bytes in, events out. No sockets, no clock.

A watch answers with one JSON object a line (Kubernetes API concepts, "Efficient detection of changes").
"""

from typing import Annotated, TypeAlias
from urllib.parse import quote

import msgspec

from k8s_consul_registrar.errors import ClusterError, ClusterRefused
from k8s_consul_registrar.kube.objects import VERSION_LENGTH, Item, decode_event, decode_versioned
from k8s_consul_registrar.kube.responses import ApiAction, cluster_error, decode_status
from k8s_consul_registrar.model import Kind

RESOURCES = {
    Kind.POD: "pods",
    Kind.NODE: "nodes",
    Kind.SERVICE: "services",
    Kind.ENDPOINT: "endpointslices",
}
# The API groups of those that are not in the core group.
GROUPS = {Kind.ENDPOINT: "discovery.k8s.io"}
# etcd takes 1.5 MiB a request by default and few raise it far; JSON of it is a few times that at most.
LINE_LIMIT = 32 << 20


def collection_path(kind: Kind, namespace: str = "") -> str:
    """Return the path of a kind's objects, in one namespace if there is one."""
    root = f"/apis/{GROUPS[kind]}/v1" if kind in GROUPS else "/api/v1"
    scope = f"/namespaces/{quote(namespace, safe='')}" if namespace else ""
    return f"{root}{scope}/{RESOURCES[kind]}"


class Changed(msgspec.Struct, frozen=True, gc=False):
    """An object was added or modified.

    `version` is the one to resume from, empty where it could not be read or is absurdly long. `is_added` says that the object
    was not there before, or did not match what is watched.
    """

    item: Item
    version: str
    is_added: bool = True


class Deleted(msgspec.Struct, frozen=True, gc=False):
    """An object is gone; `item` is its last state."""

    item: Item
    version: str


class Bookmark(msgspec.Struct, frozen=True):
    """Nothing else changed up to `version`."""

    version: str


class Broken(msgspec.Struct, frozen=True):
    """The watch cannot go on, for the reason `error`; it is the last event of its stream."""

    error: ClusterError
    version: str = ""


WatchEvent: TypeAlias = Changed | Deleted | Bookmark | Broken


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Metadata(msgspec.Struct, rename="camel"):
    resource_version: Annotated[str, msgspec.Meta(min_length=1, max_length=VERSION_LENGTH)]


class _Bookmark(msgspec.Struct):
    metadata: _Metadata


_EVENT = msgspec.json.Decoder(_Event)
_BOOKMARK = msgspec.json.Decoder(_Bookmark)


class WatchDecoder:
    """Decodes one watch stream, fed in pieces of any size.

    After `Broken` nothing further comes out. A line cut off by the end of the stream is no event.
    """

    def __init__(self, kind: Kind, namespace: str = "", *, line_limit: int = LINE_LIMIT) -> None:
        self._kind = kind
        self._action = ApiAction("watch", RESOURCES[kind], namespace)
        self._line_limit = line_limit
        self._buffer = bytearray()
        self._searched = 0
        self._is_broken = False

    def feed(self, data: bytes) -> list[WatchEvent]:
        """Return the events that are complete with these bytes."""
        events: list[WatchEvent] = []
        self._buffer += data
        start = 0
        while not self._is_broken:
            end = self._buffer.find(b"\n", max(start, self._searched))
            if end < 0:
                break
            line = bytes(memoryview(self._buffer)[start:end])
            start = end + 1
            if line.strip():
                events.append(self._decode(line))
        del self._buffer[:start]
        # What was searched without finding an end is not searched again: a long line costs O(n).
        self._searched = len(self._buffer)
        if len(self._buffer) > self._line_limit and not self._is_broken:
            events.append(self._broken(f"an event is longer than {self._line_limit} bytes"))
        if self._is_broken:
            self._buffer.clear()
            self._searched = 0
        return events

    def _decode(self, line: bytes) -> WatchEvent:
        whole = decode_event(line, self._kind)
        if whole is not None and (event := _event(*whole)) is not None:
            return event
        try:
            envelope = _EVENT.decode(line)
        except (ValueError, RecursionError):
            return self._broken("a line is not an event")
        match envelope.type:
            case "BOOKMARK":
                return self._bookmark(envelope.object)
            case "ERROR":
                self._is_broken = True
                status = decode_status(envelope.object)
                return Broken(cluster_error(self._action, status.code, status))
        event = _event(envelope.type, *decode_versioned(envelope.object, self._kind))
        return event or self._broken(f"an event of the unknown type {envelope.type[:30]!r}")

    def _bookmark(self, raw: msgspec.Raw) -> WatchEvent:
        try:
            return Bookmark(_BOOKMARK.decode(raw).metadata.resource_version)
        except (ValueError, RecursionError):
            return self._broken("a bookmark without a usable version")

    def _broken(self, problem: str) -> Broken:
        self._is_broken = True
        return Broken(ClusterRefused(f"cannot {self._action}: {problem}", 200))


def _event(word: str, item: Item, version: str) -> Changed | Deleted | None:
    """Return the event of this type about an object, None where the type is not about objects."""
    match word:
        case "ADDED" | "MODIFIED":
            return Changed(item, _usable(version), is_added=word == "ADDED")
        case "DELETED":
            return Deleted(item, _usable(version))
    return None


def _usable(version: str) -> str:
    return version if len(version) <= VERSION_LENGTH else ""
