"""Writes a plan to Consul and notes in the ledger what became of it."""

import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

from k8s_consul_registrar.errors import ConsulError
from k8s_consul_registrar.model import Service, WriteFailure, Written
from k8s_consul_registrar.registrar.ledger import Entry, Ledger
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.pace import FIRST, next_batch
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
        self._batch = FIRST
        self.refused: set[str] = set()

    async def apply(self, plan: Plan, ledger: Ledger) -> PassReport:
        """Write a plan, registers before deregisters; raises a `ConsulError`, and what was under way then is in doubt."""
        try:
            registered = await self._register("register", plan.register, ledger)
            updated = await self._register("update", plan.update, ledger)
            deregistered = await self._deregister(plan.deregister, ledger)
        except ConsulError:
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

    async def _register(self, verb: str, entries: Sequence[Entry], ledger: Ledger) -> Written:
        done = 0
        failures: list[WriteFailure] = []
        stale: list[str] = []
        remaining = iter(entries)
        while batch := list(islice(remaining, self._batch)):
            started = time.monotonic()
            services = [entry.service(self._identity) for entry in batch]
            written = await self._write(verb, self._registry.register, services)
            missed = {failure.id for failure in written.failures} | set(written.stale)
            for entry in batch:
                if entry.id in missed:
                    ledger.doubt(entry.id, entry.shard)
                    self.refused.add(entry.id)
                else:
                    self.refused.discard(entry.id)
                    ledger.note(entry._replace(version=written.indexes.get(entry.id, 0)))
            if len(batch) == self._batch:
                self._batch = next_batch(self._batch, time.monotonic() - started)
            done += written.done
            failures.extend(written.failures)
            stale.extend(written.stale)
        return Written(done, tuple(failures), stale=tuple(stale))

    async def _deregister(self, services: Sequence[Service], ledger: Ledger) -> Written:
        if not services:
            return Written()
        written = await self._write("deregister", self._registry.deregister, services)
        missed = {failure.id for failure in written.failures} | set(written.stale)
        for service in services:
            if service.id in missed:
                ledger.doubt(service.id)
                self.refused.add(service.id)
            else:
                self.refused.discard(service.id)
                ledger.forget(service.id)
        return written

    async def _write(
        self,
        verb: str,
        write: Callable[[Sequence[Service]], Awaitable[Written]],
        services: Sequence[Service],
    ) -> Written:
        written = await write(services)
        self._reporter.wrote(verb, services, written)
        return written
