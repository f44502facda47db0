"""Prometheus' HTTP service discovery: targets as one JSON document, for collectors outside the cluster."""

import asyncio
import hashlib
import json
import re
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from k8s_consul_registrar.admin.connections import Bounds
from k8s_consul_registrar.admin.server import HttpServer
from k8s_consul_registrar.admin.view import SavedTargets, Scope, TargetRow, Targets, TargetsView
from k8s_consul_registrar.consul.codec import MetaKeys
from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.rotating import BearerTokens, Rotating
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.tls import ServerTls

SD_PATH = "/sd/targets"
FILTERS = ("kind", "namespace", "shard_path")
# Sent only with targets that an earlier process saved.
STALE_SINCE = "X-Stale-Since"
# Sent with every answer; `check` recognises a registrar by them.
HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'"}

# Seconds between two looks at the files: a Secret's volume is up to a minute late itself.
_LOOK_EVERY = 1.0
# Seconds an answer under way gets when the server stops, or gets new TLS files.
_SHUTDOWN_TIMEOUT = 2.0
# Targets looked at before the loop gets its turn: about 2 ms.
_SLICE = 200
# Bytes compressed or decompressed at once: about 1 ms.
_PIECE = 64 * 1024
# Seconds until a collector may try again while the first lists come in; Prometheus keeps what it has.
_RETRY_AFTER = "5"
# Documents kept compressed. Every shard path of a large installation fits; a caller that makes up filters
# can make the registrar render, and not hold more than this.
_MAX_KEPT = 64
_MAX_KEPT_BYTES = 16 * 1024 * 1024
_GZIP = zlib.MAX_WBITS | 16
# The names Prometheus' own consul_sd gives, so that one set of relabelling rules serves both
# (discovery/consul/consul.go).
_META = "__meta_consul_service_metadata_"
_NOT_IN_A_LABEL = re.compile(r"[^a-zA-Z0-9_]")

log = get_logger("http_sd")


class BadQuery(ValueError):
    """A query that makes no sense; the text is fit for the client."""


@dataclass(frozen=True, slots=True)
class SdQuery:
    """The filters of a request; an empty filter lets everything pass, several values of one are alternatives."""

    kinds: frozenset[str] = frozenset()
    namespaces: frozenset[str] = frozenset()
    shard_paths: frozenset[str] = frozenset()

    @property
    def scope(self) -> Scope:
        """The kinds and namespaces that the document is about; any of them may have any shard path."""
        return Scope(self.kinds, self.namespaces)

    def matches(self, target: TargetRow) -> bool:
        """Return True if a target passes every filter."""
        return (
            (not self.kinds or target.key.kind in self.kinds)
            and (not self.namespaces or target.key.namespace in self.namespaces)
            and (not self.shard_paths or target.service.value("shard_path") in self.shard_paths)
        )


def parse_sd_query(pairs: Iterable[tuple[str, str]]) -> SdQuery:
    """Parse the pairs of a query string.

    Raises BadQuery for an unknown name or kind: ignoring a slip would hand out every target.
    """
    given: dict[str, set[str]] = {name: set() for name in FILTERS}
    for name, value in pairs:
        if name not in given:
            raise BadQuery(f"the filters are {', '.join(FILTERS)}")
        given[name].add(value)
    if not given["kind"] <= set(Kind):
        raise BadQuery(f"kind is one of {', '.join(Kind)}")
    return SdQuery(*(frozenset(given[name]) for name in FILTERS))


@dataclass(slots=True)
class GroupEncoder:
    """Encodes targets as groups of Prometheus' HTTP service discovery (docs/http_sd), one group a target."""

    meta_keys: MetaKeys = field(default_factory=MetaKeys)
    _labels: dict[str, str] = field(default_factory=dict)
    _json: msgspec.json.Encoder = field(default_factory=msgspec.json.Encoder)

    def append(self, target: TargetRow, to: bytearray) -> None:
        """Append one group and a comma."""
        group = {"targets": [socket_address(target)], "labels": self._labels_of(target)}
        try:
            to += self._json.encode(group)
        except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8; JSON can spell it
            to += json.dumps(group).encode()
        to += b","

    def _labels_of(self, target: TargetRow) -> dict[str, Any]:
        """Return the labels that consul_sd would give, and how to scrape as the labels Prometheus itself reads."""
        service = target.service
        labels = {
            "__meta_consul_service": service.name,
            "__meta_consul_service_id": service.id,
            "__meta_consul_service_address": service.address,
            "__meta_consul_service_port": str(service.port),
        }
        if service.tags:
            labels["__meta_consul_tags"] = f",{','.join(service.tags)},"
        for key, value in service.meta:
            labels[self._labels.get(key) or self._label(key)] = value
            if key == "metrics_path":
                labels["__metrics_path__"] = value
            elif key == "scheme":
                labels["__scheme__"] = value
            elif key.startswith("param_"):
                labels[f"__{_as_label(key)}"] = value
        return labels

    def _label(self, key: str) -> str:
        label = self._labels[key] = _META + _as_label(self.meta_keys.wire(key))
        return label


def socket_address(target: TargetRow) -> str:
    """Return `address:port`, with brackets around an IPv6 address."""
    address = target.service.address
    return f"[{address}]:{target.service.port}" if ":" in address else f"{address}:{target.service.port}"


def _as_label(text: str) -> str:
    """Replace what the name of a label cannot have, as Prometheus does: one bad name fails its whole refresh."""
    return _NOT_IN_A_LABEL.sub("_", text)


@dataclass(frozen=True, slots=True)
class Document:
    """One rendered document: gzip bytes, the size without gzip, and the moment it shows."""

    packed: bytes
    size: int
    etag: str
    generation: int
    begun: float


@dataclass(slots=True)
class Documents:
    """Documents rendered on request, one at a time, and kept until the targets change."""

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
        size = sum(len(one.packed) for one in self._kept.values())
        return len(self._kept) > _MAX_KEPT or size > _MAX_KEPT_BYTES

    async def _render(self, query: SdQuery) -> Document:
        begun, generation = time.monotonic(), self.view.generation
        packing, digest = zlib.compressobj(1, wbits=_GZIP), hashlib.blake2b(digest_size=12)
        packed, size, text = [], 0, bytearray(b"[")
        for count, target in enumerate(self.view.targets(), 1):
            if query.matches(target):
                self.encoder.append(target, text)
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
        return Document(b"".join(packed), size + len(text), digest.hexdigest(), generation, begun)


def no_saved_targets() -> SavedTargets | None:
    """Return None: nothing was saved."""
    return None


def sd_handler(
    view: TargetsView, saved: Callable[[], SavedTargets | None] = no_saved_targets
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return the handler of `SD_PATH`: 200 with every target asked for, 503 while they are not known.

    `kind`, `namespace` and `shard_path` filter, each may be repeated; anything else is a 400. A request that
    includes a source that was never listed is answered from `saved`, marked as stale, and never in part.
    """
    encoder = GroupEncoder(view.meta_keys)
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


async def _answer(
    request: web.Request, document: Document, stale_since: float | None = None
) -> web.StreamResponse:
    # The tag is weak because both encodings share it.
    headers = {"ETag": f'W/"{document.etag}"', "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    if stale_since is not None:
        # The age of the targets (RFC 9111, 5.1), and when they were last up to date.
        moment = datetime.fromtimestamp(stale_since, UTC).isoformat(timespec="seconds")
        headers["Age"] = str(max(0, round(time.time() - stale_since)))
        headers[STALE_SINCE] = moment.replace("+00:00", "Z")
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
    """Return True if an Accept-Encoding names gzip with a weight above 0 (RFC 9110, 12.5.3)."""
    for coding in accept_encoding.lower().split(","):
        name, _, weight = coding.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "").rstrip("0.") != "q="
    return False


class HttpSdServer:
    """The server of `HTTP_SD_PORT`, which serves `SD_PATH` while its context is open.

    `bearer` is the token every request must carry, None for none; `tls` makes it HTTPS. A change of the
    files of either cuts off clients that rely on the old ones; `keep_fresh` looks for it. Port 0 lets the
    system pick one.
    """

    def __init__(
        self,
        *,
        port: int,
        view: TargetsView,
        saved: Callable[[], SavedTargets | None] = no_saved_targets,
        bearer: Rotating[BearerTokens] | None = None,
        tls: ServerTls | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self._server = HttpServer(
            "HTTP_SD_PORT",
            port,
            shutdown_timeout=_SHUTDOWN_TIMEOUT,
            bounds=bounds,
            middlewares=[_require(bearer)] if bearer else [],
        )
        self._server.app.router.add_get(SD_PATH, sd_handler(view, saved), allow_head=False)
        self._server.app.on_response_prepare.append(_harden)
        self._bearer = bearer
        self._tls = tls

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.port

    async def __aenter__(self) -> Self:
        """Start listening; raises OperationalError when the port cannot be used."""
        await self._server.start(self._tls.value.context if self._tls else None)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and close what is open."""
        await self._server.stop()

    async def keep_fresh(self) -> None:
        """Look at the files of the token and of TLS forever; the old ones stay in force while new ones are unusable."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            await self.refresh()

    async def refresh(self) -> None:
        """Look at the files once, and use them from now on if they changed."""
        if self._bearer is not None:
            self._bearer.refresh()
        if self._tls is not None and self._tls.refresh():
            await self._server.renew(self._tls.value.context)
            log.info("HTTP_SD_PORT has new TLS files")


def _require(bearer: Rotating[BearerTokens]) -> Middleware:
    """Return a middleware that refuses requests without the token, whatever the path."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization")
        if not bearer.current().accepts(None if given is None else given.encode("utf-8", "surrogateescape")):
            raise web.HTTPUnauthorized(
                text="a bearer token is needed\n", headers={"WWW-Authenticate": "Bearer"}
            )
        return await handler(request)

    return check


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    """Mark every answer as something that no browser should render."""
    response.headers.update(HEADERS)
