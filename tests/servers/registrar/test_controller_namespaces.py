"""NAMESPACE_LABEL_SELECTOR in the running controller: only objects in selected namespaces become targets."""

import pytest

from k8s_consul_registrar.admin.view import About, View
from k8s_consul_registrar.model import Kind, Namespace, Source
from k8s_consul_registrar.registrar.brake import BrakeRules
from support.builders import make_pod, our_pod_service
from support.controller_lab import ControllerLab
from support.memory import PODS

NAMESPACES = Source(Kind.NAMESPACE)
RULES = BrakeRules(confirm=60, confirm_start=600)
on_both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])


def lab_of(*, checks_versions: bool = True) -> ControllerLab:
    """Return a lab that selects namespaces; its cluster is asked by name as the API server answers."""
    return ControllerLab(
        checks_versions=checks_versions,
        sources=(NAMESPACES, PODS),
        brake=RULES,
        selects_namespaces=True,
    )


def held(lab: ControllerLab) -> set[str]:
    """Return what Consul holds, as namespace and name."""
    return {service_id.removeprefix("pod--").replace("--", "/") for service_id in lab.consul.held}


def deselect(lab: ControllerLab, *names: str) -> None:
    """Have a read by name say that these Pods are in no selected namespace."""
    lab.cluster.unselected |= {make_pod(*name.split("/")[::-1]).key for name in names}


@on_both
async def test_only_pods_in_selected_namespaces_are_registered(checks_versions: bool) -> None:
    """In whatever order they are known; a namespace that is selected later brings its Pods."""
    lab = lab_of(checks_versions=checks_versions)
    async with lab.running():
        lab.cluster.put_list([make_pod("a"), make_pod("b", "pay")])
        lab.cluster.put_list([Namespace("shop", {})], NAMESPACES)
        await lab.until_so(lambda: lab.status.has_synced)
        await lab.until_so(lambda: held(lab) == {"shop/a"})
        lab.cluster.put(make_pod("c", "pay"))
        lab.cluster.put(make_pod("d"))
        await lab.until_so(lambda: held(lab) == {"shop/a", "shop/d"})
        lab.cluster.put(Namespace("pay", {}))
        await lab.until_so(lambda: held(lab) == {"shop/a", "shop/d", "pay/b", "pay/c"})


@on_both
async def test_namespace_that_loses_its_label_keeps_its_services_for_the_long_wait(
    checks_versions: bool,
) -> None:
    """However few they are; a Pod deleted meanwhile goes at once, and all stay if the label comes back."""
    lab = lab_of(checks_versions=checks_versions)
    async with lab.running():
        lab.cluster.put_list([Namespace("shop", {}), Namespace("pay", {})], NAMESPACES)
        lab.cluster.put_list(
            [make_pod(name) for name in "abcdefgh"] + [make_pod("x", "pay"), make_pod("y", "pay")]
        )
        await lab.until_so(lambda: lab.status.has_synced and len(held(lab)) == 10)
        deselect(lab, "pay/x", "pay/y")
        lab.cluster.remove(Namespace("pay", {}))
        await lab.resynced()
        await lab.until_so(lambda: lab.value("brake_held_services") == 2)
        assert len(held(lab)) == 10
        lab.cluster.remove(make_pod("y", "pay"))
        await lab.until_so(lambda: held(lab) == {*(f"shop/{name}" for name in "abcdefgh"), "pay/x"})
        lab.cluster.put(Namespace("pay", {}))
        lab.clock.skip(RULES.confirm_start + 1)
        await lab.resynced()
        assert "pay/x" in held(lab)
        lab.cluster.remove(Namespace("pay", {}))
        await lab.resynced()
        await lab.until_so(lambda: lab.value("brake_held_services") == 1)
        lab.clock.skip(RULES.confirm_start + 1)
        await lab.until_so(lambda: "pay/x" not in held(lab))
        assert lab.status.removals[0].proof.brake == "held for 600 s"


@on_both
async def test_while_namespaces_are_not_known_nothing_is_removed_and_nothing_new_written(
    checks_versions: bool,
) -> None:
    """Not even what the list of Pods lacks."""
    lab = lab_of(checks_versions=checks_versions)
    for name in ("a", "gone"):
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        lab.cluster.put_list([make_pod("a"), make_pod("new")])
        await lab.until_so(lambda: lab.value("resyncs_total") >= 1)
        lab.cluster.store.fail(NAMESPACES, "forbidden", "forbidden")
        lab.clock.skip(10 * RULES.confirm_start)
        view = View(About("lab", "", "agent"), lab.desired, lab.observed, lab.status, lab.rules)
        assert view.unlisted() == "namespaces are not listed yet: forbidden"
        await lab.resynced()
        assert held(lab) == {"shop/a", "shop/gone"}
        lab.cluster.put_list([Namespace("shop", {})], NAMESPACES)
        await lab.until_so(lambda: held(lab) == {"shop/a", "shop/new"})


async def test_selector_that_matches_no_namespace_removes_nothing_for_the_long_wait() -> None:
    """More than are asked for by name: a new list cannot tell why they are missing."""
    lab = lab_of()
    names = [f"p{number}" for number in range(120)]
    for name in names:
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        lab.cluster.put_list([make_pod(name) for name in names])
        lab.cluster.put_list([], NAMESPACES)
        await lab.until_so(lambda: lab.status.has_synced)
        for _ in range(2):
            lab.clock.skip(RULES.confirm + 1)
            lab.cluster.put_list([make_pod(name) for name in names])
            lab.cluster.put_list([], NAMESPACES)
            await lab.resynced()
        assert len(held(lab)) == 120
        assert lab.value("brake_held_services") == 120
