"""What the admin endpoints see of a running registrar: every state a target can be in, and no secret."""

import asyncio
import time
from collections import Counter
from contextlib import AbstractAsyncContextManager

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from builders import make_pod, our_pod_service
from fake_consul import QUICK
from k8s_consul_registrar.admin.view import SeenTarget, TargetState
from k8s_consul_registrar.app.census import Census
from k8s_consul_registrar.app.parts import identity, shards
from k8s_consul_registrar.app.view import View, shown_settings
from k8s_consul_registrar.kube.activity import CAUSES, Activity
from k8s_consul_registrar.model import Kind, Source
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.budget import BudgetRules
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.reconciler import Reconciler
from k8s_consul_registrar.registrar.status import LostAgent
from k8s_consul_registrar.settings.modes import read_registrar
from memory import PODS, MemoryCluster, MemoryRegistry
from reconciler_lab import running

SETTINGS = read_registrar({"CLUSTER_NAME": "lab", "SHARD_PATHS": "s1,s2", "CONSUL_HTTP_TOKEN": "t0p-secret"})


class Seen:
    """A reconciler with its view."""

    def __init__(self) -> None:
        self.cluster = MemoryCluster()
        self.consul = MemoryRegistry(checks_versions=True)
        self.reconciler = Reconciler(
            cluster=self.cluster,
            registry=self.consul,
            identity=identity(SETTINGS),
            shards=shards(SETTINGS),
            rules=BrakeRules(confirm=0.1, confirm_start=600),
            period=60,
            timing=QUICK,
            metrics=RegistrarMetrics(CollectorRegistry()),
            budget=BudgetRules(gap=0),
        )
        self.view = View(
            SETTINGS,
            self.cluster.mirror,
            self.reconciler.passes,
            self.reconciler.status,
            identity(SETTINGS),
            shards(SETTINGS),
        )

    def targets(self) -> dict[str, SeenTarget]:
        """Return what is seen, by Pod."""
        return {one.key.name: one for one in self.view.targets()}

    def running(self) -> AbstractAsyncContextManager[None]:
        """Run the loop."""
        return running(self.reconciler)

    async def synced(self) -> None:
        """Wait for the first comparison."""
        async with asyncio.timeout(5):
            while not self.reconciler.status.has_synced:
                await asyncio.sleep(0.005)


async def test_every_state_of_a_target() -> None:
    """Registered, refused and held by another, each with what there is to say."""
    seen = Seen()
    seen.consul.refused = {"pod--shop--bad"}
    seen.consul.put_by_hand(our_pod_service("taken", cluster="other"))
    assert "not listed yet" in seen.view.unlisted()
    async with seen.running():
        seen.cluster.put_list([make_pod(name) for name in ("good", "bad", "taken")] + [make_pod("x", ip="")])
        await seen.synced()
        assert seen.view.unlisted() == ""
        states = {name: one.state for name, one in seen.targets().items()}
        assert states == {
            "good": TargetState.REGISTERED,
            "bad": TargetState.REFUSED,
            "taken": TargetState.CONFLICT,
        }
        good = seen.targets()["good"].service
        assert good == replace(seen.consul.held["pod--shop--good"], index=0)
        assert good.value("shard_path") in ("s1", "s2")
        assert seen.targets()["bad"].detail == "no"
        assert "cluster=other" in seen.targets()["taken"].detail
        assert [(one.key.name, one.reason) for one in seen.view.rejections()] == [("x", "no_ip")]
        status = seen.view.status()
        assert [one.id for one in status.conflicts] == ["pod--shop--taken"]
        assert status.passes[0].outcome == "partial"
        assert status.sources[0].objects == 4


async def test_targets_are_counted_by_kind_and_state() -> None:
    """The count agrees with the targets themselves in every state, is taken anew after a change and not before."""
    seen = Seen()
    census = Census(seen.view, dict)
    seen.consul.refused = {"pod--shop--bad"}
    seen.consul.put_by_hand(our_pod_service("taken", cluster="other"))
    pods = [make_pod(name) for name in ("good", "bad", "taken")] + [make_pod("x", ip="")]
    async with seen.running():
        seen.cluster.put_list([*pods, *(make_pod(f"gone-{number}") for number in range(3))])
        await seen.synced()
        seen.cluster.put_list(pods)
        async with asyncio.timeout(5):
            while not seen.view.status().brakes:
                await asyncio.sleep(0.005)
        assert sum(census.figures().targets.values()) == 0
        await census.refresh()
        figures = census.figures()
        counted = {state: count for (kind, state), count in figures.targets.items() if kind == "pod"}
        assert counted == {
            "registered": 1, "refused": 1, "conflict": 1, "kept": 3, "pending": 0, "standby": 0
        }  # fmt: skip
        assert Counter(one.state.value for one in seen.view.targets()) == +Counter(counted)
        assert figures.rejections["no_ip"] == 1
        assert sum(figures.rejections.values()) == 1
        assert {state for kind, state in figures.targets if kind == "node"} == set(TargetState)
        await census.refresh()
        assert census.figures().targets is figures.targets
        seen.cluster.mirror.put(PODS, make_pod("later"))
        await census.refresh()
        assert census.figures().targets["pod", "pending"] == 1


def test_the_following_is_counted_by_kind() -> None:
    """Restarts of a kind's namespaces are added up, and the one that was silent longest counts."""
    now = time.monotonic()
    one = Activity(lists=2, restarts={**Activity().restarts, "expired": 3}, heard_at=now - 5)
    other = Activity(lists=1, restarts={**Activity().restarts, "expired": 1, "ended": 2}, heard_at=now - 50)
    activity = {
        Source(Kind.POD, "a"): one,
        Source(Kind.POD, "b"): other,
        Source(Kind.NODE): Activity(),
    }
    figures = Census(Seen().view, lambda: activity).figures()
    assert figures.restarts["pod", "expired"] == 4
    assert figures.restarts["pod", "ended"] == 2
    assert set(figures.restarts) == {(kind.value, cause) for kind in Kind for cause in CAUSES}
    assert figures.lists == {"pod": 3, "node": 0}
    assert figures.heard_at["pod"] == pytest.approx(time.time() - 50, abs=2)
    assert figures.heard_at["node"] == 0


async def test_the_generation_moves_with_what_is_seen() -> None:
    """It stays while nothing changes, and moves when a target is added, written or refused."""
    seen = Seen()
    async with seen.running():
        seen.cluster.put_list([make_pod("a")])
        await seen.synced()
        await asyncio.sleep(0.05)
        before = seen.view.generation
        assert seen.view.generation == before
        seen.cluster.mirror.put(PODS, make_pod("b"))
        asked = seen.view.generation
        assert asked != before
        assert seen.targets()["b"].state is TargetState.PENDING
        assert seen.targets()["b"].service.value("shard_path") == ""
        async with asyncio.timeout(5):
            while seen.targets()["b"].state is not TargetState.REGISTERED:
                await asyncio.sleep(0.005)
        assert seen.view.generation not in (before, asked)


async def test_the_brake_is_seen() -> None:
    """What is held is counted and named, with when it would be let go."""
    seen = Seen()
    for number in range(40):
        seen.consul.put_by_hand(our_pod_service(f"p{number}"))
    async with seen.running():
        seen.cluster.put_list([])
        async with asyncio.timeout(5):
            while not seen.view.status().brakes:
                await asyncio.sleep(0.005)
    (brake,) = seen.view.status().brakes
    assert (brake.source, brake.count, len(brake.sample)) == ("pods", 40, 20)
    assert brake.until - brake.since == pytest.approx(600)


async def test_what_the_brake_holds_is_still_served() -> None:
    """Targets that a list suddenly lacks stay with collectors until they are let go."""
    seen = Seen()
    async with seen.running():
        seen.cluster.put_list([make_pod(f"p{number}") for number in range(10)])
        await seen.synced()
        before = seen.view.generation
        seen.cluster.put_list([make_pod("p0")])
        async with asyncio.timeout(5):
            while not seen.view.status().brakes:
                await asyncio.sleep(0.005)
        assert seen.view.generation != before
        states = [one.state for one in seen.view.targets()]
        assert states == [TargetState.REGISTERED] + [TargetState.KEPT] * 9
        await asyncio.sleep(0.15)
        seen.cluster.now += 1
        seen.cluster.put_list([make_pod("p0")])
        async with asyncio.timeout(5):
            while len(seen.consul.held) > 1:
                await asyncio.sleep(0.005)
        assert list(seen.targets()) == ["p0"]


def test_lost_agents_are_shown_with_times_of_the_day() -> None:
    """What the sweeper says in monotonic seconds."""
    seen = Seen()
    now = time.monotonic()
    seen.reconciler.status.lost_agents = (LostAgent("old", now - 60, now + 540, {"not_here": 2}),)
    (shown,) = seen.view.status().lost_agents
    assert (shown.node, shown.stays) == ("old", {"not_here": 2})
    assert abs(shown.since - (time.time() - 60)) < 5
    assert abs(shown.due - (time.time() + 540)) < 5


def test_secrets_are_not_shown() -> None:
    """Of a secret only that it is set."""
    shown = {one.name: one.value for one in shown_settings(SETTINGS.common.environment)}
    assert shown["CONSUL_HTTP_TOKEN"] == "set"
    assert shown["CLUSTER_NAME"] == "lab"
    assert shown["SYNC_PERIOD"] == "600"
    assert "t0p-secret" not in repr(shown)
