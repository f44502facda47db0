"""The registry of one Consul agent: services registered there belong to its node."""

import asyncio
import heapq
import math
import time
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import islice
from urllib.parse import quote

from msgspec.structs import replace

from k8s_consul_registrar.consul.acl import AgentSelf, read_agents, read_own_node
from k8s_consul_registrar.consul.batches import Blame, Outcomes, for_each, write_each
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import (
    MetaKeys,
    decode_agent_services,
    decode_listed,
    decode_service,
    encode_registration,
)
from k8s_consul_registrar.consul.drift import NodeDrift
from k8s_consul_registrar.consul.health import is_filtered, is_outage
from k8s_consul_registrar.consul.records import has_foreign_instance, is_managed, list_services, node_of
from k8s_consul_registrar.errors import (
    ConsulError,
    ConsulFiltered,
    ConsulForbidden,
    ConsulRefused,
    ConsulTokenUnknown,
    ConsulUnreachable,
    NotConsul,
)
from k8s_consul_registrar.model import UNSYNCED, Drift, Service, Written
from k8s_consul_registrar.telemetry import get_logger

# An agent's throughput stops growing here: 32 in flight took 1,000 a second where 64 took no more.
CONCURRENCY = 32
# An agent that lost its services is noticed by asking for this many of a sample of this size.
ASKED_AT_ONCE, SAMPLE = 4, 64
SLICE = 25  # services compared before the loop gets its turn
# Deregistered IDs that are remembered between two looks at what the agent left in the catalog.
MOST_REMEMBERED = 20_000
# The first parts of paths below /v1/agent/service/ that are no IDs.
_TAKEN = ("register", "deregister", "maintenance")
# An agent takes this many seconds to bring a change into the catalog.
SYNC_TIME = 5.0

log = get_logger("consul")


class AgentTraffic:
    """The services that this process registers at the agent and removes.

    A registration waits while the catalog's record of its ID is removed, and the record of an ID that is being
    registered is not removed: the agent would copy the service there before the removal arrives.
    """

    def __init__(self) -> None:
        self._registering: set[str] = set()
        self._removing: dict[str, asyncio.Event] = {}
        self._deregistered: dict[str, float] = {}  # when, in monotonic seconds
        self.deregistered_at = -math.inf  # the latest of them
        self.on_deregistered: Callable[[float], None] = lambda _: None

    @asynccontextmanager
    async def registering(self, service_id: str) -> AsyncIterator[None]:
        """Surround a registration at the agent."""
        while (removal := self._removing.get(service_id)) is not None:
            await removal.wait()
        self._registering.add(service_id)
        self._deregistered.pop(service_id, None)
        try:
            yield
        finally:
            self._registering.discard(service_id)

    @contextmanager
    def removing(self, ids: Iterable[str]) -> Iterator[frozenset[str]]:
        """Surround a removal from the catalog; yields those of these IDs that may be removed."""
        going = frozenset(one for one in ids if one not in self._registering and can_be_named(one))
        is_over = asyncio.Event()
        self._removing.update(dict.fromkeys(going, is_over))
        try:
            yield going
        finally:
            for service_id in going:
                self._removing.pop(service_id, None)
            is_over.set()

    def deregistered(self, ids: Collection[str]) -> None:
        """Note services that the agent says it has deregistered."""
        now = time.monotonic()
        for service_id in ids:
            self._deregistered[service_id] = self.deregistered_at = now
        if ids:
            self.on_deregistered(now)
        while len(self._deregistered) > MOST_REMEMBERED:
            del self._deregistered[next(iter(self._deregistered))]

    def forget(self, before: float, kept: Container[str]) -> frozenset[str]:
        """Forget deregistrations before a moment, except for some IDs; return those of the IDs that were deregistered."""
        self._deregistered = {
            one: at for one, at in self._deregistered.items() if at >= before or one in kept
        }
        return frozenset(one for one in self._deregistered if one in kept)


class AgentRegistry:
    """Reads and writes the services of an agent (`/v1/agent/service*`).

    A service that the catalog does not show as the agent does, in two successive full reads, is yielded as
    `UNSYNCED`: an agent whose token for it was revoked still answers 200 and takes it for synced. So is each
    service after our own token changed, until it is registered again, because an agent keeps the token
    that a service was registered with and brings it into the catalog with that one.
    """

    checks_versions = is_filtered = False  # others' services often are: each write looks first
    batch_size = 1

    def __init__(
        self,
        client: ConsulClient,
        *,
        concurrency: int = CONCURRENCY,
        meta_keys: MetaKeys | None = None,
        is_of_a_registrar: Callable[[Service], bool] = is_managed,
    ) -> None:
        self.concurrency = concurrency
        self.client = client
        self._is_of_a_registrar = is_of_a_registrar
        self._node = _AgentNode(client)
        self._blame = Blame()
        self._sample: deque[str] = deque(maxlen=SAMPLE)
        self._removed: set[str] | None = None  # IDs deregistered during the full read under way
        self._unlike: set[str] = set()  # IDs the catalog did not show alike at the last full read
        self._outdated: set[str] = set()  # IDs that were registered with a token of before
        self._token_version = 0
        self.meta_keys = meta_keys or MetaKeys()
        self.traffic = AgentTraffic()
        # Told at each full read which agents answer.
        self.on_agents: Callable[[Sequence[AgentSelf]], None] = lambda _: None

    async def services(self) -> AsyncIterator[Service]:
        """Yield every service of the agent, whatever wrote it; raises a `ConsulError`."""
        await self._node.begin(self.on_agents)
        removed = self._removed = set()
        answer = await self.client.request("GET", "/v1/agent/services")
        mirrored = await self._node.hashes()
        ids: list[str] = []
        unlike: set[str] = set()
        is_token_new = self._token_version != self.client.token_version
        for service in decode_agent_services(answer.body):
            ids.append(service.id)
            if is_token_new:
                self._outdated.add(service.id)
            if mirrored is not None and mirrored.get(service.id) != hash(service):
                unlike.add(service.id)
            is_unlike_again = service.id in unlike and service.id in self._unlike
            is_unsynced = is_unlike_again or service.id in self._outdated
            shown = self.meta_keys.decode(service)
            yield replace(shown, index=UNSYNCED) if is_unsynced else shown
            if len(ids) % SLICE == 0:
                await asyncio.sleep(0)
        if not ids and is_filtered(answer.headers):
            raise ConsulFiltered("the token may not see the agent's services")
        self._token_version = self.client.token_version
        self._unlike = unlike
        self._outdated.intersection_update(ids)
        # Python's hashes differ from process to process, so the least of them are as good a sample as any.
        named = (one for one in ids if can_be_named(one) and one not in removed)
        self._sample = deque(heapq.nsmallest(SAMPLE, named, key=hash), SAMPLE)
        self._removed = None

    async def lookup(self, ids: Sequence[str]) -> AsyncIterator[Service]:
        """Yield those of these services that the agent holds and can be asked for; raises a `ConsulError`.

        Raises `ConsulFiltered` for one that exists and that the token may not see.
        """
        found: list[Service] = []

        async def read(service_id: str) -> None:
            if (service := await read_agent_service(self.client, service_id)) is not None:
                found.append(self.meta_keys.decode(service))

        limit = self.client.health.concurrency(self.concurrency)
        await for_each(filter(can_be_named, ids), read, limit)
        for service in found:
            yield service

    async def register(self, services: Sequence[Service]) -> Written:
        """Register services, over what is there under the same ID, keeping its checks.

        A service that could never be deregistered again is refused.
        """

        async def put(service: Service) -> None:
            if not can_be_named(service.id):
                raise ConsulRefused(f"no path of an agent leads to the ID {service.id!r}", 400)
            body = encode_registration(self.meta_keys.encode(service))
            async with self.traffic.registering(service.id):
                await self.client.request("PUT", "/v1/agent/service/register", body=body)

        outcomes = await self._each(services, put)
        self._unlike.difference_update(outcomes.done)
        self._outdated.difference_update(outcomes.done)
        self._sample.extend(outcomes.done[: SAMPLE - len(self._sample)])
        return outcomes.written()

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Deregister services by ID; one that is not there counts as done."""

        async def remove(service: Service) -> None:
            path = f"/v1/agent/service/deregister/{quote(service.id, safe='')}"
            # An unknown service is 404 from 1.11 on; with ACLs 1.8 says 500, without them 200.
            await self.client.request("PUT", path, accepts_text="unknown service")

        gone = {service.id for service in services}
        if self._removed is not None:
            self._removed |= gone
        self._sample = deque((one for one in self._sample if one not in gone), SAMPLE)
        outcomes = await self._each(services, remove)
        self.traffic.deregistered(outcomes.done)
        return outcomes.written()

    async def drift(self) -> Drift:
        """Return whether the agent lost its services, or its node changed otherwise; raises a `ConsulError`.

        An agent that restarted empty lacks whatever it is asked for, so a few services are enough.
        """
        self._sample.rotate(ASKED_AT_ONCE)
        asked = missing = 0
        for service_id in tuple(islice(self._sample, ASKED_AT_ONCE)):
            is_missing = False
            with suppress(ConsulFiltered):
                is_missing = await read_agent_service(self.client, service_id) is None
            if service_id in self._sample:  # it may have been deregistered meanwhile
                asked += 1
                missing += is_missing
        if missing:
            return Drift.EMPTIED if missing == asked else Drift.CHANGED
        return Drift.CHANGED if await self._node.has_drifted() else Drift.NONE

    async def lost_shards(self) -> Mapping[str, str]:
        """Return the shard path of each service that the catalog shows for the agent's node, by ID.

        A fresh agent removes them there as soon as it has joined. None where the token may not look: new
        shards are better than no services. Raises a `ConsulError` when Consul cannot be used.
        """
        try:
            return await self._node.shards(self.meta_keys.wire("shard_path"))
        except ConsulTokenUnknown:
            raise
        except (ConsulForbidden, ConsulRefused):
            return {}

    async def is_name_taken(self, name: str) -> bool:
        """Return whether an instance on any node has this name and no registrar wrote it.

        Raises a `ConsulError`: `ConsulForbidden` or `ConsulFiltered` where the token may not see them. Consul
        before 1.13 says nothing and shows an empty list.
        """
        return await has_foreign_instance(self.client, name, self.meta_keys, self._is_of_a_registrar)

    async def _each(
        self, services: Sequence[Service], write: Callable[[Service], Awaitable[None]]
    ) -> Outcomes:
        """Write each service with bounded concurrency; one that is refused does not hold up the rest."""
        outcomes = Outcomes(self.client.health, self._blame)
        with self._node.writing():
            await write_each(services, write, outcomes, self.client.health.concurrency(self.concurrency))
        return outcomes


class _AgentNode:
    """The node of the agent that a client talks to.

    A catalog that cannot be read costs a warning and what only it knows, nothing else: the token of an
    agent's registrar may be allowed to use the agent only.
    """

    def __init__(self, client: ConsulClient) -> None:
        self._client = client
        self._drift = NodeDrift(client, settle=SYNC_TIME)
        self._name = ""
        self._is_readable = True

    async def begin(self, on_agents: Callable[[Sequence[AgentSelf]], None]) -> None:
        """Watch the node, before a full read of the agent, and tell which agents answer; `NotConsul` if none does."""
        try:
            agents = await read_agents(self._client)
            on_agents(agents)
            self._name = agents[-1].node
            await self._drift.begin(self._name)
        except NotConsul:
            raise
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
        self._name = self._name or await read_own_node(self._client)
        return {one.id: shard async for one in self._services() if (shard := one.value(key))}

    async def has_drifted(self) -> bool:
        """Return whether others changed the node since `hashes`; False where the catalog cannot be read."""
        try:
            return await self._drift.has_drifted()
        except ConsulError as error:
            if not is_outage(error):
                self._unreadable(error)
            return False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Surround our own write to the agent."""
        with self._drift.writing():
            try:
                yield
            finally:
                self._drift.wrote(0)

    async def _services(self) -> AsyncIterator[Service]:
        listing = list_services(self._client, self._name)
        async for record in listing.records():
            yield decode_listed(record)
        # An agent that has joined is always there, so one that is not shown is hidden.
        if node_of(listing) is None:
            raise ConsulFiltered(f"the catalog does not show the agent's node {self._name} to this token")
        self._drift.read(listing.index)

    def _unreadable(self, problem: ConsulError) -> None:
        self._name = ""
        self._drift.stop()
        if isinstance(problem, ConsulUnreachable):
            return  # The agent itself does not answer, which is more than a catalog that cannot be read.
        if self._is_readable:
            log.warning(
                "the catalog's view of the agent cannot be read, so the agent's word is taken",
                problem=str(problem),
            )
        self._is_readable = False


async def read_agent_service(client: ConsulClient, service_id: str) -> Service | None:
    """Return the service that the agent holds under an ID, None if there is none; raises a `ConsulError`.

    Raises `ConsulFiltered` for one that exists and that the token may not see.
    """
    path = f"/v1/agent/service/{quote(service_id, safe='')}"
    try:
        # Any other 404 comes from a proxy in between that does not pass the path on.
        answer = await client.request("GET", path, accepts_text="unknown service id")
    except ConsulTokenUnknown:
        raise
    except ConsulForbidden as error:
        # There is such a service, and it concerns this ID only; an ID that is not there is 404.
        raise ConsulFiltered(f"the token may not see the service {service_id}") from error
    return decode_service(service_id, answer.body) if answer.status == 200 else None


def can_be_named(service_id: str) -> bool:
    """Return True if a path of an agent's API leads to a service of this ID; registering has no such limits.

    Consul refuses paths with what cannot be printed and redirects from those that its router would write
    otherwise, such as `a//b` (agent/http.go, PrintablePathCheckHandler; Go, http.ServeMux).
    """
    *leading, last = service_id.split("/")
    is_clean = "" not in leading and not {".", ".."} & {*leading, last}
    return is_clean and service_id.isprintable() and (leading or [last])[0] not in _TAKEN
