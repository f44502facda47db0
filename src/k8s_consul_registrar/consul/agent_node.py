"""What the catalog shows of an agent's own node, which the agent keeps equal to what it holds."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import msgspec

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import decode_listed
from k8s_consul_registrar.consul.listing import list_services, node_of
from k8s_consul_registrar.consul.watch import NodeWatch
from k8s_consul_registrar.errors import ConsulError, ConsulFiltered, ConsulRefused
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.telemetry import get_logger

# An agent takes a while to bring what it was told into the catalog, in seconds.
SYNC_TIME = 5.0

log = get_logger("consul")


class _Config(msgspec.Struct, rename="pascal"):
    node_name: str


class _Self(msgspec.Struct, rename="pascal"):
    config: _Config


class AgentNode:
    """The node of the agent that a client talks to.

    A catalog that cannot be read costs a warning and what only it knows, nothing else: the token of an
    agent's registrar may be allowed the agent alone.
    """

    def __init__(self, client: ConsulClient) -> None:
        self._client = client
        self._watch = NodeWatch(client, settle=SYNC_TIME)
        self._name = ""
        self._is_readable = True

    async def begin(self) -> None:
        """Watch the node from now on, before a full read of the agent."""
        try:
            self._name = await self._read_name()
            await self._watch.begin(self._name)
        except ConsulError as error:
            self._unreadable(error)

    async def hashes(self) -> dict[str, int] | None:
        """Return the hash of each service that the catalog shows, None when it cannot be read."""
        if not self._name:
            return None
        try:
            hashes = {service.id: hash(service) async for service in self._services()}
        except ConsulError as error:
            self._unreadable(error)
            return None
        if not self._is_readable:
            self._is_readable = True
            log.info("the catalog's view of the agent is read again")
        return hashes

    async def shards(self, key: str) -> dict[str, str]:
        """Return the shard path of each service that has one under this key of meta, by ID.

        Raises a `ConsulError`.
        """
        self._name = self._name or await self._read_name()
        return {one.id: shard async for one in self._services() if (shard := one.value(key))}

    async def is_disturbed(self) -> bool:
        """Whether the node changed, not by us, since `hashes`; False where the catalog cannot be read."""
        try:
            return await self._watch.is_disturbed()
        except ConsulError as error:
            self._unreadable(error)
            return False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Surround a write of ours to the agent."""
        with self._watch.writing():
            try:
                yield
            finally:
                self._watch.wrote(0)

    async def _read_name(self) -> str:
        answer = await self._client.request("GET", "/v1/agent/self")
        try:
            return msgspec.json.decode(answer.body, type=_Self).config.node_name
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConsulRefused(f"/v1/agent/self is not what Consul sends: {error}") from None

    async def _services(self) -> AsyncIterator[Service]:
        listing = list_services(self._client, self._name)
        async for record in listing.records():
            yield decode_listed(record)
        # An agent that has joined is always there, so one that is not shown is hidden.
        if node_of(listing) is None:
            raise ConsulFiltered(f"the catalog does not show the agent's node {self._name} to this token")
        self._watch.read(listing.index)

    def _unreadable(self, problem: ConsulError) -> None:
        self._name = ""
        self._watch.stop()
        if self._is_readable:
            log.warning(
                "the catalog's view of the agent cannot be read, so the agent's word is taken",
                problem=str(problem),
            )
        self._is_readable = False
