"""The command plan: shows what a resync would change now, and changes nothing."""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.admin.explain import action_for, differences
from k8s_consul_registrar.asyncio_tools import end_tasks
from k8s_consul_registrar.commands import settings_offline
from k8s_consul_registrar.errors import OperationalError
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.registrar.brake import Ground
from k8s_consul_registrar.registrar.decide import (
    Action,
    Conflict,
    Deregister,
    InSync,
    Keep,
    Register,
    Reject,
    Update,
    Withheld,
)
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import Policy
from k8s_consul_registrar.registrar.reconciler import Core
from k8s_consul_registrar.registrar.reporter import verb_of
from k8s_consul_registrar.registrar.resync import Comparison, release
from k8s_consul_registrar.runner import EXIT_CHANGES, EXIT_FAILURE, EXIT_OK, run_loop
from k8s_consul_registrar.settings.consul import NONE
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.targets.scrape_config import socket_address
from k8s_consul_registrar.wiring.backend import decided
from k8s_consul_registrar.wiring.registrar import RegistrarParts, Wiring

# Seconds that every source has to be listed once, or to fail.
PATIENCE = 120.0
_COLOURS = {"+": "\x1b[32m", "~": "\x1b[33m", "-": "\x1b[31m", "!": "\x1b[35m"}
_PLAIN = "\x1b[0m"


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One line of a plan: the sign (+ register, ~ update, - deregister, ! left alone), the ID, and what."""

    sign: str
    id: str
    what: str


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Show what a resync would do now: exit 0 nothing, 3 changes, 1 failure."""
    given = copy(environment)
    if isinstance(given, dict):
        given.setdefault(
            "HTTP_SD_PORT", "0"
        )  # without Consul nothing is served either, and no port is needed
    return run_loop(_plan(settings_offline(given), output=parsed.output))


class Plan(NamedTuple):
    """The outcome of a sync made now: a line for each change and each thing that stays, and the counts by result."""

    lines: list[PlanLine]
    counts: Mapping[str, int]

    @property
    def has_changes(self) -> bool:
        """True if a sync would write something, or the brake or the policy would hold something."""
        results = ("to register", "to update", "to deregister", "held", "withheld")
        return any(self.counts.get(result) for result in results)


async def _plan(settings: RegistrarSettings, *, output: str) -> int:
    async with listed(settings) as parts:
        plan = await compared(parts.core, await confirmed(parts))
        problems = source_problems(parts)
    if output == "json":
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(plan.lines)) + b"\n")
    else:
        print_changes(plan, colour=sys.stdout.isatty())
    for problem in problems:
        print(f"the plan is incomplete: {problem}", file=sys.stderr)
    if problems:
        return EXIT_FAILURE
    return EXIT_CHANGES if plan.has_changes else EXIT_OK


@asynccontextmanager
async def listed(settings: RegistrarSettings) -> AsyncIterator[RegistrarParts]:
    """Watch the cluster once every source was listed or has failed; raises `OperationalError`."""
    wiring = Wiring(settings)
    async with wiring.kube() as kube, AsyncExitStack() as stack:
        client = None
        if settings.backend.backend != NONE:  # otherwise everything that would be served is shown as new
            client = await stack.enter_async_context(wiring.consul())
            wiring = await decided(wiring, client)
        parts = wiring.core(kube=kube, client=client, metrics=RegistrarMetrics(CollectorRegistry()))
        watching = asyncio.create_task(parts.reflectors.run())
        try:
            await _until(
                lambda: all(
                    status.listed_at is not None or status.problem
                    for status in parts.core.desired.store.statuses().values()
                )
            )
            yield parts
        finally:
            await end_tasks([watching])


async def confirmed(parts: RegistrarParts) -> Comparison:
    """Compare everything; where absences need a new list, wait for it and compare once more."""
    asked_at = time.monotonic()
    found = await parts.resync.compare()
    if not found.judged.relisting:
        return found
    await _until(
        lambda: all(
            status.problem or (status.list_began_at or 0.0) >= asked_at
            for source, status in parts.core.desired.store.statuses().items()
            if source in found.judged.relisting
        )
    )
    return await parts.resync.compare()


async def _until(is_so: Callable[[], bool]) -> None:
    try:
        async with asyncio.timeout(PATIENCE):
            while not is_so():  # noqa: ASYNC110 - it is over in a moment, and nothing else runs here
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise OperationalError(f"the cluster was not listed within {PATIENCE:g} s") from None


async def compared(core: Core, found: Comparison) -> Plan:
    """Decide every ID that differs, as a sync would."""
    release(found.judged, core.desired, core.quota)
    actions: dict[str, Action] = {}
    for service_id in (*found.differing, *found.removals, *found.judged.released):
        actions[service_id] = await action_for(core, service_id)
    withheld = {one: verb_of(action.write) for one, action in actions.items() if isinstance(action, Withheld)}
    updates = [
        service_id for service_id, action in actions.items() if isinstance(action, (Update, Deregister))
    ]
    before = {service.id: service async for service in core.registry.lookup(updates)} if updates else {}
    who = core.rules.identity
    lines: list[PlanLine] = []
    counts: Counter[type[Action]] = Counter()
    rejections = list(core.desired.rejections.values())
    for service_id, action in actions.items():
        match action:
            case Register():
                lines.append(PlanLine("+", service_id, _described(action.entry.service(who))))
            case Update():
                after = action.entry.service(who)
                lines.append(PlanLine("~", service_id, differences(before.get(service_id, after), after)))
            case Deregister():
                gone = before.get(service_id)
                lines.append(PlanLine("-", service_id, "" if gone is None else _described(gone)))
            case Conflict():
                lines.append(PlanLine("!", service_id, f"conflict: held by {action.holder}"))
            case Reject():
                rejections.append(action.rejection)
        rejections += getattr(getattr(action, "write", action), "losers", ())
        counts[type(action)] += 1
    held = [
        PlanLine(
            "!",
            service_id,
            "held by the brake: over MAX_TARGETS_PER_NAMESPACE"
            if one.ground is Ground.QUOTA
            else f"held by the brake: missing from {one.source}",
        )
        for one in found.judged.held
        for service_id in one.ids
    ]
    lines += held
    policy = core.rules.policy
    lines += [
        PlanLine("!", one, f"{verb}: withheld, as POLICY is {policy}") for one, verb in withheld.items()
    ]
    # An object of which several services find no place is rejected once.
    rejections = list(dict.fromkeys(rejections))
    lines += [
        PlanLine("!", one.id or str(one.key), f"rejected: {one.reason}: {one.detail}") for one in rejections
    ]
    return Plan(
        sorted(lines, key=lambda line: line.id),
        {
            "to register": counts[Register],
            "to update": counts[Update],
            "to deregister": counts[Deregister],
            "unchanged": found.unchanged + counts[InSync],
            "in conflict": counts[Conflict],
            "held": len(held),
            "kept": found.kept.total() + counts[Keep],
            "rejected": len(rejections),
            **({} if policy is Policy.SYNC else {"withheld": len(withheld)}),
        },
    )


def source_problems(parts: RegistrarParts) -> list[str]:
    """Return which sources cannot be listed, and why."""
    statuses = parts.core.desired.store.statuses()
    return [f"{source}: {status.problem}" for source, status in statuses.items() if status.problem]


def print_changes(plan: Plan, *, colour: bool) -> None:
    """Print the lines as a diff, and what they add up to."""
    for line in plan.lines:
        begin, end = (_COLOURS[line.sign], _PLAIN) if colour else ("", "")
        print(f"{begin}{line.sign} {line.id}{end}  {line.what}")
    print(", ".join(f"{count} {result}" for result, count in plan.counts.items()))


def _described(service: Service) -> str:
    where = socket_address(service.address, service.port)
    return f"{where} {service.value('metrics_path')} {service.value('shard_path')}".strip()
