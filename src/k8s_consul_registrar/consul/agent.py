"""The registry of one Consul agent: services registered there belong to its node."""

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from urllib.parse import quote

from msgspec.structs import replace

from k8s_consul_registrar.consul.agent_node import AgentNode
from k8s_consul_registrar.consul.answers import is_filtered
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import decode_agent_services, decode_service, encode_registration
from k8s_consul_registrar.consul.meta_keys import MetaKeys
from k8s_consul_registrar.consul.parallel import Batch, for_each
from k8s_consul_registrar.errors import ConsulBusy, ConsulFiltered, ConsulForbidden, ConsulRefused
from k8s_consul_registrar.model import UNSYNCED, Disturbance, Service, Written

# An agent's throughput stops growing here: 32 in flight took 1,000 a second where 64 took no more.
CONCURRENCY = 32
# An agent that lost its services is noticed by asking for this many of those it held, of so many kept.
ASKED_AT_ONCE, SAMPLE = 4, 64
# The first parts of paths below /v1/agent/service/ that mean something else than an ID.
_TAKEN = ("register", "deregister", "maintenance")
# So many services are compared before the loop gets its turn.
SLICE = 200


class AgentRegistry:
    """Reads and writes the services of an agent (`/v1/agent/service*`).

    A service that the catalog does not show as the agent does, in two successive full reads, is yielded as
    `UNSYNCED`: an agent whose token for it was revoked still answers 200 and takes it for synced. So is each
    service after our own token changed, until it is registered again, because an agent keeps the token
    that a service was registered with and brings it into the catalog with that one.
    """

    checks_versions = False

    def __init__(
        self, client: ConsulClient, *, concurrency: int = CONCURRENCY, meta_keys: MetaKeys | None = None
    ) -> None:
        self._client = client
        self._concurrency = concurrency
        self._node = AgentNode(client)
        self._sample: deque[str] = deque(maxlen=SAMPLE)
        self._unlike: set[str] = set()  # IDs the catalog did not show alike at the last full read
        self._outdated: set[str] = set()  # IDs that were registered with a token of before
        self._token_version = 0
        self._meta_keys = meta_keys or MetaKeys()

    async def services(self) -> AsyncIterator[Service]:
        """Yield every service of the agent, whoever wrote it; raises a `ConsulError`."""
        await self._node.begin()
        answer = await self._client.request("GET", "/v1/agent/services")
        mirrored = await self._node.hashes()
        ids: list[str] = []
        unlike: set[str] = set()
        is_token_new = self._token_version != self._client.token_version
        for service in decode_agent_services(answer.body):
            ids.append(service.id)
            if is_token_new:
                self._outdated.add(service.id)
            if mirrored is not None and mirrored.get(service.id) != hash(service):
                unlike.add(service.id)
            is_unlike_again = service.id in unlike and service.id in self._unlike
            is_unsynced = is_unlike_again or service.id in self._outdated
            shown = self._meta_keys.decode(service)
            yield replace(shown, index=UNSYNCED) if is_unsynced else shown
            if len(ids) % SLICE == 0:
                await asyncio.sleep(0)
        if not ids and is_filtered(answer.headers):
            raise ConsulFiltered("the token may not see the agent's services")
        self._token_version = self._client.token_version
        self._unlike = unlike
        self._outdated.intersection_update(ids)
        # Python's hashes differ from process to process, so the least of them are as good a sample as any.
        self._sample = deque(heapq.nsmallest(SAMPLE, filter(can_be_named, ids), key=hash), SAMPLE)

    async def lookup(self, ids: Sequence[str]) -> AsyncIterator[Service]:
        """Yield those of these services that the agent holds and can be asked for; raises a `ConsulError`."""
        ids = [service_id for service_id in ids if can_be_named(service_id)]
        found: list[Service] = []

        async def read(service_id: str) -> None:
            if (service := await self._read(service_id)) is not None:
                found.append(self._meta_keys.decode(service))

        await for_each(ids, read, min(self._concurrency, len(ids)))
        for service in found:
            yield service

    async def register(self, services: Iterable[Service]) -> Written:
        """Register services, over what is there under the same ID, keeping its checks.

        What could never be deregistered again is refused.
        """

        async def put(service: Service) -> None:
            if not can_be_named(service.id):
                raise ConsulRefused(f"no path of an agent leads to the ID {service.id!r}", 400)
            body = encode_registration(self._meta_keys.encode(service))
            await self._client.request("PUT", "/v1/agent/service/register", body=body)

        taken: set[str] = set()

        def noted() -> Iterator[Service]:
            for service in services:
                taken.add(service.id)
                yield service

        written = await self._each(noted(), put)
        done = taken.difference(one.id for one in written.failures)
        self._unlike -= done
        self._outdated -= done
        self._sample.extend(list(done)[: SAMPLE - len(self._sample)])
        return written

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Deregister services by ID; one that is not there counts as done."""

        async def remove(service: Service) -> None:
            path = f"/v1/agent/service/deregister/{quote(service.id, safe='')}"
            try:
                await self._client.request("PUT", path)
            except (ConsulRefused, ConsulBusy) as refused:
                # An unknown service is 404 from 1.11 on; with ACLs 1.8 says 500, without them 200.
                if "unknown service" not in str(refused).lower():
                    raise

        gone = {service.id for service in services}
        self._sample = deque((one for one in self._sample if one not in gone), SAMPLE)
        return await self._each(services, remove)

    async def disturbance(self) -> Disturbance:
        """Return whether the agent lost what it held, or its node changed otherwise; raises a `ConsulError`.

        An agent that restarted empty lacks whatever it is asked for, so a few services are enough.
        """
        asked = min(ASKED_AT_ONCE, len(self._sample))
        missing = 0
        for _ in range(asked):
            self._sample.rotate()
            missing += await self._read(self._sample[0]) is None
        if missing:
            return Disturbance.EMPTIED if missing == asked else Disturbance.CHANGED
        return Disturbance.CHANGED if await self._node.is_disturbed() else Disturbance.NONE

    async def lost_shards(self) -> Mapping[str, str]:
        """Return the shard path of each service that the catalog shows for the agent's node, by ID.

        A fresh agent removes them there as soon as it has joined. None where the token may not look: new
        shards are better than no services. Raises a `ConsulError` when Consul cannot be used.
        """
        try:
            return await self._node.shards(self._meta_keys.wire("shard_path"))
        except (ConsulForbidden, ConsulRefused):
            return {}

    async def _read(self, service_id: str) -> Service | None:
        path = f"/v1/agent/service/{quote(service_id, safe='')}"
        try:
            answer = await self._client.request("GET", path)
        except ConsulRefused as refused:
            # Any other 404 would be from something between that does not pass the path on.
            if refused.status == 404 and "unknown service id" in str(refused).lower():
                return None
            raise
        return decode_service(service_id, answer.body)

    async def _each(
        self, services: Iterable[Service], write: Callable[[Service], Awaitable[None]]
    ) -> Written:
        """Write each service with bounded concurrency; one that is refused does not hold up the rest."""
        batch = Batch(write)
        with self._node.writing():
            await for_each(services, batch.write, self._concurrency)
        return Written(batch.done, tuple(batch.failures))


def can_be_named(service_id: str) -> bool:
    """Whether a path of an agent's API leads to a service of this ID; registering knows no such limits.

    Consul refuses paths with what cannot be printed and redirects from those that its router would write
    otherwise, such as `a//b` (agent/http.go, PrintablePathCheckHandler; Go, http.ServeMux).
    """
    *leading, last = service_id.split("/")
    is_clean = "" not in leading and not {".", ".."} & {*leading, last}
    return is_clean and service_id.isprintable() and (leading or [last])[0] not in _TAKEN
