"""POLICY: what the running controller writes, and what it shows in place of a write."""

import pytest

from k8s_consul_registrar.admin.view import Census, TargetState
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.ownership import Policy
from support.builders import make_pod, our_pod_service
from support.controller_lab import ControllerLab, Seen

both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])


def withheld(seen: Seen) -> dict[str, int]:
    """Return the withheld writes by verb, as the metrics have them."""
    return dict(Census(seen.view, dict).figures().withheld)


def states(seen: Seen) -> dict[str, TargetState]:
    """Return the states of what is shown, by Pod."""
    return {name: row.state for name, row in seen.targets().items()}


def served(seen: Seen) -> set[str]:
    """Return the Pods that service discovery serves."""
    return {name for name, row in seen.targets().items() if row.is_target}


async def test_upsert_only_registers_and_updates_and_never_removes() -> None:
    """Services that should go are counted and shown, and are no targets; one that comes back is as before."""
    seen = Seen(policy=Policy.UPSERT_ONLY)
    lab = seen.lab
    lab.consul.put_by_hand(our_pod_service("finished"))
    async with lab.running():
        await seen.synced([make_pod("a"), make_pod("b"), make_pod("finished", phase="Succeeded")])
        lab.cluster.remove(make_pod("a"))
        lab.cluster.put(make_pod("b", ip="198.51.100.77"))
        await lab.until_so(lambda: lab.consul.held["pod--shop--b"].address == "198.51.100.77")
        await lab.until_so(lambda: withheld(seen) == {"register": 0, "update": 0, "deregister": 2})
        await lab.resynced()
        assert lab.names_held == {"a", "b", "finished"}
        assert states(seen) == {
            "a": TargetState.UNWANTED,
            "b": TargetState.REGISTERED,
            "finished": TargetState.UNWANTED,
        }
        assert served(seen) == {"b"}
        lab.cluster.put(make_pod("a"))
        await lab.until_so(lambda: withheld(seen)["deregister"] == 1)
        assert states(seen)["a"] is TargetState.REGISTERED


async def test_upsert_only_withholds_what_the_brake_lets_go() -> None:
    """An absence that every rule allows to go stays as well."""
    seen = Seen(policy=Policy.UPSERT_ONLY, brake=BrakeRules(allow_mass=True))
    lab = seen.lab
    for name in "abcdefgh":
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        await seen.synced([])
        await lab.until_so(lambda: withheld(seen)["deregister"] == 8)
        await lab.resynced()
    assert lab.names_held == {*"abcdefgh"}
    assert lab.consul.deregister_calls == 0


@both
async def test_observe_writes_nothing(checks_versions: bool) -> None:
    """It shows each write that is due, and a write that another program makes in its place ends that."""
    lab = ControllerLab(checks_versions=checks_versions, policy=Policy.OBSERVE)
    for name in ("gone", "changed"):
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        pods = [make_pod("new"), make_pod("changed", ip="198.51.100.77"), make_pod("gone", annotations={})]
        lab.cluster.put_list(pods)
        due = {"pod--shop--new": "register", "pod--shop--changed": "update", "pod--shop--gone": "deregister"}
        await lab.until_so(lambda: lab.status.has_synced and lab.status.withheld == due)
        await lab.resynced()
        assert lab.status.withheld == due
        lab.consul.remove_by_hand("pod--shop--gone")
        await lab.until_so(lambda: "pod--shop--gone" not in lab.status.withheld)
        lab.cluster.remove(make_pod("new"))
        await lab.until_so(lambda: set(lab.status.withheld) == {"pod--shop--changed"})
    assert lab.consul.writes == []
    assert (lab.consul.register_calls, lab.consul.deregister_calls) == (0, 0)


async def test_observe_serves_what_the_cluster_wants() -> None:
    """A target that is not written yet with its wanted address, one that changed likewise, and none that may go."""
    seen = Seen(policy=Policy.OBSERVE)
    lab = seen.lab
    lab.consul.put_by_hand(our_pod_service("gone"))
    async with lab.running():
        await seen.synced([make_pod("new"), make_pod("gone", annotations={})])
        assert states(seen) == {"new": TargetState.WITHHELD, "gone": TargetState.UNWANTED}
        generation = seen.view.generation
        lab.cluster.put(make_pod("new", ip="198.51.100.77"))
        await lab.until_so(lambda: seen.targets()["new"].service.address == "198.51.100.77")
        assert seen.view.generation != generation
        assert served(seen) == {"new"}
        held: dict[str, Service] = lab.consul.held
        assert set(held) == {"pod--shop--gone"}
