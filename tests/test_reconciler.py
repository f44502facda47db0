"""The reconciler's loop: what it writes in which order, when it wakes, and what it survives."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager, suppress

import pytest
from prometheus_client import CollectorRegistry

from builders import make_pod, our_pod_service
from fake_consul import QUICK
from k8s_consul_registrar.errors import ConsulUnreachable
from k8s_consul_registrar.kube.mirror import Mirror
from k8s_consul_registrar.model import Kind, ObjectKey, Pod, Service, Source, WriteFailure, Written
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.reconciler import Reconciler
from k8s_consul_registrar.targets.sharding import RandomShards
from k8s_consul_registrar.targets.targets import TargetRules, judge
from k8s_consul_registrar.targets.wanted import Wanted

PODS = Source(Kind.POD)


class MemoryCluster:
    """A cluster of Pods that a test lists at will."""

    def __init__(self) -> None:
        self.mirror = Mirror((PODS,), lambda item: judge(item, TargetRules()))
        self.relists: list[Source] = []
        self.now = 0.0

    def put_list(self, pods: Iterable[Pod]) -> None:
        """Complete a list."""
        listing = self.mirror.start_listing()
        self.mirror.add_page(PODS, listing, pods)
        self.now += 1
        self.mirror.finish_listing(PODS, listing, self.now)

    def wanted(self) -> Wanted:
        """Return everything known."""
        return self.mirror.wanted()

    async def changed(self) -> None:
        """Wait for a change."""
        await self.mirror.changed()

    def settled(self, departed: AbstractSet[ObjectKey]) -> None:
        """Forget departures."""
        self.mirror.settled(departed)

    def relist(self, source: Source, at: float) -> None:
        """Note that a list was asked for."""
        self.relists.append(source)


class MemoryRegistry:
    """A Consul in memory that notes the order of writes, refuses some, and can be down."""

    def __init__(self) -> None:
        self.held: dict[str, Service] = {}
        self.writes: list[tuple[str, str]] = []
        self.refused: set[str] = set()
        self.is_down = False
        self.reads = 0

    async def services(self) -> AsyncIterator[Service]:
        """Yield what is held."""
        self.reads += 1
        if self.is_down:
            raise ConsulUnreachable("Consul is down")
        for service in list(self.held.values()):
            yield service

    async def register(self, services: Sequence[Service]) -> Written:
        """Take services in, except the refused ones."""
        failures = tuple(WriteFailure(one.id, "no") for one in services if one.id in self.refused)
        for one in services:
            if one.id not in self.refused:
                self.writes.append(("register", one.id))
                self.held[one.id] = one
        return Written(len(services) - len(failures), failures)

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Take services out."""
        for one in services:
            self.writes.append(("deregister", one.id))
            self.held.pop(one.id, None)
        return Written(len(services))


class Lab:
    """A reconciler between a cluster and a Consul in memory."""

    def __init__(self, **options: object) -> None:
        self.cluster = MemoryCluster()
        self.consul = MemoryRegistry()
        self.metrics = CollectorRegistry()
        settings: dict[str, object] = {
            "period": 60.0,
            "rules": BrakeRules(confirm=0, confirm_start=0),
            **options,
        }
        self.reconciler = Reconciler(
            cluster=self.cluster,
            registry=self.consul,
            identity=Identity("lab"),
            shards=RandomShards(),
            timing=QUICK,
            metrics=RegistrarMetrics(self.metrics),
            **settings,  # type: ignore[arg-type] # the tests' own options
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the loop."""
        task = asyncio.create_task(self.reconciler.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def until(self, ids: Iterable[str]) -> None:
        """Wait until Consul holds just these Pods' services."""
        expected = {f"pod--shop--{name}" for name in ids}
        async with asyncio.timeout(5):
            while set(self.consul.held) != expected:
                await asyncio.sleep(0.005)

    def value(self, name: str, **labels: str) -> float | None:
        """Return a metric's value."""
        return self.metrics.get_sample_value(f"k8s_consul_registrar_{name}", labels)


async def test_follows_the_cluster() -> None:
    """New Pods are registered, changed ones updated and gone ones deregistered, as lists come."""
    lab = Lab()
    async with lab.running():
        lab.cluster.put_list([make_pod("a"), make_pod("b")])
        await lab.until(["a", "b"])
        lab.cluster.put_list([make_pod("b", ip="198.51.100.77")])
        await lab.until(["b"])
    assert lab.consul.held["pod--shop--b"].address == "198.51.100.77"
    assert lab.reconciler.status.readiness() == ""
    assert lab.value("writes_total", verb="deregister", outcome="success") == 1


async def test_nothing_happens_before_the_first_list() -> None:
    """Consul is not even read while nothing is known, and the daemon is not ready."""
    lab = Lab()
    lab.consul.held["pod--shop--old"] = our_pod_service("old")
    await lab.reconciler.reconcile()
    assert lab.consul.reads == 0
    assert lab.consul.writes == []
    assert "not synced yet" in lab.reconciler.status.readiness()


async def test_registers_go_before_deregisters() -> None:
    """In one pass everything new is there before anything old goes."""
    lab = Lab()
    lab.consul.held = {f"pod--shop--o{n}": our_pod_service(f"o{n}") for n in range(2)}
    lab.cluster.put_list([make_pod(f"n{number}") for number in range(5)])
    await lab.reconciler.reconcile()
    verbs = [verb for verb, _ in lab.consul.writes]
    assert verbs == ["register"] * 5 + ["deregister"] * 2


async def test_a_second_pass_writes_nothing() -> None:
    """At rest there are no writes."""
    lab = Lab()
    lab.cluster.put_list([make_pod("a")])
    await lab.reconciler.reconcile()
    lab.consul.writes.clear()
    report = await lab.reconciler.reconcile()
    assert (lab.consul.writes, report.unchanged, report.outcome) == ([], 1, "success")


async def test_outage_of_consul_is_survived() -> None:
    """While Consul is down nothing is lost; when it is back the pass is made, without a change's help."""
    lab = Lab()
    lab.consul.is_down = True
    async with lab.running():
        lab.cluster.put_list([make_pod("a")])
        async with asyncio.timeout(5):
            while lab.consul.reads < 3:
                await asyncio.sleep(0.005)
        assert "Consul is down" in lab.reconciler.status.readiness()
        assert lab.value("consul_up") == 0
        lab.consul.is_down = False
        await lab.until(["a"])
    assert lab.value("consul_up") == 1


async def test_a_flood_of_changes_does_not_hammer_a_dead_consul() -> None:
    """Changes while Consul is down wait for the next retry."""
    lab = Lab()
    lab.consul.is_down = True
    async with lab.running():
        for number in range(50):
            lab.cluster.put_list([make_pod(f"p{number}")])
            await asyncio.sleep(0.002)
    assert lab.consul.reads < 15


async def test_period_repairs_drift() -> None:
    """What somebody removes in Consul comes back by the period alone."""
    lab = Lab(period=0.05)
    async with lab.running():
        lab.cluster.put_list([make_pod("a")])
        await lab.until(["a"])
        lab.consul.held.clear()
        await lab.until(["a"])


async def test_one_refused_target_does_not_hold_up_the_rest() -> None:
    """The pass is partial, the rest is there, and the refused one is tried again."""
    lab = Lab()
    lab.consul.refused = {"pod--shop--bad"}
    async with lab.running():
        lab.cluster.put_list([make_pod("bad"), make_pod("good")])
        await lab.until(["good"])
        lab.consul.refused.clear()
        await lab.until(["bad", "good"])
    assert lab.value("passes_total", outcome="partial")


async def test_departures_are_remembered_until_they_are_done() -> None:
    """A fact is forgotten once Consul holds nothing of it, and not while a write was refused."""
    lab = Lab()
    lab.cluster.put_list([make_pod("a"), make_pod("b")])
    await lab.reconciler.reconcile()
    lab.consul.refused = {"pod--shop--c"}
    lab.cluster.put_list([make_pod("a", annotations={}), make_pod("b"), make_pod("c")])
    await lab.reconciler.reconcile()
    assert lab.cluster.wanted().departed == {make_pod("a").key}
    lab.consul.refused.clear()
    await lab.reconciler.reconcile()
    assert lab.cluster.wanted().departed == frozenset()


async def test_brake_asks_for_another_list_and_lets_go() -> None:
    """A held removal asks the cluster to list again, and is done when that list agrees."""
    lab = Lab()
    lab.consul.held = {f"pod--shop--p{n}": our_pod_service(f"p{n}") for n in range(10)}
    lab.cluster.put_list([])
    await lab.reconciler.reconcile()
    assert len(lab.consul.held) == 10
    assert lab.cluster.relists == [PODS]
    assert lab.value("brake_held_services") == 10
    lab.cluster.put_list([])
    await lab.reconciler.reconcile()
    assert lab.consul.held == {}
    assert lab.value("brake_held_services") == 0


async def test_blindness_changes_nothing_and_shows() -> None:
    """A source that fails keeps its services, stays ready, and shows in the metrics."""
    lab = Lab()
    lab.cluster.put_list([make_pod("a")])
    await lab.reconciler.reconcile()
    lab.cluster.mirror.fail(PODS, "403")
    await lab.reconciler.reconcile()
    assert list(lab.consul.held) == ["pod--shop--a"]
    assert lab.value("source_followed", kind="pod") == 0
    assert lab.reconciler.status.readiness() == ""


async def test_standing_problems_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A rejection is a warning when it begins, not at every pass."""
    lab = Lab()
    lab.cluster.put_list([make_pod("a", ip="")])
    for _ in range(3):
        await lab.reconciler.reconcile()
    assert capsys.readouterr().out.count("no_ip") == 1
