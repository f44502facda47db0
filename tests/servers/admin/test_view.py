"""The view that the admin endpoints have of a running registrar: every state a target can be in, and no secret."""

import asyncio
import json
import time
from collections import Counter
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from msgspec.structs import replace

from k8s_consul_registrar.admin.status_api import api_routes
from k8s_consul_registrar.admin.view import Census, TargetState
from k8s_consul_registrar.kube.source_state import CAUSES, WatchStats
from k8s_consul_registrar.model import Kind, Source
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.claims import Change
from k8s_consul_registrar.registrar.status import LostAgent
from k8s_consul_registrar.settings.reading import shown_settings
from support.builders import make_pod, our_pod_service
from support.controller_lab import HELD, SETTINGS, Seen, Vote
from support.memory import PODS
from support.scripted import ATTENTIVE
from support.waiting import SLACK, until


async def status_of(seen: Seen) -> dict[str, Any]:
    """Return what the API answers about a registrar's status."""
    (handler,) = [one.handler for one in api_routes(seen.view) if one.path == "/api/v1/status"]
    response = await handler(make_mocked_request("GET", "/api/v1/status"))
    assert isinstance(response, web.Response)
    assert isinstance(response.body, bytes)
    answer: dict[str, Any] = json.loads(response.body)
    return answer


async def following(seen: Seen, names: str) -> None:
    """List Pods, each with the service that a leader wrote, and wait until a standby knows all of them."""
    for name in names:
        seen.lab.consul.put_by_hand(our_pod_service(name, shard_path="s1"))
    seen.lab.cluster.put_list([make_pod(name) for name in names])
    names_known = {f"pod--shop--{name}" for name in names}
    await seen.lab.until_so(lambda: seen.lab.status.has_synced and names_known <= {*seen.lab.observed.ids()})


async def test_every_state_of_a_target() -> None:
    """Registered, refused and held by another, each with what there is to say."""
    seen = Seen(brake=HELD)
    lab = seen.lab
    lab.consul.refused = {"pod--shop--bad"}
    lab.consul.put_by_hand(our_pod_service("taken", cluster="other"))
    assert "not listed yet" in seen.view.unlisted()
    async with lab.running():
        await seen.synced([make_pod(name) for name in ("good", "bad", "taken")] + [make_pod("x", ip="")])
        assert seen.view.unlisted() == ""
        states = {name: one.state for name, one in seen.targets().items()}
        assert states == {
            "good": TargetState.REGISTERED,
            "bad": TargetState.REFUSED,
            "taken": TargetState.CONFLICT,
        }
        good = seen.targets()["good"].service
        assert good == replace(lab.consul.held["pod--shop--good"], index=good.index)
        assert good.value("shard_path") in ("s1", "s2")
        assert seen.targets()["bad"].detail == "no"
        assert "cluster=other" in seen.targets()["taken"].detail
        assert [(one.key.name, one.reason) for one in seen.view.rejections()] == [("x", "no_ip")]
        status = await status_of(seen)
        assert [one["id"] for one in status["conflicts"]] == ["pod--shop--taken"]
        assert "full" in [one["kind"] for one in status["passes"]]
        assert status["sources"][0]["objects"] == 4


async def test_targets_are_counted_by_kind_and_state() -> None:
    """The count agrees with the targets themselves in every state, and is renewed only after a change."""
    seen = Seen(brake=HELD)
    lab = seen.lab
    census = Census(seen.view, dict)
    lab.consul.refused = {"pod--shop--bad"}
    lab.consul.put_by_hand(our_pod_service("taken", cluster="other"))
    pods = [make_pod(name) for name in ("good", "bad", "taken")] + [make_pod("x", ip="")]
    async with lab.running():
        await seen.synced([*pods, *(make_pod(f"gone-{number}") for number in range(3))])
        lab.cluster.put_list(pods)
        status = seen.view.status
        await lab.until_so(lambda: bool(status.held and status.refused and status.conflicts))
        assert sum(census.figures().targets.values()) == 0
        await census.refresh()
        figures = census.figures()
        counted = {state: count for (kind, state), count in figures.targets.items() if kind == "pod"}
        assert counted == {
            "registered": 1, "refused": 1, "conflict": 1, "kept": 3, "pending": 0, "standby": 0, "blocked": 0, "withheld": 0, "unwanted": 0
        }  # fmt: skip
        assert Counter(one.state.value for one in seen.view.targets()) == +Counter(counted)
        assert figures.rejections["no_ip"] == 1
        assert sum(figures.rejections.values()) == 1
        assert {state for kind, state in figures.targets if kind == "node"} == set(TargetState)

        async def is_kept() -> bool:  # unless a retry of the refused write comes in between
            before = census.figures().targets
            await census.refresh()
            return census.figures().targets is before

        await until(is_kept)
        lab.cluster.store.put(PODS, make_pod("later"))
        await census.refresh()
        assert census.figures().targets["pod", "pending"] == 1


def test_following_is_counted_by_kind() -> None:
    """Restarts of a kind's namespaces are added up, and the one that was silent longest counts."""
    now = time.monotonic()
    one = WatchStats(lists=2, restarts={**WatchStats().restarts, "expired": 3}, heard_at=now - 5)
    other = WatchStats(
        lists=1, restarts={**WatchStats().restarts, "expired": 1, "ended": 2}, heard_at=now - 50
    )
    activity = {
        Source(Kind.POD, "a"): one,
        Source(Kind.POD, "b"): other,
        Source(Kind.NODE): WatchStats(),
    }
    figures = Census(Seen().view, lambda: activity).figures()
    assert figures.restarts["pod", "expired"] == 4
    assert figures.restarts["pod", "ended"] == 2
    assert set(figures.restarts) == {(kind.value, cause) for kind in Kind for cause in CAUSES}
    assert figures.lists == {"pod": 3, "node": 0}
    assert figures.heard_at["pod"] == pytest.approx(time.time() - 50, abs=2)
    assert figures.heard_at["node"] == 0


async def test_generation_moves_with_what_is_seen() -> None:
    """It stays while nothing changes, and moves when a target is added, written or refused."""
    seen = Seen()
    lab = seen.lab
    async with lab.running():
        await seen.synced([make_pod("a")])
        await lab.resynced()
        before = seen.view.generation
        assert seen.view.generation == before
        lab.cluster.store.put(PODS, make_pod("b"))
        asked = seen.view.generation
        assert asked != before
        assert seen.targets()["b"].state is TargetState.PENDING
        assert seen.targets()["b"].service.value("shard_path") == ""
        await lab.until_so(lambda: seen.targets()["b"].state is TargetState.REGISTERED)
        assert seen.view.generation not in (before, asked)


async def test_brake_is_seen() -> None:
    """Held removals are counted and named, with the time at which they would be released."""
    seen = Seen(brake=BrakeRules(confirm=60, confirm_start=600))
    for number in range(40):
        seen.lab.consul.put_by_hand(our_pod_service(f"p{number}"))
    async with seen.lab.running():
        seen.lab.cluster.put_list([])
        await seen.lab.until_so(lambda: bool(seen.view.status.held))
    (brake,) = (await status_of(seen))["brakes"]
    assert (brake["source"], brake["count"], len(brake["sample"])) == ("pods", 40, 20)
    assert brake["until"] - brake["since"] == pytest.approx(600)


async def test_targets_held_by_the_brake_are_still_served() -> None:
    """Targets that a list suddenly lacks stay with collectors until they are let go."""
    seen = Seen(brake=BrakeRules(confirm=0.5, confirm_start=0.5))
    lab = seen.lab
    async with lab.running():
        await seen.synced([make_pod(f"p{number}") for number in range(10)])
        before = seen.view.generation
        lab.cluster.put_list([make_pod("p0")])
        await lab.until_so(lambda: bool(seen.view.status.held))
        assert seen.view.generation != before
        states = [one.state for one in seen.view.targets()]
        assert states == [TargetState.REGISTERED] + [TargetState.KEPT] * 9
        await asyncio.sleep(0.5)
        lab.cluster.put_list([make_pod("p0")])
        await lab.until("p0")
        assert list(seen.targets()) == ["p0"]


async def test_targets_kept_from_before_the_start_are_served() -> None:
    """A target that only Consul knows of stays with collectors under its record."""
    seen = Seen(brake=HELD)
    for name in ("a", "b", "c", "d"):
        seen.lab.consul.put_by_hand(our_pod_service(name))
    async with seen.lab.running():
        seen.lab.cluster.put_list([make_pod("a")])
        await seen.lab.until_so(lambda: bool(seen.view.status.held))
        kept = {name: one.service for name, one in seen.targets().items() if one.state is TargetState.KEPT}
        assert kept.keys() == {"b", "c", "d"}
        assert kept["b"].address == our_pod_service("b").address


async def test_pod_that_is_gone_is_no_target_while_consul_is_down() -> None:
    """Its deletion was seen, so it is not scraped any more, though Consul still has its service."""
    seen = Seen(brake=HELD)
    lab = seen.lab
    async with lab.running():
        await seen.synced([make_pod("a"), make_pod("b")])
        lab.consul.is_down = True
        position = seen.view.position
        lab.cluster.remove(make_pod("a"))
        assert (seen.targets()["a"].state, seen.targets()["a"].is_target) == (TargetState.UNWANTED, False)
        assert seen.view.changed_since(position) == {"pod--shop--a"}
        assert lab.names_held == {"a", "b"}
        lab.consul.is_down = False
        await lab.until("b")
        assert list(seen.targets()) == ["b"]


async def test_what_shows_targets_is_told_of_departures() -> None:
    """A service that the brake lets go is no target from then on, and one again if that turns out wrong."""
    seen = Seen(brake=HELD)
    lab, web = seen.lab, "pod--shop--a"
    async with lab.running():
        await seen.synced([make_pod(name) for name in "abcdefghij"])
        lab.cluster.put_list([make_pod("b")])
        await lab.until_so(lambda: bool(lab.status.held))
        lab.consul.is_down = True
        position = seen.view.position
        assert seen.targets()["a"].state is TargetState.KEPT
        lab.desired.depart(web, seen.targets()["a"].key)
        assert seen.targets()["a"].state is TargetState.UNWANTED
        assert seen.view.changed_since(position) == {web}
        position = seen.view.position
        lab.desired.settle(web, lab.desired.departure_generation)
        assert seen.targets()["a"].state is TargetState.KEPT
        assert seen.view.changed_since(position) == {web}


async def test_deletion_that_a_standby_saw_counts_once_its_source_is_synced() -> None:
    """The new leader may have missed that the Pod came back, so until then its service is a target."""
    vote = Vote(is_leader=False)
    seen = Seen(leadership=vote)
    lab = seen.lab
    async with lab.running():
        await following(seen, "ab")
        lab.cluster.remove(make_pod("a"))
        assert seen.targets()["a"].state is TargetState.UNWANTED
        lab.cluster.store.fail(PODS, "cut off", "cut")
        lab.consul.may_read_on.clear()
        position = seen.view.position
        vote.decide(is_leader=True)
        await lab.until_so(lambda: not lab.status.is_standby)
        assert seen.targets()["a"].state is TargetState.KEPT
        assert seen.view.changed_since(position) is None
        position = seen.view.position
        lab.cluster.store.resume(PODS, "150")
        lab.cluster.store.caught_up(PODS)
        assert seen.targets()["a"].state is TargetState.UNWANTED
        assert seen.view.changed_since(position) is None
        lab.consul.may_read_on.set()
        await lab.until("b")


async def test_standby_serves_the_cluster_as_it_is() -> None:
    """Before it reads again what the leader wrote, it has the new address of a Pod, and none of a deleted one."""
    vote = Vote(is_leader=False)
    seen = Seen(leadership=vote)
    lab = seen.lab
    async with lab.running():
        await following(seen, "abc")
        reads = lab.consul.reads
        lab.cluster.put(make_pod("a", ip="10.9.9.9"))
        lab.cluster.remove(make_pod("b"))
        rows = seen.targets()
        assert {name: one.state for name, one in rows.items() if one.is_target} == dict.fromkeys(
            "ac", TargetState.STANDBY
        )
        assert (rows["a"].service.address, rows["a"].service.value("shard_path")) == ("10.9.9.9", "s1")
        assert lab.consul.reads == reads
        vote.decide(is_leader=True)
        await lab.until("a", "c")
        await lab.until_so(lambda: seen.targets()["a"].state is TargetState.REGISTERED)


async def test_standby_tells_when_a_removal_need_not_wait_any_longer() -> None:
    """An endpoint that left its slice may come back in another one, until a while has passed."""
    seen = Seen(leadership=Vote(is_leader=False))
    lab = seen.lab
    async with lab.running():
        await following(seen, "ab")
        await lab.until_so(lambda: lab.status.is_standby)
        position = seen.view.position
        lab.controller.on_change(Change((), ("pod--shop--a",), time.monotonic(), wait=0.02))
        assert seen.view.changed_since(position) == set()
        await lab.until_so(lambda: seen.view.changed_since(position) == {"pod--shop--a"})
        assert len(lab.queue) == 0


async def test_standby_shows_what_the_leaders_brake_keeps() -> None:
    """A Pod that no list shows any more is a target as long as the leader leaves it in Consul."""
    seen = Seen(leadership=Vote(is_leader=False), timing=ATTENTIVE)
    lab = seen.lab
    async with lab.running():
        await following(seen, "ab")
        lab.cluster.put_list([make_pod("a")])
        reads = lab.consul.reads
        await lab.until_so(lambda: lab.consul.reads > reads + 1)
        assert seen.targets()["b"].state is TargetState.KEPT
        lab.consul.remove_by_hand("pod--shop--b")
        await lab.until_so(lambda: list(seen.targets()) == ["a"])


async def test_lost_agents_are_shown_with_times_of_the_day() -> None:
    """The orphan collector reports monotonic seconds."""
    seen = Seen()
    now = time.monotonic()
    seen.lab.status.lost_agents = (LostAgent("old", now - 60, now + 540, {"not_here": 2}),)
    (shown,) = (await status_of(seen))["lost_agents"]
    assert (shown["node"], shown["stays"]) == ("old", {"not_here": 2})
    assert abs(shown["since"] - (time.time() - 60)) < SLACK
    assert abs(shown["due"] - (time.time() + 540)) < SLACK


def test_secrets_are_not_shown() -> None:
    """Of a secret only that it is set."""
    shown = shown_settings(SETTINGS.common.environment)
    assert shown["CONSUL_HTTP_TOKEN"] == "set"
    assert shown["CLUSTER_NAME"] == "lab"
    assert shown["SYNC_PERIOD"] == "600"
    assert "t0p-secret" not in repr(shown)
