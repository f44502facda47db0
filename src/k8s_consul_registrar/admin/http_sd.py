"""Prometheus' HTTP service discovery: the targets as one JSON document, rendered in slices and kept packed."""

import asyncio
import hashlib
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from aiohttp import web

from k8s_consul_registrar.admin.sd_query import BadQuery, GroupEncoder, SdQuery, parse_sd_query
from k8s_consul_registrar.admin.view import MetaNames, SavedTargets, Targets, TargetsView, as_they_are

SD_PATH = "/sd/targets"
# Only in an answer from targets that an earlier process saved.
STALE_SINCE = "X-Stale-Since"

# So many targets are looked at before the loop gets its turn: about 2 ms.
_SLICE = 200
# Bytes that are packed or unpacked at once: about 1 ms.
_PIECE = 64 * 1024
# Seconds until a collector may try again while the first lists come in; Prometheus keeps what it has.
_RETRY_AFTER = "5"
# Documents kept packed. Every shard path of a large installation fits; a caller that makes up filters
# can make us render, and not hold more than this.
_MOST_KEPT = 64
_MOST_KEPT_BYTES = 16 * 1024 * 1024
_GZIP = zlib.MAX_WBITS | 16


@dataclass(frozen=True, slots=True)
class Document:
    """One rendered document: gzip bytes, the size without gzip, and what tells whether it is still good."""

    packed: bytes
    size: int
    etag: str
    generation: int
    begun: float


@dataclass(slots=True)
class Documents:
    """Renders what is asked for, one at a time, and keeps it until the targets change."""

    view: Targets
    encoder: GroupEncoder
    _kept: OrderedDict[SdQuery, Document] = field(default_factory=OrderedDict)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def get(self, query: SdQuery) -> Document:
        """Return the document of this moment or a later one."""
        asked = time.monotonic()
        async with self._turn:
            kept = self._kept.get(query)
            if kept is None or (kept.generation != self.view.generation and kept.begun < asked):
                kept = self._kept[query] = await self._render(query)
            self._kept.move_to_end(query)
            while len(self._kept) > 1 and self._is_too_much():
                self._kept.popitem(last=False)
            return kept

    def _is_too_much(self) -> bool:
        return (
            len(self._kept) > _MOST_KEPT
            or sum(len(one.packed) for one in self._kept.values()) > _MOST_KEPT_BYTES
        )

    async def _render(self, query: SdQuery) -> Document:
        begun, generation = time.monotonic(), self.view.generation
        packing, digest = zlib.compressobj(1, wbits=_GZIP), hashlib.blake2b(digest_size=12)
        packed, size, text = [], 0, bytearray(b"[")
        for count, target in enumerate(self.view.targets(), 1):
            if query.wants(target):
                self.encoder.append(target, text)
            if count % _SLICE == 0:
                await asyncio.sleep(0)
            if len(text) >= _PIECE:
                last = text[-1:]
                del text[-1:]
                size += len(text)
                digest.update(text)
                packed.append(packing.compress(text))
                text = last  # the comma stays behind, since nothing may follow it
                await asyncio.sleep(0)
        if text[-1:] == b",":
            del text[-1:]
        text += b"]\n"
        digest.update(text)
        packed += (packing.compress(text), packing.flush())
        return Document(b"".join(packed), size + len(text), digest.hexdigest(), generation, begun)


def no_saved_targets() -> SavedTargets | None:
    """Return None: nothing was saved."""
    return None


def sd_handler(
    view: TargetsView,
    meta_names: MetaNames = as_they_are,
    saved: Callable[[], SavedTargets | None] = no_saved_targets,
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return the handler of `SD_PATH`: 200 with every target asked for, 503 while they are not known.

    `kind`, `namespace` and `shard_path` filter, each may be repeated; anything else is a 400. A request that
    includes a source that was never listed is answered from `saved`, marked as stale, and never in part.
    """
    encoder = GroupEncoder(meta_names)
    documents = Documents(view, encoder)
    stale: Documents | None = None

    async def targets(request: web.Request) -> web.StreamResponse:
        nonlocal stale
        try:
            query = parse_sd_query(request.query.items())
        except BadQuery as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        if problem := view.unlisted(query.scope):
            targets = saved()
            if targets is None:
                text = " ".join(problem.split())
                raise web.HTTPServiceUnavailable(text=f"{text}\n", headers={"Retry-After": _RETRY_AFTER})
            if stale is None or stale.view is not targets:
                stale = Documents(targets, encoder)
            return await _answer(request, await stale.get(query), stale_since=targets.since)
        if stale is not None and not view.unlisted():
            stale = None
        return await _answer(request, await documents.get(query))

    return targets


def _staleness(since: float) -> dict[str, str]:
    """Return the headers of a stale answer: how old it is (RFC 9111, 5.1), and until when it was up to date."""
    moment = datetime.fromtimestamp(since, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {"Age": str(max(0, round(time.time() - since))), STALE_SINCE: moment}


async def _answer(
    request: web.Request, document: Document, stale_since: float | None = None
) -> web.StreamResponse:
    # The tag is weak because both encodings share it.
    headers = {"ETag": f'W/"{document.etag}"', "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    if stale_since is not None:
        headers |= _staleness(stale_since)
    known = request.if_none_match or ()
    if any(tag.value in (document.etag, "*") for tag in known):
        return web.Response(status=304, headers=headers)
    headers["Content-Type"] = "application/json"
    if accepts_gzip(",".join(request.headers.getall("Accept-Encoding", ()))):
        headers["Content-Encoding"] = "gzip"
        return web.Response(body=document.packed, headers=headers)
    response = web.StreamResponse(headers=headers)
    response.content_length = document.size
    await response.prepare(request)
    async for piece in _unpacked(document.packed):
        await response.write(piece)
    await response.write_eof()
    return response


async def _unpacked(packed: bytes) -> AsyncIterator[bytes]:
    """Yield the document piece by piece; Prometheus asks for no compression, and there may be 80 MB of it."""
    unpacking = zlib.decompressobj(wbits=_GZIP)
    rest = packed
    while not unpacking.eof:
        yield unpacking.decompress(rest, _PIECE)
        rest = unpacking.unconsumed_tail
        await asyncio.sleep(0)


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding names gzip, and not with a weight of 0 (RFC 9110, 12.5.3)."""
    for coding in accept_encoding.lower().split(","):
        name, _, weight = coding.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "").rstrip("0.") != "q="
    return False
