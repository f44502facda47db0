"""One look or one pass, and an end: what a pass would do now, or doing it from a CronJob."""

import asyncio
import sys
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import uvloop
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.app.lifecycle import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, complain
from k8s_consul_registrar.app.parts import (
    brake_rules,
    consul_access,
    consul_registry,
    followed_cluster,
    identity,
    shards,
)
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.errors import AccessError, OperationalError
from k8s_consul_registrar.kube.access import load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster import FollowedCluster
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.passes import Passes
from k8s_consul_registrar.registrar.plan import Plan
from k8s_consul_registrar.registrar.planner import Planner
from k8s_consul_registrar.registrar.ports import Registry
from k8s_consul_registrar.registrar.report import Reporter
from k8s_consul_registrar.registrar.status import RegistrarStatus
from k8s_consul_registrar.settings.modes import RegistrarSettings

EXIT_CHANGES = 3
# Seconds every source has to be listed, or to fail, once.
PATIENCE = 120.0
_COLOURS = {"+": "\x1b[32m", "~": "\x1b[33m", "-": "\x1b[31m", "!": "\x1b[35m"}
_PLAIN = "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a plan: the sign (+ register, ~ update, - deregister, ! left alone), the ID, and what."""

    sign: str
    id: str
    what: str


def run_plan(settings: RegistrarSettings, *, output: str) -> int:
    """Show what a pass would do now: exit 0 nothing, 3 changes, 1 failure. Nothing is written."""
    return _run(_plan(settings, output=output))


def run_sync(settings: RegistrarSettings) -> int:
    """Make one pass: exit 0 done, 3 a removal is held by the brake, 1 failure."""
    return _run(_sync(settings))


def _run(work: Coroutine[Any, Any, int]) -> int:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(work)
    except AccessError as error:
        return complain(error)
    except OperationalError as error:
        print(f"k8s-consul-registrar: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


async def _plan(settings: RegistrarSettings, *, output: str) -> int:
    timing = Timing()
    access = load_access(settings.common.environment)
    async with (
        KubeClient(access, timing) as kube,
        ConsulClient(consul_access(settings.consul), timing) as client,
    ):
        cluster = followed_cluster(settings, kube, timing)
        await _listed(cluster)
        plan, held = await _compared(settings, cluster, consul_registry(settings, client, timing))
    changes = changes_of(plan, held, settings)
    problems = [state.problem for state in cluster.mirror.states().values() if state.problem]
    if output == "json":
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(changes)) + b"\n")
    else:
        print_changes(changes, plan, problems, colour=sys.stdout.isatty())
    if problems:
        return EXIT_FAILURE
    return EXIT_CHANGES if plan.writes or plan.held else EXIT_OK


async def _compared(
    settings: RegistrarSettings, cluster: FollowedCluster, registry: Registry
) -> tuple[Plan, dict[str, Service]]:
    """Return the plan of a full pass, and what Consul now holds of the services it changes."""
    planner = Planner(cluster.wanted(), identity(settings), shards(settings))
    before: dict[str, Service] = {}
    async for service in registry.services():
        if planner.consider(service) is None:
            before[service.id] = service
    for _ in planner.complete():
        pass
    held, memory = planner.brake(brake_rules(settings), {})
    return planner.plan(held, memory), before


async def _sync(settings: RegistrarSettings) -> int:
    timing = Timing()
    access = load_access(settings.common.environment)
    async with (
        KubeClient(access, timing) as kube,
        ConsulClient(consul_access(settings.consul), timing) as client,
    ):
        cluster = followed_cluster(settings, kube, timing)
        await _listed(cluster)
        passes = Passes(
            cluster=cluster,
            registry=consul_registry(settings, client, timing),
            identity=identity(settings),
            shards=shards(settings),
            rules=brake_rules(settings),
            reporter=Reporter(RegistrarMetrics(CollectorRegistry()), RegistrarStatus()),
        )
        report = await passes.full()
    print(
        f"registered {report.registered}, updated {report.updated}, deregistered {report.deregistered}, "
        f"unchanged {report.unchanged}, refused {report.refused}, rejected {report.rejected}"
    )
    if report.refused or any(state.problem for state in cluster.mirror.states().values()):
        return EXIT_FAILURE
    return EXIT_CHANGES if report.held else EXIT_OK


async def _listed(cluster: FollowedCluster) -> None:
    """Follow the cluster until every source was listed or has failed; raises `OperationalError`."""
    following = asyncio.create_task(cluster.run())
    try:
        async with asyncio.timeout(PATIENCE):
            while not cluster.needs_full_pass():
                await cluster.changed()
                cluster.changes()
    except TimeoutError:
        raise OperationalError(f"the cluster was not listed within {PATIENCE:g} s") from None
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def changes_of(plan: Plan, before: dict[str, Service], settings: RegistrarSettings) -> list[Change]:
    """Put a plan into lines, what is left alone included."""
    who = identity(settings)
    lines = [Change("+", one.id, _described(one.service(who))) for one in plan.register]
    lines += [
        Change("~", entry.id, _differences(before[entry.id], entry.service(who))) for entry in plan.update
    ]
    lines += [Change("-", one.id, _described(one)) for one in plan.deregister]
    lines += [Change("!", one.id, f"conflict: held by {one.holder}") for one in plan.conflicts]
    for held in plan.held:
        lines += [Change("!", one, f"held by the brake: missing from {held.source}") for one in held.ids]
    lines += [Change("!", one.id or str(one.key), f"{one.reason}: {one.detail}") for one in plan.rejections]
    return sorted(lines, key=lambda line: line.id)


def print_changes(lines: Iterable[Change], plan: Plan, problems: Iterable[str], *, colour: bool) -> None:
    """Print the lines as a diff, and what they add up to."""
    for line in lines:
        begin, end = (_COLOURS[line.sign], _PLAIN) if colour else ("", "")
        print(f"{begin}{line.sign} {line.id}{end}  {line.what}")
    for problem in problems:
        print(f"cannot list, so nothing of it would be deregistered: {problem}", file=sys.stderr)
    held = sum(len(one.ids) for one in plan.held)
    print(
        f"{len(plan.register)} to register, {len(plan.update)} to update, {len(plan.deregister)} to deregister, "
        f"{plan.unchanged} unchanged, {len(plan.conflicts)} in conflict, {held} held, "
        f"{plan.kept.total()} kept"
    )


def _described(service: Service) -> str:
    return f"{service.address}:{service.port} {service.value('metrics_path')} {service.value('shard_path')}".strip()


def _differences(before: Service, after: Service) -> str:
    """Name what an update changes, old and new."""
    old = {"name": before.name, "address": before.address, "port": str(before.port), **dict(before.meta)}
    new = {"name": after.name, "address": after.address, "port": str(after.port), **dict(after.meta)}
    old["tags"], new["tags"] = ",".join(before.tags), ",".join(after.tags)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return ", ".join(f"{key}: {old.get(key, '')!r} -> {new.get(key, '')!r}" for key in changed)
