"""Reads a list of the catalog record by record as it arrives, so that its size costs neither memory nor a stall."""

import asyncio
import re
from collections.abc import AsyncGenerator
from urllib.parse import quote

import msgspec

from k8s_consul_registrar.consul.answers import index_of, is_filtered
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.records import ARRAY, NODE_SERVICES, Records
from k8s_consul_registrar.consul.txn_answer import CheckRecord, NodeRecord
from k8s_consul_registrar.errors import ConsulRefused

# So many records are handed out before the loop gets its turn.
SLICE = 200
# A leader that was just voted out may not know it yet; what decides over services asks the others first
# (Consul API, "Consistency modes").
CONSISTENT = {"consistent": ""}


class Listing:
    """One read of one list; what it says of itself is known once `records` came to its end."""

    def __init__(
        self,
        client: ConsulClient,
        path: str,
        opening: re.Pattern[bytes],
        closing: bytes = b"",
        selection: str = "",
    ) -> None:
        self._client = client
        self._path = path
        self._params = {**CONSISTENT, "filter": selection} if selection else CONSISTENT
        self._records = Records(opening, closing)
        self.index = 0  # of the state that the list shows
        self.is_filtered = False  # whether Consul says that it left something out

    @property
    def head(self) -> bytes:
        """What stands before the list; known with its first record."""
        return self._records.head

    async def records(self) -> AsyncGenerator[bytes]:
        """Yield the records; raises a `ConsulError`, and then what was yielded is not all."""
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
    """What stands before the services of a node."""

    Node: NodeRecord | None


def list_services(client: ConsulClient, node: str, selection: str = "") -> Listing:
    """Return the list of a node's services, not yet read; `selection` is a filter in Consul's language."""
    path = f"/v1/catalog/node-services/{quote(node, safe='')}"
    return Listing(client, path, NODE_SERVICES, b"}", selection)


def list_checks(client: ConsulClient, node: str) -> Listing:
    """Return the list of a node's checks, not yet read."""
    return Listing(client, f"/v1/health/node/{quote(node, safe='')}", ARRAY)


def node_of(listing: Listing) -> NodeRecord | None:
    """Return the node that a list of services is about, None for one that is missing or hidden."""
    try:
        return msgspec.json.decode(listing.head.rstrip().removesuffix(b",") + b"}", type=_Head).Node
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ConsulRefused("the list of a node's services is not what Consul sends") from None


async def read_readiness(listing: Listing) -> dict[str, bool]:
    """Return what the checks of our making say, by service ID."""
    found = {}
    async for record in listing.records():
        try:
            check = msgspec.json.decode(record, type=CheckRecord)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue  # not one of ours
        if check.is_readiness:
            found[check.service_id] = check.is_passing
    return found
