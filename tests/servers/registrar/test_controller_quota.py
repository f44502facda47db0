"""MAX_TARGETS_PER_NAMESPACE in the running controller: who gets a place, and what is shown of the others."""

import pytest

from k8s_consul_registrar.admin.view import Census, TargetState
from k8s_consul_registrar.model import Pod
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
