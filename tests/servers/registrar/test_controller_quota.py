"""MAX_TARGETS_PER_NAMESPACE in the running controller: who gets a place, and what is shown of the others."""

import pytest

from k8s_consul_registrar.admin.view import Census, TargetState
from k8s_consul_registrar.model import Pod
from k8s_consul_registrar.registrar.brake import BrakeRules, Ground
from support.builders import make_pod, our_pod_service
from support.controller_lab import ControllerLab, Seen

on_both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])


def aged(name: str, age: int) -> Pod:
    """Return a Pod of an age in seconds."""
    return make_pod(name, created=f"2026-11-22T10:00:{59 - age:02}Z")


@on_both
async def test_oldest_pods_get_the_places_and_others_follow_as_these_become_free(
    checks_versions: bool,
) -> None:
    """Services that Consul holds come first, and none of them is touched."""
    lab = ControllerLab(checks_versions=checks_versions, quota=2)
    lab.consul.put_by_hand(our_pod_service("held"))
    async with lab.running():
        lab.cluster.put_list([aged("held", 0), aged("old", 30), aged("older", 40), aged("young", 10)])
        await lab.until_so(lambda: lab.status.has_synced)
        await lab.until("held", "older")
        assert set(lab.status.blocked) == {"pod--shop--old", "pod--shop--young"}
        lab.cluster.remove(aged("held", 0))
        await lab.until("old", "older")
        lab.cluster.put(aged("oldest", 50))
        lab.cluster.remove(aged("older", 40))
        await lab.until("old", "oldest")
        await lab.resynced()
        assert lab.names_held == {"old", "oldest"}
        assert set(lab.status.blocked) == {"pod--shop--young"}


async def test_lower_limit_removes_nothing() -> None:
    """Services registered under a higher limit stay, however many there are."""
    lab = ControllerLab(quota=1)
    for name in "abcdef":
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        lab.cluster.put_list([make_pod(name) for name in "abcdefg"])
        await lab.until_so(lambda: lab.status.has_synced)
        await lab.resynced()
        assert lab.names_held == {*"abcdef"}
        assert set(lab.status.blocked) == {"pod--shop--g"}


@on_both
async def test_lower_limit_removes_the_youngest_after_the_long_wait_where_that_is_wanted(
    checks_versions: bool,
) -> None:
    """However few they are; each with its proof, and they are blocked from then on."""
    brake = BrakeRules(confirm=0, confirm_start=0.5)
    lab = ControllerLab(checks_versions=checks_versions, quota=3, quota_removes=True, brake=brake)
    pods = [aged(name, 40 - at) for at, name in enumerate("abcd")]
    for one in pods:
        lab.consul.put_by_hand(our_pod_service(one.name))
    async with lab.running():
        lab.cluster.put_list(pods)
        await lab.until(*"abc")
        (removal,) = lab.status.removals
        assert (removal.id, removal.proof.ground) == ("pod--shop--d", Ground.QUOTA)
        assert (removal.proof.brake, removal.proof.key) == ("held for 0.5 s", pods[3].key)
        await lab.resynced()
        await lab.until_so(lambda: set(lab.status.blocked) == {"pod--shop--d"})
        assert lab.names_held == {*"abc"}
        lab.cluster.remove(pods[0])
        await lab.until(*"bcd")
        lab.cluster.put(aged("a", 59))
        await lab.until_so(lambda: set(lab.status.blocked) == {"pod--shop--a"})
        await lab.resynced()
        assert lab.names_held == {*"bcd"}, "one that comes back waits like any other, however old it is"
        assert len([one for one in lab.status.removals if one.proof.ground is Ground.QUOTA]) == 1


@on_both
async def test_limit_that_is_wrong_is_held_at_each_start(checks_versions: bool) -> None:
    """A mass removal, and a single one too: nothing goes before the long wait is over, and another start begins it again."""
    held = {*"abcdef"}
    services = [our_pod_service(name) for name in held]
    for quota in (1, 1, 5, 0):
        lab = ControllerLab(checks_versions=checks_versions, quota=quota, quota_removes=True)
        for service in services:
            lab.consul.put_by_hand(service)
        async with lab.running():
            lab.cluster.put_list([aged(name, ord(name) - 97) for name in held])
            await lab.until_so(lambda lab=lab: lab.status.has_synced)  # type: ignore[misc]
            await lab.resynced()
            assert lab.names_held == held
            waiting = [one for one in lab.status.held if one.ground is Ground.QUOTA]
            assert sum(len(one.ids) for one in waiting) == (6 - quota if quota else 0)


async def test_limit_that_is_taken_back_in_time_removes_nothing() -> None:
    """While its removal waits, a service that is no longer too much is asked for as before."""
    lab = ControllerLab(quota=2, quota_removes=True, brake=BrakeRules(confirm=0, confirm_start=60))
    for name in "abc":
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        lab.cluster.put_list([aged("a", 30), aged("b", 20), aged("c", 10)])
        await lab.until_so(lambda: any(one.ids == ("pod--shop--c",) for one in lab.status.held))
        lab.cluster.remove(aged("a", 30))
        await lab.until(*"bc")
        await lab.until_so(lambda: not lab.status.held)
        lab.clock.offset += 120
        await lab.resynced()
        assert lab.names_held == {*"bc"}


async def test_blocked_pod_is_shown_and_no_target() -> None:
    """State, reason and metrics say so, and service discovery leaves it out until it has a place."""
    seen = Seen(quota=1)
    lab = seen.lab
    async with lab.running():
        await seen.synced([aged("old", 30), aged("young", 10)])
        rows = seen.targets()
        assert {name: row.state for name, row in rows.items()} == {
            "old": TargetState.REGISTERED,
            "young": TargetState.BLOCKED,
        }
        assert not rows["young"].is_target
        (rejection,) = seen.view.rejections()
        assert (rejection.reason, rejection.key.name) == ("namespace_full", "young")
        census = Census(seen.view, dict)
        await census.refresh()
        assert census.figures().targets["pod", "blocked"] == 1
        assert census.figures().rejections["namespace_full"] == 1
        position = seen.view.position
        lab.cluster.remove(aged("old", 30))
        await lab.until("young")
        assert "pod--shop--young" in (seen.view.changed_since(position) or ())
        assert seen.targets()["young"].is_target
        assert seen.view.rejections() == []
