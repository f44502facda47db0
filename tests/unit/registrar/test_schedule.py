"""The schedule: what is due next, from time and outcomes alone, with reads of everything under a budget."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.registrar.schedule import (
    JUDGE_GAP,
    GhostChecks,
    Need,
    Schedule,
    ScheduleRules,
    Step,
    StepKind,
)

RULES = ScheduleRules(period=600, probe=2, burst=2, gap=30)
RESYNC, JUDGE = Step(StepKind.RESYNC), Step(StepKind.JUDGE)
PROBE, ORPHANS = Step(StepKind.PROBE), Step(StepKind.ORPHANS)


def rested(rules: ScheduleRules = RULES, *, reads: int = 0, seconds: float = 0.1) -> Schedule:
    """Return a schedule after a start and this many reads at second 0, with nothing wanted."""
    schedule = Schedule.start(rules, 0.0).began(StepKind.RESYNC, 0.0)
    for _ in range(reads):
        schedule = schedule.resynced(0.0, seconds)
    return schedule


def test_schedule_start_resyncs_at_once() -> None:
    """Nothing can be decided before."""
    assert Schedule.start(RULES, 5.0).next(5.0) == RESYNC


def test_schedule_new_leader_waits_for_no_budget() -> None:
    """Whatever was read before it led."""
    spent = rested(reads=10, seconds=100.0)
    assert spent.want(Need.NOW).next(0.0) == RESYNC
    assert spent.want(Need.URGENT).next(0.0).kind is StepKind.SLEEP


def test_schedule_resyncs_once_a_period() -> None:
    """Counted from the last one, and with a probe in between every two seconds."""
    schedule = rested(reads=1)
    assert schedule.next(1.0) == Step(StepKind.SLEEP, 2.0)
    assert schedule.next(2.0) == PROBE
    schedule = schedule.probed(2.0)
    assert schedule.next(2.0) == Step(StepKind.SLEEP, 4.0)
    assert schedule.next(599.9) == PROBE
    assert schedule.next(600.0) == RESYNC
    assert schedule.began(StepKind.RESYNC, 0.0).resynced(600.0, 0.1).probed(600.0).next(1199.0) == PROBE


def test_schedule_orphans_come_last() -> None:
    """After what is due of the rest; without any there is no look."""
    schedule = rested(reads=1)
    assert schedule.next(1.0, orphans_due=1.0) == ORPHANS
    assert schedule.next(1.0, orphans_due=1.5) == Step(StepKind.SLEEP, 1.5)
    assert schedule.next(2.0, orphans_due=1.0) == PROBE
    assert schedule.want(Need.DRIFT).next(2.0, orphans_due=1.0) == RESYNC


def test_schedule_wants_coalesce() -> None:
    """Many requests make one resync, as urgent as the most urgent of them."""
    schedule = rested()
    for need in (Need.DRIFT, Need.URGENT, Need.DRIFT, Need.NONE):
        schedule = schedule.want(need)
    assert (schedule.need, schedule.next(0.0)) == (Need.URGENT, RESYNC)
    assert schedule.began(StepKind.RESYNC, 0.0).need is Need.NONE


def test_schedule_want_during_a_resync_makes_another_one() -> None:
    """A read does not see changes after its begin."""
    schedule = (
        rested(reads=0).want(Need.DRIFT).began(StepKind.RESYNC, 0.0).want(Need.DRIFT).resynced(1.0, 0.1)
    )
    assert schedule.next(1.0) == RESYNC


def test_schedule_budget_allows_a_burst_and_then_one_read_a_gap() -> None:
    """Two in a row, the third after half a minute."""
    schedule = rested()
    for _ in range(2):
        schedule = schedule.want(Need.DRIFT)
        assert schedule.next(0.0) == RESYNC
        schedule = schedule.began(StepKind.RESYNC, 0.0).resynced(0.0, 0.1)
    schedule = schedule.want(Need.DRIFT)
    assert schedule.resync_at(0.0) == pytest.approx(30)
    assert schedule.resync_at(15.0) == pytest.approx(30)
    schedule = schedule.began(StepKind.RESYNC, 0.0).resynced(30.0, 0.1).want(Need.DRIFT)
    assert schedule.resync_at(31.0) == pytest.approx(60)


def test_schedule_slow_reads_are_spread_wider() -> None:
    """A read of 2 s may take 2 % of the time: the next one begins 100 s later."""
    one = ScheduleRules(burst=1, gap=30, share=0.02)
    assert rested(one, reads=1, seconds=2.0).want(Need.DRIFT).resync_at(0.0) == pytest.approx(100)


def test_schedule_urgent_resync_waits_less() -> None:
    """Two seconds instead of thirty after a quick read, and ten instead of a hundred after one of two."""
    one = ScheduleRules(burst=1, gap=30, share=0.02)
    for seconds, urgent, drift in ((0.1, 2, 30), (2.0, 10, 100)):
        schedule = rested(one, reads=1, seconds=seconds)
        assert schedule.want(Need.URGENT).resync_at(0.0) == pytest.approx(urgent)
        assert schedule.want(Need.DRIFT).resync_at(0.0) == pytest.approx(drift)


def test_schedule_rest_earns_no_more_than_a_burst() -> None:
    """After a long rest there are two reads, not twenty."""
    schedule = rested().resynced(10_000.0, 0.1).resynced(10_000.0, 0.1)
    assert schedule.want(Need.DRIFT).resync_at(10_000.0) > 10_000


def test_schedule_without_a_gap_has_no_bound() -> None:
    """Every read is allowed."""
    schedule = rested(ScheduleRules(burst=1, gap=0), reads=5, seconds=0.0)
    assert schedule.want(Need.DRIFT).next(0.0) == RESYNC


def test_schedule_absences_are_judged_when_they_are_due() -> None:
    """Without a read, unless a resync comes before; the earliest moment counts."""
    schedule = rested(reads=1).judge_at(70.0).judge_at(60.0).judge_at(None).probed(59.0)
    assert schedule.next(59.0) == Step(StepKind.SLEEP, 60.0)
    assert (schedule.next(60.0), schedule.is_at_rest(60.0)) == (JUDGE, False)
    assert schedule.want(Need.NOW).next(60.0) == RESYNC
    for kind in (StepKind.RESYNC, StepKind.JUDGE):
        assert schedule.began(kind, 60.0).judge_due == math.inf


def test_schedule_judging_leaves_a_wanted_resync_wanted() -> None:
    """It does not read what may have changed in Consul."""
    schedule = rested(reads=5).want(Need.DRIFT).judge_at(1.0)
    assert schedule.next(1.0) == JUDGE
    assert schedule.began(StepKind.JUDGE, 1.0).need is Need.DRIFT


def test_schedule_judging_never_repeats_without_pause() -> None:
    """A moment that has passed is no reason to judge again and again."""
    schedule = rested(reads=1).began(StepKind.JUDGE, 1.0).judge_at(1.0).probed(1.0)
    assert schedule.next(1.0) == Step(StepKind.SLEEP, 1.0 + JUDGE_GAP)
    assert schedule.next(1.0 + JUDGE_GAP) == JUDGE


def test_schedule_period_that_is_over_heeds_the_budget() -> None:
    """A `SYNC_PERIOD` shorter than the gap does not read more often than that."""
    schedule = rested(ScheduleRules(period=1, burst=1, gap=30), reads=1)
    assert schedule.resync_at(1.0) == pytest.approx(30)


@given(st.lists(st.tuples(st.floats(0, 20), st.sampled_from([Need.DRIFT, Need.URGENT])), max_size=40))
def test_schedule_reads_never_exceed_their_share(wants: list[tuple[float, Need]]) -> None:
    """However often a resync is wanted, reads of half a second take a fifth of the time, after the burst."""
    now, reads, schedule = 0.0, 0, rested()
    for pause, need in wants:
        now += pause
        schedule = schedule.want(need)
        if schedule.resync_at(now) <= now:
            reads += 1
            schedule = schedule.began(StepKind.RESYNC, 0.0).resynced(now, 0.5)
    assert reads <= RULES.burst + 1 + now / 2


def test_ghost_checks_make_two_looks_after_a_deregistration() -> None:
    """At 30 s and 65 s; later deregistrations postpone none, and have two looks of their own."""
    checks = GhostChecks().noted(0.0)
    assert checks.due == 30
    checks = checks.noted(20.0)
    assert checks.due == 30
    checks = checks.looked(30.0, 0.1, is_pending=False)
    assert checks.due == 65
    checks = checks.looked(65.0, 0.1, is_pending=True)
    assert checks.due == 95
    assert checks.looked(95.0, 0.1, is_pending=False).due == math.inf
    assert checks.looked(95.0, 0.1, is_pending=True).due == 125


def test_ghost_checks_of_a_busy_agent_keep_to_their_share() -> None:
    """Services that come and go without end lead to one look in half a minute, fewer if looks are slow."""
    checks = GhostChecks()
    looks = []
    for second in range(600):
        checks = checks.noted(float(second))
        if checks.due <= second:
            looks.append(second)
            checks = checks.looked(float(second), 1.0, is_pending=False)
    assert looks == list(range(30, 600, 50))


def test_ghost_checks_that_fail_are_repeated() -> None:
    """A resync asks for one look only."""
    checks = GhostChecks().noted_once(0.0).failed(31.0)
    assert checks.due == 61
    assert checks.looked(61.0, 0.0, is_pending=False).due == math.inf
