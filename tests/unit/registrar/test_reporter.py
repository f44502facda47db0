"""The reporter: persistent conditions are logged once, changes at most once a second, and many things by count."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.kube.source_state import Failed, SourceStatus, Synced
from k8s_consul_registrar.model import Kind, ObjectKey, Rejection, Source, Written
from k8s_consul_registrar.registrar.brake import Held
from k8s_consul_registrar.registrar.decide import Conflict, Kept
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.reporter import (
    CHANGES_INTERVAL,
    MOST_ERRORS,
    MOST_NAMED,
    LogOnce,
    Reporter,
)
from k8s_consul_registrar.registrar.status import RECENT, Counts, RegistrarStatus
from support.builders import make_pod
from support.controller_lab import ControllerLab
from support.memory import PODS


class Desk:
    """A reporter with a clock of the test's own, and what it logs."""

    def __init__(self, lines: list[Any]) -> None:
        self.now = 100.0
        self.lines = lines
        self.status = RegistrarStatus()
        self.registry = CollectorRegistry()
        self.reporter = Reporter(RegistrarMetrics(self.registry), self.status, lambda: self.now)

    def events(self, event: str) -> list[Mapping[str, Any]]:
        """Return the log lines of an event."""
        return [line for line in self.lines if line["event"] == event]

    def value(self, name: str, **labels: str) -> float:
        """Return one figure."""
        return self.registry.get_sample_value(f"k8s_consul_registrar_{name}", labels) or 0.0

    def resynced(self, *rejections: Rejection, held: tuple[Held, ...] = (), **counts: int) -> None:
        """Report a resync."""
        self.reporter.resynced(Counts(**counts), was_read=True, kept={}, held=held, rejections=rejections)


@pytest.fixture
def desk() -> Iterator[Desk]:
    """Return a reporter whose log lines are captured."""
    with structlog.testing.capture_logs() as lines:
        yield Desk(lines)


def rejection(name: str, detail: str = "no IP") -> Rejection:
    """Return why a Pod is no target."""
    return Rejection(ObjectKey(Kind.POD, "shop", name), Reason.NO_IP, detail)


def test_log_once_with_one_condition_reports_its_beginning_and_its_changes() -> None:
    """The same text again is nothing new; after its end it is."""
    once = LogOnce()
    assert [once.new("a", text) for text in ("x", "x", "y", "y")] == [True, False, True, False]
    assert (once.over("a"), once.over("a"), len(once)) == (True, False, 0)
    assert once.new("a", "y")


def test_log_once_with_many_conditions_forgets_those_that_ended() -> None:
    """`only` names what stands now: memory follows that."""
    once = LogOnce()
    assert once.only({"a": "1", "b": "1"}) == [("a", "1"), ("b", "1")]
    assert once.only({"b": "1", "c": "1"}) == [("c", "1")]
    assert once.only({"a": "1", "c": "2"}) == [("a", "1"), ("c", "2")]
    assert len(once) == 2
    once.clear()
    assert len(once) == 0


def test_changes_in_a_burst_are_logged_at_once_and_then_once_a_second(desk: Desk) -> None:
    """The first is a line of its own, the rest of its second is one line with the sums."""
    assert desk.reporter.due == math.inf
    desk.reporter.batch(Counts(registered=1, seconds=0.5))
    assert [(one["passes"], one["registered"]) for one in desk.events("changes")] == [(1, 1)]
    for _ in range(3):
        desk.now += CHANGES_INTERVAL / 4
        desk.reporter.batch(Counts(updated=2, deregistered=1, refused=1, unchanged=4, seconds=0.5))
    assert len(desk.events("changes")) == 1
    assert desk.reporter.due == 100.0 + CHANGES_INTERVAL
    desk.now = desk.reporter.due
    desk.reporter.flush_due()
    line = desk.events("changes")[1]
    assert {
        one: line[one] for one in ("passes", "updated", "deregistered", "refused", "unchanged", "seconds")
    } == {
        "passes": 3,
        "updated": 6,
        "deregistered": 3,
        "refused": 3,
        "unchanged": 12,
        "seconds": 1.5,
    }
    assert desk.reporter.due == math.inf
    desk.reporter.flush()
    assert len(desk.events("changes")) == 2


def test_changes_before_a_resync_are_logged_before_it(desk: Desk) -> None:
    """Reports that are not due yet would be out of order otherwise."""
    desk.reporter.batch(Counts(registered=1))
    desk.reporter.batch(Counts(registered=2))
    desk.resynced(unchanged=3)
    assert [one["event"] for one in desk.lines] == ["changes", "changes", "resync"]
    assert [one.is_resync for one in desk.status.recent] == [True, False, False]


def test_batches_without_a_write_are_no_success(desk: Desk) -> None:
    """A decision that needs no request says nothing about Consul, and is no line."""
    desk.reporter.batch(Counts(unchanged=5))
    assert desk.value("passes_total", outcome="success") == 0
    assert desk.value("last_success_timestamp_seconds") == 0
    assert desk.lines == []
    desk.reporter.batch(Counts(registered=1, refused=1))
    assert desk.value("passes_total", outcome="partial") == 1
    assert desk.value("last_success_timestamp_seconds") == 0
    desk.reporter.batch(Counts(registered=1))
    assert desk.value("passes_total", outcome="success") == 1
    assert desk.value("last_success_timestamp_seconds") > 0


def test_many_rejections_are_named_in_part(desk: Desk) -> None:
    """A resync names the first of them; a second resync none, unless one is new or changed."""
    every = [rejection(f"p{number}") for number in range(1000)]
    desk.resynced(*every, rejected=1000)
    assert len(desk.events("rejected")) == MOST_NAMED
    assert desk.events("resync")[0]["rejected"] == 1000
    desk.resynced(*every)
    assert len(desk.events("rejected")) == MOST_NAMED
    desk.resynced(*every[1:], rejection("p0", "changed"))
    assert len(desk.events("rejected")) == MOST_NAMED + 1


def test_many_events_in_one_second_are_named_in_part(desk: Desk) -> None:
    """Rejections, refusals and conflicts share the second's lines; the next second has its own."""
    for number in range(100):
        desk.reporter.rejected(rejection(f"p{number}"))
        desk.reporter.refused("register", f"r{number}", "no")
        conflict = Conflict(ObjectKey(Kind.POD, "shop", f"c{number}"), "cluster=other")
        desk.reporter.conflict(f"c{number}", conflict)
    assert len(desk.lines) == MOST_NAMED
    assert (len(desk.status.refused), len(desk.status.conflicts)) == (100, 100)
    assert desk.value("conflicts") == 100
    assert desk.value("writes_total", verb="register", outcome="refused") == 100
    desk.now += 1.0
    desk.reporter.rejected(rejection("later"))
    assert len(desk.lines) == MOST_NAMED + 1


def test_condition_of_one_id_is_logged_once_while_it_stands(desk: Desk) -> None:
    """It is forgotten when the ID is settled, and logged again when it comes back."""
    conflict = Conflict(ObjectKey(Kind.POD, "shop", "a"), "cluster=other")
    for _ in range(3):
        desk.reporter.conflict("a", conflict)
        desk.reporter.refused("update", "b", "no")
    assert len(desk.lines) == 2
    for service_id in "ab":
        desk.reporter.settled(service_id)
    assert (desk.status.conflicts, desk.status.refused, desk.value("conflicts")) == ({}, {}, 0)
    desk.reporter.conflict("a", conflict)
    desk.reporter.refused("update", "b", "no")
    assert len(desk.lines) == 4


def test_losers_of_an_id_are_rejected_until_it_is_settled(desk: Desk) -> None:
    """They appear in the status and in the sums."""
    desk.reporter.lost("x", (rejection("a"), rejection("b")))
    desk.reporter.lost("y", (rejection("a"),))
    assert [one.key.name for one in desk.status.lost_rejections()] == ["a", "b"]
    desk.reporter.settled("x")
    assert [one.key.name for one in desk.status.lost_rejections()] == ["a"]


def test_outage_is_logged_at_its_beginning_and_its_end(desk: Desk) -> None:
    """The metric follows; a problem that stays is one line."""
    desk.reporter.consul("", is_up=False)
    assert (desk.lines, desk.value("consul_up")) == ([], 0)
    desk.reporter.consul("", is_up=True)
    assert (desk.lines, desk.value("consul_up")) == ([], 1)
    for _ in range(5):
        desk.reporter.consul("timed out", is_up=False)
        assert desk.value("consul_up") == 0
    desk.reporter.consul("", is_up=True)
    assert [one["log_level"] for one in desk.lines] == ["error", "info"]
    assert desk.status.consul_problem == ""


def test_source_that_fails_is_logged_once_and_shown(desk: Desk) -> None:
    """Its kind counts as not followed while any of its sources is not."""
    other = Source(Kind.POD, "other")
    good = SourceStatus(Synced(), listed_at=1.0, list_began_at=0.0)
    bad = SourceStatus(Failed(1.0, "forbidden", "forbidden"), listed_at=1.0, list_began_at=0.0)
    for _ in range(3):
        desk.reporter.sources({PODS: good, other: bad})
    assert [one["problem"] for one in desk.lines] == ["forbidden"]
    assert desk.value("source_followed", kind="pod") == 0
    desk.reporter.sources({PODS: good, other: good})
    assert len(desk.events("can be listed again")) == 1
    assert desk.value("source_followed", kind="pod") == 1
    assert desk.status.source_problems == {}


def test_held_removals_are_logged_once_and_counted(desk: Desk) -> None:
    """The line names the first of them."""
    held = Held(PODS, tuple(f"s{number}" for number in range(50)), 0.0, 600.0)
    desk.resynced(held=(held,))
    desk.resynced(held=(held,))
    (line,) = desk.events("brake: a mass removal is held")
    assert "50 services" in line["held"]
    assert line["held"].count(", ") == MOST_NAMED - 1
    assert desk.value("brake_held_services") == 50
    desk.resynced()
    assert desk.value("brake_held_services") == 0


def test_kept_services_are_counted_by_reason(desk: Desk) -> None:
    """A reason that no longer holds is 0 again."""
    desk.reporter.resynced(Counts(), was_read=True, kept={Kept.BLIND: 3}, held=(), rejections=())
    assert desk.value("kept_services", why="blind") == 3
    desk.reporter.resynced(Counts(), was_read=True, kept={Kept.REJECTED: 1}, held=(), rejections=())
    assert (desk.value("kept_services", why="blind"), desk.value("kept_services", why="rejected")) == (0, 1)


@pytest.mark.forces_internal_error
def test_internal_errors_are_counted_each_and_logged_once(desk: Desk) -> None:
    """The line has the traceback; the same error at another place is another line."""
    for where in ("decision about a", "decision about a", "decision about b"):
        desk.reporter.internal_error(where, ValueError("x"))
    assert desk.value("internal_errors_total") == 3
    assert [one["where"] for one in desk.lines] == ["decision about a", "decision about b"]
    assert all(isinstance(one["exc_info"], ValueError) for one in desk.lines)


@pytest.mark.forces_internal_error
def test_internal_errors_of_many_ids_are_remembered_up_to_a_bound(desk: Desk) -> None:
    """Each names an ID, so they would add up; a resync forgets none of them."""
    for number in range(MOST_ERRORS - 1):
        desk.reporter.internal_error(f"decision about p{number}", ValueError("no"))
    desk.resynced()
    desk.reporter.internal_error("decision about p0", ValueError("no"))
    assert len(desk.events("internal error; please report it")) == MOST_ERRORS - 1
    for number in range(10):
        desk.reporter.internal_error(f"decision about q{number}", ValueError("no"))
    assert len(desk.reporter._errors) <= MOST_ERRORS


def test_standby_shows_nothing_of_what_it_wrote(desk: Desk) -> None:
    """Conflicts, refusals and held removals are the leader's to show."""
    desk.reporter.leads()
    desk.reporter.conflict("a", Conflict(ObjectKey(Kind.POD, "shop", "a"), "x"))
    desk.reporter.refused("update", "b", "no")
    desk.reporter.lost("c", (rejection("c"),))
    desk.resynced(held=(Held(PODS, ("d",), 0.0, 600.0),))
    assert desk.value("leader") == 1
    desk.reporter.stands_by()
    status = desk.status
    assert (status.conflicts, status.refused, status.lost, status.held) == ({}, {}, {}, ())
    figures = [desk.value(one) for one in ("leader", "conflicts", "brake_held_services")]
    assert figures == [0, 0, 0]


def test_writes_are_counted_and_named_in_part(desk: Desk) -> None:
    """The metric counts every write; the debug log names the first of a batch."""
    desk.reporter.wrote("register", [(f"s{number}", None) for number in range(64)], Written(64))
    assert desk.value("writes_total", verb="register", outcome="success") == 64
    assert len(desk.events("register")) == MOST_NAMED


def test_recent_activity_is_bounded(desk: Desk) -> None:
    """The status page shows the latest of it."""
    for number in range(3 * RECENT):
        desk.resynced(unchanged=number)
    assert len(desk.status.recent) == RECENT
    assert desk.status.recent[0].counts.unchanged == 3 * RECENT - 1


async def test_burst_of_changes_through_the_controller_is_two_lines() -> None:
    """One at once, and one with the rest when its second is over, though nothing else happens then."""
    names = [f"p{number}" for number in range(10)]
    lab = ControllerLab()
    with structlog.testing.capture_logs() as lines:
        async with lab.running():
            await lab.synced()
            lines.clear()
            for count, name in enumerate(names, 1):
                lab.cluster.put(make_pod(name))
                await lab.until(*names[:count])

            def changes() -> list[tuple[int, int]]:
                told = [line for line in lines if line["event"] == "changes"]
                return [(line["registered"], line["deregistered"]) for line in told]

            await lab.until_so(lambda: sum(one for one, _ in changes()) == len(names))
            assert len(changes()) < len(names)
            lab.cluster.remove(make_pod("p0"))
            await lab.until(*names[1:])
    assert changes()[0] == (1, 0)
    assert changes()[-1] == (0, 1), "what was not due is logged at the end"


def test_failures_that_alternate_are_logged_once_each(desk: Desk) -> None:
    """A new reason is logged, and logged again only after the failure was over."""
    event = "Consul cannot be used; trying again"
    for text in ("refused", "timeout", "refused", "timeout"):
        desk.reporter.consul(text, is_up=False)
    assert [line["problem"] for line in desk.events(event)] == ["refused", "timeout"]
    desk.reporter.consul("", is_up=True)
    desk.reporter.consul("refused", is_up=False)
    assert len(desk.events(event)) == 3
