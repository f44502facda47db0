"""Writes a plan to Consul and notes in the ledger what became of it."""

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain

from k8s_consul_registrar.errors import ConsulError
from k8s_consul_registrar.model import Service, WriteFailure, Written
from k8s_consul_registrar.registrar.ledger import Entry, Ledger
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.pace import batch_of
from k8s_consul_registrar.registrar.plan import Plan
from k8s_consul_registrar.registrar.ports import Registry
from k8s_consul_registrar.registrar.report import Reporter
from k8s_consul_registrar.registrar.status import PassReport


class Writing:
    """The writes of all passes; `refused` are the IDs that Consul refused one by one, owed until they succeed."""

    def __init__(self, registry: Registry, identity: Identity, reporter: Reporter) -> None:
        self._registry = registry
        self._identity = identity
        self._reporter = reporter
        self.refused: set[str] = set()

    async def apply(self, plan: Plan, ledger: Ledger) -> PassReport:
        """Write a plan, registers before deregisters; raises a `ConsulError`, and all of the plan is in doubt then."""
        try:
            registered = await self.register("register", plan.register, ledger)
            updated = await self.register("update", plan.update, ledger)
            deregistered = await self._deregister(plan.deregister, ledger)
        except ConsulError:
            # What was not under way yet keeps the shard it had.
            for entry in (*plan.register, *plan.update):
                ledger.doubt(entry.id, entry.shard)
            for service in plan.deregister:
                ledger.doubt(service.id)
            raise
        every = (registered, updated, deregistered)
        return PassReport(
            registered=registered.done,
            updated=updated.done,
            deregistered=deregistered.done,
            unchanged=plan.unchanged,
            refused=sum(len(one.failures) + len(one.stale) for one in every),
            conflicts=plan.conflicts,
            rejections=plan.rejections,
            held=plan.held,
            kept=plan.kept.total(),
        )

    async def register(self, verb: str, entries: Iterable[Entry], ledger: Ledger) -> Written:
        """Write entries, each taken only when Consul is ready for it; what came of them, without their indexes.

        Raises a `ConsulError`, and what was under way then is in doubt.
        """
        done = 0
        failures: list[WriteFailure] = []
        stale: list[str] = []
        coming = iter(entries)
        for first in coming:
            written = await self._register_batch(verb, chain((first,), coming), ledger)
            done += written.done
            failures.extend(written.failures)
            stale.extend(written.stale)
        return Written(done, tuple(failures), stale=tuple(stale))

    async def _register_batch(self, verb: str, coming: Iterator[Entry], ledger: Ledger) -> Written:
        taken: list[Entry] = []

        def services() -> Iterator[Service]:
            for entry in batch_of(coming):
                taken.append(entry)
                yield entry.service(self._identity)

        try:
            written = await self._registry.register(services())
        except ConsulError:
            for entry in taken:
                ledger.doubt(entry.id, entry.shard)
            raise
        missed = _missed(written)
        for entry in taken:
            if entry.id in missed:
                ledger.doubt(entry.id, entry.shard)
                self.refused.add(entry.id)
            else:
                self.refused.discard(entry.id)
                ledger.note(entry.at(written.indexes.get(entry.id, 0)))
        self._reporter.wrote(verb, [entry.target for entry in taken], written)
        return written

    async def _deregister(self, services: Sequence[Service], ledger: Ledger) -> Written:
        if not services:
            return Written()
        written = await self._registry.deregister(services)
        missed = _missed(written)
        for service in services:
            if service.id in missed:
                ledger.doubt(service.id)
                self.refused.add(service.id)
            else:
                self.refused.discard(service.id)
                ledger.forget(service.id)
        self._reporter.wrote("deregister", services, written)
        return written


def _missed(written: Written) -> AbstractSet[str]:
    """Return the IDs that were not written."""
    return {failure.id for failure in written.failures} | set(written.stale)
