"""Errors in this program, confined by the running controller to one service ID."""

import math
from collections.abc import Sequence

import pytest
import structlog
from msgspec.structs import replace
from structlog.testing import capture_logs
from structlog.typing import EventDict

from k8s_consul_registrar.model import Drift, Service, Written
from k8s_consul_registrar.targets.resolve import TargetRules
from support.builders import make_pod, our_pod_service
from support.controller_lab import ControllerLab

on_both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])
BAD = "pod--shop--bad"


class BrokenShards:
    """Raises an error that nothing expects, for one service ID, at most so often."""

    def __init__(self, most: float = math.inf) -> None:
        self.errors_left = most

    def choose(self, service_id: str, current: str) -> str:
        """Return no shard, or raise."""
        if self.errors_left and service_id == BAD:
            self.errors_left -= 1
            raise ZeroDivisionError("a mistake of ours")
        return current


def internal_errors(lines: Sequence[EventDict]) -> list[EventDict]:
    """Return the log lines about errors in this program."""
    return [line for line in lines if line["event"].startswith("internal error")]


@pytest.mark.forces_internal_error
@on_both
async def test_exception_in_a_decision_fails_that_id_only(checks_versions: bool) -> None:
    """It is counted and logged once with its traceback, others of its batch go on, and it is tried again."""
    shards = BrokenShards()
    lab = ControllerLab(checks_versions=checks_versions, shards=shards, backoff_cap=0.05)
    lab.consul.put_by_hand(our_pod_service("bad", note="old"))
    with structlog.testing.capture_logs() as lines:
        async with lab.running():
            lab.cluster.put_list([make_pod(name) for name in ("a", "bad", "b")])
            await lab.until("a", "b", "bad")
            await lab.until_so(lambda: lab.value("internal_errors_total") >= 1)
            lab.cluster.put(make_pod("c"))
            lab.cluster.remove(make_pod("a"))
            await lab.until("b", "bad", "c")
            await lab.until_so(lambda: lab.value("internal_errors_total") >= 3)
            assert lab.value("consul_up") == 1
            assert lab.consul.held[BAD].value("note") == "old"
            shards.errors_left = 0
            await lab.until_so(lambda: lab.consul.held[BAD].value("note") == "")
    (line,) = internal_errors(lines)
    assert isinstance(line["exc_info"], ZeroDivisionError)
    assert BAD in line["where"]


@pytest.mark.forces_internal_error
@on_both
async def test_one_exception_is_counted_once(checks_versions: bool) -> None:
    """An error that the first decision meets and the second does not leaves 1 in the metric."""
    lab = ControllerLab(checks_versions=checks_versions, shards=BrokenShards(most=1))
    async with lab.running():
        await lab.synced("a")
        lab.cluster.put(make_pod("bad"))
        await lab.until("a", "bad")
    assert lab.value("internal_errors_total") == 1


@pytest.mark.forces_internal_error
@on_both
async def test_exception_in_encoding_one_service_fails_that_service_only(checks_versions: bool) -> None:
    """The registry raises for one service of a batch: the others are written one by one."""
    lab = ControllerLab(checks_versions=checks_versions, backoff_cap=0.05)
    register = lab.consul.register
    is_broken = True

    async def encoding(services: Sequence[Service]) -> Written:
        if is_broken and any(one.id == BAD for one in services):
            raise TypeError("cannot be encoded")
        return await register(services)

    lab.consul.register = encoding  # type: ignore[method-assign] # a mistake in the codec
    with structlog.testing.capture_logs() as lines:
        async with lab.running():
            lab.cluster.put_list([make_pod(name) for name in ("a", "bad", "b")])
            await lab.until("a", "b")
            await lab.until_so(lambda: BAD in lab.status.refused)
            await lab.until_so(lambda: lab.status.has_synced)
            assert lab.value("internal_errors_total") >= 1
            assert lab.value("consul_up") == 1
            is_broken = False
            await lab.until("a", "b", "bad")
            await lab.until_so(lambda: not lab.status.refused)
    assert len(internal_errors(lines)) == 1


@pytest.mark.forces_internal_error
@on_both
async def test_exception_in_a_resync_does_not_end_the_controller(checks_versions: bool) -> None:
    """It is counted, the resync is made again after a wait, and batches go on meanwhile."""
    lab = ControllerLab(checks_versions=checks_versions)
    services = lab.consul.services
    is_broken = False

    def reading() -> object:
        if is_broken:
            raise KeyError("a mistake of ours")
        return services()

    lab.consul.services = reading  # type: ignore[assignment] # a mistake in the reader
    async with lab.running():
        await lab.synced("a")
        is_broken = True
        lab.consul.foreign = Drift.CHANGED
        await lab.until_so(lambda: lab.value("internal_errors_total") >= 2)
        lab.cluster.put(make_pod("b"))
        await lab.until("a", "b")
        is_broken = False
        lab.consul.remove_by_hand("pod--shop--a")
        await lab.until("a", "b")
        await lab.until_so(lambda: lab.value("consul_up") == 1)


@on_both
async def test_run_without_mistakes_counts_no_internal_error(checks_versions: bool) -> None:
    """Refusals, outages and conflicts are none of this program's errors."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.consul.put_by_hand(our_pod_service("taken", cluster="other"))
    lab.consul.refused = {BAD}
    async with lab.running():
        lab.cluster.put_list([make_pod(name) for name in ("a", "bad", "taken")])
        await lab.until_so(lambda: bool(lab.status.conflicts and lab.status.refused))
        lab.consul.is_down = True
        await lab.until_so(lambda: lab.value("consul_up") == 0)
        lab.consul.is_down = False
        await lab.until_so(lambda: lab.value("consul_up") == 1)
    assert lab.value("internal_errors_total") == 0


async def test_prefix_that_differs_only_in_case_is_named_at_the_start_and_moves_services() -> None:
    """Consul's catalog ignores the case of IDs: the old record goes before the new one can be created."""
    lab = ControllerLab(checks_versions=True, target_rules=TargetRules(id_prefix="Prod-"))
    lab.consul.put_by_hand(replace(our_pod_service("a"), id="prod-pod--shop--a"))
    lab.cluster.put_list([make_pod("a"), make_pod("b")])
    with capture_logs() as logs:
        async with lab.running():
            await lab.until_so(lambda: set(lab.consul.held) == {"Prod-pod--shop--a", "Prod-pod--shop--b"})
    assert any("SERVICE_ID_PREFIX differs only in case" in one["event"] for one in logs)


async def test_service_of_others_whose_id_differs_only_in_case_is_a_conflict() -> None:
    """A record of another cluster under a like ID is not overwritten, and named."""
    lab = ControllerLab(checks_versions=True, target_rules=TargetRules(id_prefix="Prod-"))
    lab.consul.put_by_hand(replace(our_pod_service("a", cluster="other"), id="prod-pod--shop--a"))
    lab.cluster.put_list([make_pod("a"), make_pod("b")])
    async with lab.running():
        await lab.until_so(lambda: "Prod-pod--shop--b" in lab.consul.held and lab.value("conflicts") == 1)
    assert "Prod-pod--shop--a" not in lab.consul.held
    assert "differs in case" in lab.status.conflicts["Prod-pod--shop--a"].holder
