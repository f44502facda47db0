"""Lists of the catalog, cut into records as they arrive, so that their size costs neither memory nor a stall."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from contextlib import aclosing
from types import MappingProxyType
from urllib.parse import quote

import msgspec

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import DECODE_ERRORS, MetaKeys, decode, decode_instance
from k8s_consul_registrar.consul.health import index_of, is_filtered
from k8s_consul_registrar.consul.transactions import CheckRecord, NodeRecord
from k8s_consul_registrar.errors import ConsulFiltered, ConsulRefused
from k8s_consul_registrar.model import MANAGED_BY, Service

# The text between two records. It may also occur inside a record, even in a string; but no
# beginning of a JSON object is itself a JSON object, so decoding a piece settles whether it is whole.
_BOUNDARY = re.compile(rb"\}\s*+,\s*+\{")
# A decoded piece that was not whole is wasted. After this many for one record, or for a record this long
# (bytes), its end is found by counting braces, which is slower and linear whatever the record holds.
MOST_MISSES = 4
LONG_RECORD = 128 * 1024
# Records of Consul are far below these: its Raft log takes half a megabyte, and Go writes no deep nesting.
LONGEST_RECORD = 8 * 1024 * 1024
DEEPEST_RECORD = 200
# The text before the first record is at most a node.
LONGEST_HEAD = 1024 * 1024

# No structural quote is escaped and every quote inside a string is, so these are found nowhere else.
NODE_SERVICES = re.compile(rb'"Services"\s*:\s*(?:(\[)|null)')
ARRAY = re.compile(rb"^\s*(?:(\[)|null)")
_STRUCTURE = re.compile(rb'["{}\[\]]')
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_NEXT = re.compile(rb"\s*+,\s*+(?=\{)")

# Records handed out before the loop gets its turn: a quarter of a millisecond of work with what becomes of them. A change
# needs half a dozen turns until it is at Consul.
SLICE = 10
# A leader that was just voted out may not know it yet; what decides over services asks the others first
# (Consul API, "Consistency modes").
CONSISTENT = {"consistent": ""}

# The namespace of Consul Enterprise in which the checks of whole nodes are, such as an agent's own.
NODES_NAMESPACE = "default"
# In Consul Enterprise, all namespaces that the token may see.
EVERY_NAMESPACE = {"ns": "*"}
_NO_ENTERPRISE = 400

# Also true of a service without the key (seen on 1.8.7), so that Consul sends none of the registrars' own.
NOT_MANAGED = f'not ServiceMeta.managed_by == "{MANAGED_BY}"'

_raw = msgspec.json.Decoder(msgspec.Raw)
_checks = msgspec.json.Decoder(CheckRecord)


class _Braces:
    """The end of one object, found by its braces; each byte is looked at once, however it arrives."""

    def __init__(self) -> None:
        self._looked = 0  # bytes, from the beginning of the object
        self._depth = 0
        self._is_in_string = False

    def end_of(self, text: bytes, start: int) -> int:
        """Return the end of the object that begins at `start`, 0 while it is incomplete; `text` may have grown."""
        position = start + self._looked
        end = 0
        while not end:
            if self._is_in_string:
                inside = _IN_STRING.match(text, position)
                assert inside is not None, "it matches the empty text"
                position = inside.end()
                if text[position : position + 1] != b'"':
                    break
                position += 1
                self._is_in_string = False
            found = _STRUCTURE.search(text, position)
            if found is None:
                position = len(text)
                break
            position = found.end()
            if found[0] == b'"':
                self._is_in_string = True
            elif found[0] in b"{[":
                self._depth += 1
                if self._depth > DEEPEST_RECORD:
                    raise ConsulRefused("a record of a list is nested too deeply")
            else:
                self._depth -= 1
                end = position if self._depth <= 0 else 0
        self._looked = position - start
        return end


class Records:
    """The objects of one JSON array inside a body that comes in pieces of any size.

    `opening` finds the array, in a group, or null in its place; `closing` is what follows the array. Each
    record is yielded as it was sent. Raises `ConsulRefused` when the body is something else or ends early.
    The time is linear in the body, whatever it holds.
    """

    def __init__(self, opening: re.Pattern[bytes], closing: bytes = b"") -> None:
        self._opening = opening
        self._closing = closing
        self._rest = b""  # from the beginning of a record, or from the comma before it
        self._searched = 0
        self._misses = 0
        self._braces: _Braces | None = None
        self._is_at_comma = False
        self._is_open = False
        self._is_null = False
        self.head = b""  # what stands before the array, once a record was yielded or the end was reached

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the records that are complete with this piece; raises `ConsulRefused`."""
        self._rest += chunk
        if not self._is_null and (self._is_open or self._open()):
            start = yield from self._by_boundaries(0)
            while self._braces is not None and (end := self._braces.end_of(self._rest, start)):
                yield self._by_braces(start, end)
                start = yield from self._by_boundaries(end)
            self._rest = self._rest[start:]
            self._searched = max(self._searched - start, 0)
        if len(self._rest) > LONGEST_RECORD:
            raise ConsulRefused("a record of a list is too long")

    def finish(self) -> Iterator[bytes]:
        """Yield the last record, once the body has ended; raises `ConsulRefused`."""
        if not (self._is_open or self._is_null):
            raise ConsulRefused("the list is not what Consul sends")
        rest = self._rest.strip()
        if self._closing:
            if not rest.endswith(self._closing):
                raise ConsulRefused("the list ends too soon")
            rest = rest.removesuffix(self._closing).rstrip()
        if self._is_null:
            if rest:
                raise ConsulRefused("the list is not what Consul sends")
            return
        record = rest.removesuffix(b"]").strip()
        if not rest.endswith(b"]") or (record and (self._is_at_comma or not _is_whole(record))):
            raise ConsulRefused("the list ends too soon")
        if record:
            yield record

    def _by_boundaries(self, start: int) -> Generator[bytes, None, int]:
        """Yield records while boundaries tell where they end, the usual case; return where the next begins."""
        if self._is_at_comma:
            if (comma := _NEXT.match(self._rest, start)) is None:
                return start
            self._is_at_comma = False
            self._searched = start = comma.end()
        if self._braces is not None:
            return start
        for boundary in _BOUNDARY.finditer(self._rest, self._searched):
            end = boundary.start() + 1
            self._searched = boundary.end() - 1
            if _is_whole(record := self._rest[start:end]):
                yield record
                start = self._searched
                self._misses = 0
            else:
                self._misses += 1
                if self._misses > MOST_MISSES:
                    self._braces = _Braces()
                    return start
        # A boundary may be cut: it is looked for again from the last brace that may begin one.
        self._searched = max(self._searched, self._rest.rfind(b"}", start))
        if len(self._rest) - start > LONG_RECORD:
            self._braces = _Braces()
        return start

    def _by_braces(self, start: int, end: int) -> bytes:
        """Return the record that its braces end there, and go back to boundaries."""
        record = self._rest[start:end]
        if not _is_whole(record):
            raise ConsulRefused("the list is not what Consul sends")
        self._braces, self._is_at_comma, self._misses = None, True, 0
        return record

    def _open(self) -> bool:
        found = self._opening.search(self._rest)
        if found is None:
            if len(self._rest) > LONGEST_HEAD:
                raise ConsulRefused("the list is not what Consul sends")
            return False
        self.head = self._rest[: found.start()]
        self._rest = self._rest[found.end() :].lstrip()
        self._is_open, self._is_null = bool(found[1]), not found[1]
        return self._is_open


def _is_whole(text: bytes) -> bool:
    try:
        _raw.decode(text)
    except DECODE_ERRORS:
        return False
    return text.lstrip().startswith(b"{")


class RecordStream:
    """One read of one list; its index and marks are known once `records` has ended."""

    def __init__(
        self,
        client: ConsulClient,
        path: str,
        opening: re.Pattern[bytes],
        closing: bytes = b"",
        *,
        selection: str = "",
        scope: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._client = client
        self._path = path
        self._params = {**CONSISTENT, **scope, **({"filter": selection} if selection else {})}
        self._records = Records(opening, closing)
        self.index = 0  # of the state that the list shows
        self.is_filtered = False  # True if Consul says that it left something out

    @property
    def head(self) -> bytes:
        """The text before the list; known with its first record."""
        return self._records.head

    async def records(self) -> AsyncGenerator[bytes]:
        """Yield the records; raises a `ConsulError`, and then some records are missing."""
        count = 0
        async with self._client.stream(self._path, params=self._params) as answer:
            async for chunk in answer.chunks:
                for record in self._records.feed(chunk):
                    yield record
                    count += 1
                    if count % SLICE == 0:
                        await asyncio.sleep(0)
            for record in self._records.finish():
                yield record
            self.index = index_of(answer.headers)
            self.is_filtered = is_filtered(answer.headers)


class _Head(msgspec.Struct):
    """The text before the services of a node."""

    Node: NodeRecord | None


_head = msgspec.json.Decoder(_Head)


def list_services(
    client: ConsulClient,
    node: str,
    selection: str = "",
    scope: Mapping[str, str] = MappingProxyType({}),
) -> RecordStream:
    """Return the list of a node's services, not yet read; `selection` is a filter in Consul's language."""
    path = f"/v1/catalog/node-services/{quote(node, safe='')}"
    return RecordStream(client, path, NODE_SERVICES, b"}", selection=selection, scope=scope)


def list_instances(client: ConsulClient, name: str, selection: str) -> RecordStream:
    """Return the list of a service's instances on all nodes, not yet read."""
    return RecordStream(client, f"/v1/catalog/service/{quote(name, safe='')}", ARRAY, selection=selection)


def list_checks(
    client: ConsulClient, node: str, scope: Mapping[str, str] = MappingProxyType({})
) -> RecordStream:
    """Return the list of a node's checks, not yet read."""
    return RecordStream(client, f"/v1/health/node/{quote(node, safe='')}", ARRAY, scope=scope)


def scope_of_nodes(client: ConsulClient) -> dict[str, str]:
    """Return the parameters of a read of checks of whole nodes, in place of our own namespace."""
    return {"ns": NODES_NAMESPACE} if client.namespace else {}


async def is_node_empty(client: ConsulClient, node: str) -> bool:
    """Return True if no service and no check in any namespace is on a node; raises a `ConsulError`."""
    for scope in (EVERY_NAMESPACE, {}):
        try:
            return await _is_empty(client, node, scope)
        except ConsulRefused as refused:
            if refused.status != _NO_ENTERPRISE or not scope:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


async def _is_empty(client: ConsulClient, node: str, scope: Mapping[str, str]) -> bool:
    for listing in (list_services(client, node, scope=scope), list_checks(client, node, scope)):
        async with aclosing(listing.records()) as records:
            async for _ in records:
                return False
        if listing.is_filtered:
            return False
    return True


def node_of(listing: RecordStream) -> NodeRecord | None:
    """Return the node that a list of services is about, None for one that is missing or hidden."""
    return decode(
        _head, listing.head.rstrip().removesuffix(b",") + b"}", "the list of a node's services"
    ).Node


async def read_readiness(listing: RecordStream) -> dict[str, bool]:
    """Return the readiness that our own checks show, by service ID."""
    found = {}
    async for record in listing.records():
        try:
            check = _checks.decode(record)
        except DECODE_ERRORS:
            continue  # not a key of this project
        if check.is_readiness:
            found[check.service_id] = check.is_passing
    return found


def is_managed(service: Service) -> bool:
    """Return True if a registrar of this program wrote a service."""
    return service.value("managed_by") == MANAGED_BY


async def has_foreign_instance(
    client: ConsulClient, name: str, meta_keys: MetaKeys, is_of_a_registrar: Callable[[Service], bool]
) -> bool:
    """Return True if no registrar wrote an instance of this name, in any case of letters.

    Raises a `ConsulError`, and `ConsulFiltered` where Consul says that the token may not see all instances.
    Consul before 1.13 shows an empty list to a token that may not read the name.
    """
    listing = list_instances(client, name, NOT_MANAGED)
    async with aclosing(listing.records()) as records:
        async for record in records:
            if not is_of_a_registrar(meta_keys.decode(decode_instance(record))):
                return True
    if listing.is_filtered:
        raise ConsulFiltered(f"the token may not see all services of the name {name}")
    return False
