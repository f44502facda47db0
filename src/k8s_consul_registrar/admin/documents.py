"""Documents of service discovery: each target is encoded when it changes, a document is made when it is asked for."""

import asyncio
import hashlib
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from k8s_consul_registrar.admin.target_groups import Group, GroupEncoder, LabelNames, SdQuery, texts
from k8s_consul_registrar.admin.view import TargetRow, Targets
from k8s_consul_registrar.asyncio_tools import in_slices

# Targets encoded before the loop gets its turn: about 2 ms.
_SLICE = 200
# Groups that are compressed at once, and pieces before the loop gets its turn: about 2 ms.
_PIECE, _PIECES = 64, 4
# Bytes decompressed at once: about 1 ms.
_UNPACKED = 64 * 1024
# Documents kept compressed. Every shard path of a large installation fits; a caller that makes up filters
# can make the registrar render, and not hold more than this.
_MAX_KEPT = 64
_MAX_KEPT_BYTES = 16 * 1024 * 1024
# For clients that wait for changes: seconds between two different documents, between two renderings, and the
# multiple of the CPU time of all documents of the last minute.
PACE = 1.0
LEAST = 0.1
_COST = 10.0
_LATELY = 60.0
_GZIP = zlib.MAX_WBITS | 16


@dataclass(frozen=True, slots=True)
class Document:
    """One rendered document: gzip bytes, the size without gzip, the position it shows, and its CPU time.

    `since` is the moment of the first document with this content, `version` that of the groups.
    """

    packed: bytes
    size: int
    etag: str
    position: int
    begun: float
    seconds: float
    since: float
    version: object


class Groups:
    """The groups of all targets by service ID; one that changes is encoded again.

    `version` is another object whenever a group has changed, `position` is that of the view they show.
    """

    def __init__(self, view: Targets, encoder: GroupEncoder, names: LabelNames) -> None:
        self._view = view
        self._encoder = encoder
        self._names = names
        self.by_id: dict[str, Group] = {}
        self.version = object()
        self.position = -1

    async def refresh(self) -> None:
        """Take over what has changed."""
        position = self._view.position
        if position == self.position:
            return
        changed = None if self.position < 0 else self._view.changed_since(self.position)
        if changed is None:
            gone = set(self.by_id)
            async for target in in_slices(self._view.targets(), _SLICE):
                gone.discard(target.service.id)
                self._put(target.service.id, target)
            for service_id in gone:
                self._put(service_id, None)
        else:
            async for service_id in in_slices(changed, _SLICE):
                self._put(service_id, self._view.row(service_id))
        self.position = position

    def _put(self, service_id: str, target: TargetRow | None) -> None:
        before = self.by_id.get(service_id)
        group = None
        if target is not None and target.is_target:
            group = self.by_id[service_id] = self._encoder.encode(target, self._names)
        elif before is not None:
            del self.by_id[service_id]
        if group != before:
            self.version = object()


@dataclass(slots=True)
class Documents:
    """Documents rendered on request, one at a time, and kept until the targets change."""

    view: Targets
    encoder: GroupEncoder
    _groups: dict[LabelNames, Groups] = field(default_factory=dict)
    _kept: OrderedDict[SdQuery, Document] = field(default_factory=OrderedDict)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def is_old(self, position: int) -> bool:
        """Return True if the targets may have changed since a position."""
        return position != self.view.position

    def due(self, document: Document) -> float:
        """Return when a document may be rendered again for a client that waits, by the monotonic clock.

        All documents together take a tenth of a CPU at most.
        """
        lately = document.begun - _LATELY
        cost = sum(one.seconds for one in self._kept.values() if one.begun > lately)
        return max(document.since + PACE, document.begun + max(LEAST, _COST * cost))

    async def groups(self) -> Groups:
        """Return the groups of every target at this moment, with the labels of consul_sd."""
        async with self._turn:
            return await self._refreshed(LabelNames.CONSUL)

    async def get(self, query: SdQuery, *, may_be_old: bool = False) -> Document:
        """Return the document of this moment or a later one, or with `may_be_old` one that is not `due` again."""
        asked = time.monotonic()
        async with self._turn:
            kept = self._kept.get(query)
            if may_be_old and kept is not None and asked < self.due(kept):
                return kept
            if kept is None or (self.is_old(kept.position) and kept.begun < asked):
                kept = self._kept[query] = await self._render(query)
            self._kept.move_to_end(query)
            while len(self._kept) > 1 and self._is_too_much():
                self._kept.popitem(last=False)
            return kept

    def _is_too_much(self) -> bool:
        size = sum(len(one.packed) for one in self._kept.values())
        return len(self._kept) > _MAX_KEPT or size > _MAX_KEPT_BYTES

    async def _refreshed(self, names: LabelNames) -> Groups:
        """Return the groups with labels of these names; beside those of consul_sd only the others asked for last stay."""
        found = self._groups.get(names)
        if found is None:
            for other in self._groups.keys() - {LabelNames.CONSUL}:
                del self._groups[other]
            found = self._groups[names] = Groups(self.view, self.encoder, names)
        await found.refresh()
        return found

    async def _render(self, query: SdQuery) -> Document:
        """Render a document, unless the groups are those of the one before."""
        begun, used, before = time.monotonic(), time.thread_time(), self._kept.get(query)
        groups = await self._refreshed(query.names)
        if before is not None and before.version is groups.version:
            return replace(before, position=groups.position)
        packing, parts, size, begin = zlib.compressobj(1, wbits=_GZIP), [], 0, b"["
        all_groups = tuple(groups.by_id.values())
        async for start in in_slices(range(0, len(all_groups), _PIECE), _PIECES):
            some = all_groups[start : start + _PIECE]
            if found := [*texts(one for one in some if query.matches(one))]:
                text = begin + b",".join(found)
                parts.append(packing.compress(text))
                size += len(text)
                begin = b","
        end = b"]\n" if size else b"[]\n"
        packed = b"".join((*parts, packing.compress(end), packing.flush()))
        etag, size = hashlib.blake2b(packed, digest_size=12).hexdigest(), size + len(end)
        since = before.since if before is not None and before.etag == etag else begun
        seconds = time.thread_time() - used
        return Document(packed, size, etag, groups.position, begun, seconds, since, groups.version)


def pieces(packed: bytes) -> Iterator[bytes]:
    """Yield a document without its packing, piece by piece: there may be 80 MB of it."""
    unpacking = zlib.decompressobj(wbits=_GZIP)
    rest = packed
    while not unpacking.eof:
        yield unpacking.decompress(rest, _UNPACKED)
        rest = unpacking.unconsumed_tail
