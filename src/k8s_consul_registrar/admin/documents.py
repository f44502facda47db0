"""Documents of service discovery: rendered when asked for, kept packed until the targets change."""

import asyncio
import hashlib
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from k8s_consul_registrar.admin.target_groups import GroupEncoder, SdQuery
from k8s_consul_registrar.admin.view import Targets

# Targets looked at before the loop gets its turn: about 2 ms.
_SLICE = 200
# Bytes compressed or decompressed at once: about 1 ms.
_PIECE = 64 * 1024
# Documents kept compressed. Every shard path of a large installation fits; a caller that makes up filters
# can make the registrar render, and not hold more than this.
_MAX_KEPT = 64
_MAX_KEPT_BYTES = 16 * 1024 * 1024
# For clients that wait for changes: seconds between two different documents, between two renderings, and the
# multiple of the CPU time of all documents of the last minute.
_PACE = 1.0
_LEAST = 0.1
_COST = 10.0
_LATELY = 60.0
_GZIP = zlib.MAX_WBITS | 16


@dataclass(frozen=True, slots=True)
class Document:
    """One rendered document: gzip bytes, the size without gzip, the moment it shows, and its CPU time.

    `since` is the moment of the first document with this content.
    """

    packed: bytes
    size: int
    etag: str
    generation: int
    begun: float
    seconds: float
    since: float


@dataclass(slots=True)
class Documents:
    """Documents rendered on request, one at a time, and kept until the targets change."""

    view: Targets
    encoder: GroupEncoder
    _kept: OrderedDict[SdQuery, Document] = field(default_factory=OrderedDict)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def is_old(self, document: Document) -> bool:
        """Return True if the targets have changed since a document was rendered."""
        return document.generation != self.view.generation

    def due(self, document: Document) -> float:
        """Return when a document may be rendered again for a client that waits, by the monotonic clock.

        All documents together take a tenth of a CPU at most.
        """
        lately = document.begun - _LATELY
        cost = sum(one.seconds for one in self._kept.values() if one.begun > lately)
        return max(document.since + _PACE, document.begun + max(_LEAST, _COST * cost))

    async def get(self, query: SdQuery, *, may_be_old: bool = False) -> Document:
        """Return the document of this moment or a later one, or with `may_be_old` one that is not `due` again."""
        asked = time.monotonic()
        async with self._turn:
            kept = self._kept.get(query)
            if may_be_old and kept is not None and asked < self.due(kept):
                return kept
            if kept is None or (kept.generation != self.view.generation and kept.begun < asked):
                kept = self._kept[query] = await self._render(query)
            self._kept.move_to_end(query)
            while len(self._kept) > 1 and self._is_too_much():
                self._kept.popitem(last=False)
            return kept

    def _is_too_much(self) -> bool:
        size = sum(len(one.packed) for one in self._kept.values())
        return len(self._kept) > _MAX_KEPT or size > _MAX_KEPT_BYTES

    async def _render(self, query: SdQuery) -> Document:
        begun, used, generation = time.monotonic(), time.thread_time(), self.view.generation
        packing, digest = zlib.compressobj(1, wbits=_GZIP), hashlib.blake2b(digest_size=12)
        packed, size, text = [], 0, bytearray(b"[")
        for count, target in enumerate(self.view.targets(), 1):
            if query.matches(target):
                self.encoder.append(target, text, query.names)
            if count % _SLICE == 0:
                await asyncio.sleep(0)
            if len(text) >= _PIECE:
                last = text[-1:]
                del text[-1:]
                size += len(text)
                digest.update(text)
                packed.append(packing.compress(text))
                text = last  # the comma stays behind, because nothing may follow it
                await asyncio.sleep(0)
        if text[-1:] == b",":
            del text[-1:]
        text += b"]\n"
        digest.update(text)
        packed += (packing.compress(text), packing.flush())
        size += len(text)
        seconds = time.thread_time() - used
        etag, before = digest.hexdigest(), self._kept.get(query)
        since = before.since if before is not None and before.etag == etag else begun
        return Document(b"".join(packed), size, etag, generation, begun, seconds, since)


def pieces(packed: bytes) -> Iterator[bytes]:
    """Yield a document without its packing, piece by piece: there may be 80 MB of it."""
    unpacking = zlib.decompressobj(wbits=_GZIP)
    rest = packed
    while not unpacking.eof:
        yield unpacking.decompress(rest, _PIECE)
        rest = unpacking.unconsumed_tail
