"""The two kinds of pass: over all that Consul holds, and over what changed alone."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Container, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from k8s_consul_registrar.model import Written
from k8s_consul_registrar.registrar.brake import BrakeRules, Memory
from k8s_consul_registrar.registrar.ledger import Entry, Ledger
from k8s_consul_registrar.registrar.naming import comparable_name, is_of_a_registrar
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.planner import Planner
from k8s_consul_registrar.registrar.ports import Cluster, Registry
from k8s_consul_registrar.registrar.report import Reporter
from k8s_consul_registrar.registrar.status import PassReport
from k8s_consul_registrar.registrar.writing import Writing
from k8s_consul_registrar.targets.sharding import Shards
from k8s_consul_registrar.targets.wanted import Wanted

# After so many services a pass lets the loop turn, so that health checks and events are served meanwhile.
SLICE = 250


class Passes:
    """Reads, plans and writes, and keeps the ledger of what Consul holds; each raises a `ConsulError`."""

    def __init__(
        self,
        *,
        cluster: Cluster,
        registry: Registry,
        identity: Identity,
        shards: Shards,
        rules: BrakeRules,
        reporter: Reporter,
    ) -> None:
        self._cluster = cluster
        self._registry = registry
        self._identity = identity
        self._shards = shards
        self._rules = rules
        self._reporter = reporter
        self._memory: Memory = {}
        self._ledger = Ledger()
        # What a pass took in but did not get through.
        self._pending: set[str] = set()
        self._writing = Writing(registry, identity, reporter)
        # What changed while a full pass reads Consul, and was written meanwhile; None while none reads.
        self._overtaken: set[str] | None = None
        self._had_full_pass = False
        self._readings = 0
        self._lost_shards: dict[str, str] = {}
        self._taken_names: set[str] = set()
        # What the last full read of Consul took, in seconds, without the writes that followed it.
        self.read_seconds = 0.0

    @property
    def has_refused(self) -> bool:
        """Whether Consul refused single writes that are still owed."""
        return bool(self._writing.refused)

    @property
    def is_complete(self) -> bool:
        """Whether everything was compared once, and Consul refused nothing that is still owed."""
        return self._had_full_pass and not self._writing.refused and not self._pending

    def entry(self, service_id: str) -> Entry | None:
        """Return what is known to stand in Consul under an ID."""
        return self._ledger.get(service_id)

    @property
    def registered(self) -> int:
        """How many services of ours are known to stand in Consul, asked for by the cluster."""
        return len(self._ledger)

    def unclaimed(self, claimed: Container[str]) -> Iterator[Entry]:
        """Yield what stands in Consul though nobody in `claimed` asks for it: it may not go yet."""
        return self._ledger.unclaimed(claimed)

    def shard(self, service_id: str) -> str:
        """Return the shard a service has or had in Consul, empty where that is not known."""
        return self._recall(service_id)

    @property
    def generation(self) -> int:
        """A number that is another one whenever `entry` or `shard` may tell anything else."""
        return self._readings + self._ledger.generation

    async def learn(self) -> None:
        """Read which IDs stand in Consul, so that what is free can be registered while lists still stream."""
        ledger = Ledger()
        count = 0
        async for service in self._registry.services():
            ledger.doubt(service.id, service.value("shard_path"))
            if not is_of_a_registrar(service):
                self._taken_names.add(comparable_name(service.name))
            count += 1
            if count % SLICE == 0:
                await asyncio.sleep(0)
        for service_id, shard in (await self._registry.lost_shards()).items():
            self._lost_shards.setdefault(service_id, shard)
        self._readings += self._ledger.generation + 1
        self._ledger = ledger
        # What was heard before somebody else led is his to write.
        self._reporter.owes(frozenset())

    def look(self) -> None:
        """Show how well the cluster is known where no pass can; what changed meanwhile is still to be done."""
        wanted = self._cluster.changes()
        self._pending.update(wanted.claims)
        self._reporter.sources(wanted)

    async def full(self, follow: Callable[[], Awaitable[None]] | None = None) -> PassReport:
        """Compare everything the cluster wants with everything Consul holds, and write what differs.

        What changes while Consul is read does not wait for the end: `follow` makes a pass over it. This one
        then leaves it alone, since what was read of it is older, and `follow` looks at it once more.
        """
        wanted = self._cluster.wanted()
        self._reporter.begins(wanted)
        planner = Planner(wanted, self._identity, self._shards, self._recall, find=self._ledger.get)
        ledger = Ledger()
        started = time.monotonic()
        overtaken = await self._read(planner, ledger, follow)
        self.read_seconds = time.monotonic() - started
        planner.leave(overtaken)
        ledger.take_over(self._ledger, overtaken)
        await _run(planner.complete())
        held, memory = planner.brake(self._rules, self._memory)
        plan = planner.plan(held, memory)
        self._reporter.planned(plan)
        self._readings += self._ledger.generation + 1
        self._ledger = ledger
        self._pending.clear()
        self._writing.refused.clear()
        report = await self._writing.apply(plan, self._ledger)
        report = replace(report, rejected=len(wanted.rejections) + len(plan.rejections))
        self._memory = memory
        self._had_full_pass = True
        self._lost_shards.clear()
        self._taken_names = set(planner.taken_names)
        for one in held:
            self._cluster.relist(one.source, one.due)
        if not report.refused:
            self._cluster.settled(wanted.departed - plan.kept_objects)
        self._reporter.owes(self._writing.refused)
        self._reporter.passed_over_all(wanted, report)
        if overtaken and follow is not None:
            self._pending |= overtaken
            await follow()
        return report

    async def _read(
        self, planner: Planner, ledger: Ledger, follow: Callable[[], Awaitable[None]] | None
    ) -> AbstractSet[str]:
        """Have everything that Consul holds considered, and return the IDs that were written meanwhile."""
        reading = asyncio.create_task(self._consider_all(planner, ledger))
        overtaken = self._overtaken = set[str]()
        try:
            # Before the first comparison what stands under an ID is not known, so nothing may overtake it.
            if follow is not None and self._had_full_pass:
                while await self._has_changed_during(reading):
                    await follow()
            await reading
            return overtaken
        finally:
            self._overtaken = None
            reading.cancel()
            await asyncio.wait({reading})

    async def _has_changed_during(self, reading: asyncio.Task[None]) -> bool:
        """Wait until something changed, or until the reading is over."""
        changed = asyncio.create_task(self._cluster.changed())
        try:
            await asyncio.wait({reading, changed}, return_when=asyncio.FIRST_COMPLETED)
            return not reading.done()
        finally:
            changed.cancel()

    async def _consider_all(self, planner: Planner, ledger: Ledger) -> None:
        count = 0
        async for service in self._registry.services():
            entry = planner.consider(service)
            if entry is None:
                ledger.doubt(service.id, service.value("shard_path"))
                if (known := self._ledger.find(service.id)) is not None:
                    ledger.keep(known)
            else:
                ledger.note(entry)
            count += 1
            if count % SLICE == 0:
                await asyncio.sleep(0)

    async def partial(self, *, retries_refused: bool = False) -> PassReport:
        """Plan and write what changed since the last pass: its cost follows the changes, not the cluster."""
        if retries_refused:
            self._pending |= self._writing.refused
            self._writing.refused.clear()
        first = Written() if self._had_full_pass else await self._register_missing()
        wanted = self._cluster.changes(frozenset(self._pending))
        self._reporter.begins(wanted)
        self._pending.update(wanted.claims)
        if self._overtaken is not None:
            self._overtaken.update(wanted.claims)
        planner = self._planner(wanted)
        unknown: list[str] = []
        for service_id in wanted.claims:
            entry = self._ledger.get(service_id)
            if entry is not None and self._registry.checks_versions:
                planner.consider(entry.service(self._identity))
            elif self._ledger.is_uncertain(service_id) or not self._registry.checks_versions:
                # A write that checks no version must not go over what came under the ID meanwhile.
                unknown.append(service_id)
        await self._look_up(unknown, planner)
        await _run(planner.complete())
        plan = planner.plan()
        report = await self._writing.apply(plan, self._ledger)
        self._pending.clear()
        if self._overtaken is None:
            self._reporter.owes(self._writing.refused)
            if not self._writing.refused and self._had_full_pass:
                self._cluster.settled(wanted.departed - plan.kept_objects)
        self._reporter.passed_over_changes(wanted, plan)
        return replace(
            report,
            registered=first.done + report.registered,
            refused=len(first.failures) + len(first.stale) + report.refused,
        )

    async def _register_missing(self) -> Written:
        """Register what Consul is known to lack, and what the cluster adds meanwhile: all else stays pending."""
        left: set[str] = set()
        written = await self._writing.register("register", self._missing(left), self._ledger)
        self._pending = left
        return written

    def _missing(self, left: set[str]) -> Iterator[Entry]:
        """Plan what Consul is known to lack, each entry when it is asked for; what must wait goes to `left`.

        So the writes begin with the first object of a list and go on while the others arrive, until a full pass
        is due. An ID is taken once: what becomes of it meanwhile must wait until it is known to stand in Consul.
        """
        taken: set[str] = set()
        is_last = self._cluster.needs_full_pass()
        wanted = self._cluster.changes(frozenset(self._pending))
        while wanted.claims:
            self._reporter.begins(wanted)
            self._pending.update(wanted.claims)
            waiting = {one for one in wanted.claims if one in taken or not self._ledger.is_free(one)}
            left |= waiting
            taken.update(wanted.claims)
            planner = self._planner(wanted)
            planner.leave(waiting)
            yield from filter(None, planner.complete())
            self._reporter.passed_over_changes(wanted, planner.plan())
            if is_last:
                return
            is_last = self._cluster.needs_full_pass()
            wanted = self._cluster.changes()

    def _planner(self, wanted: Wanted) -> Planner:
        return Planner(
            wanted, self._identity, self._shards, self._recall, self._taken_names, find=self._ledger.get
        )

    def _recall(self, service_id: str) -> str:
        """Return the shard of a service that Consul held, though it may hold it no more."""
        return self._ledger.shard(service_id) or self._lost_shards.get(service_id, "")

    async def _look_up(self, ids: Sequence[str], planner: Planner) -> None:
        """Have the planner consider what stands under these IDs; before the first full pass, leave them."""
        if not self._had_full_pass:
            planner.leave({service_id for service_id in ids if self._ledger.is_uncertain(service_id)})
            return
        if ids:
            async for service in self._registry.lookup(ids):
                planner.consider(service)


async def _run(steps: Iterator[object]) -> None:
    """Run through the steps, letting the loop turn now and then."""
    for number, _ in enumerate(steps, start=1):
        if number % SLICE == 0:
            await asyncio.sleep(0)
