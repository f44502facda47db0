"""Schedule of the controller: when resyncs, drift probes and the orphan collector are due, and the gate. Pure.

Reading everything Consul holds is dear: at 8,200 services under load a read cost Consul a core for seconds. So
requests for a resync coalesce under a budget.
"""

import math
from collections.abc import Callable
from enum import Enum, IntEnum
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.registrar.interfaces import Health

# Seconds between reads of everything, beyond the first few.
FULL_READ_GAP = 30.0
# Seconds between two judgements at least.
JUDGE_GAP = 0.2

# Kinds of work whose failure closes the gate.
RESYNC, BATCH, PROBE = "resync", "batch", "probe"


class Need(IntEnum):
    """Urgency of the next resync."""

    NONE = 0
    DRIFT = 1  # something else may have written to Consul
    URGENT = 2  # targets may be missing, or stay though they are gone
    NOW = 3  # nothing can be decided before it: a start, a new leader


class StepKind(Enum):
    """Kinds of step."""

    RESYNC = "resync"
    JUDGE = "judge"
    PROBE = "probe"
    ORPHANS = "orphans"
    SLEEP = "sleep"


class Step(NamedTuple):
    """Next step; `until` is when a sleep is over: a step of another kind is due."""

    kind: StepKind
    until: float = -math.inf


class ScheduleRules(msgspec.Struct, frozen=True):
    """Intervals and the read budget; all times in seconds.

    `burst` reads of everything are free in a row, then one in `gap`, and at most `share` of the time. An
    urgent one heeds `urgent_gap` and `urgent_share` instead: nothing else removes what a new list does not
    show.
    """

    period: float = 600.0
    probe: float = 2.0
    burst: int = 3
    gap: float = FULL_READ_GAP
    urgent_gap: float = 2.0
    share: float = 0.02
    urgent_share: float = 0.2


class Schedule(msgspec.Struct, frozen=True):
    """When each step is due, in seconds of one monotonic clock; a value that outcomes replace."""

    rules: ScheduleRules
    need: Need
    resync_due: float
    probe_due: float
    judge_due: float
    judge_from: float
    budget: float
    budget_at: float
    gap: float
    urgent_at: float

    @classmethod
    def start(cls, rules: ScheduleRules, now: float) -> "Schedule":
        """Return the schedule of a registrar that has just started, or begins to lead."""
        return cls(
            rules=rules,
            need=Need.NOW,
            resync_due=now + rules.period,
            probe_due=now + rules.probe,
            judge_due=math.inf,
            judge_from=now,
            budget=float(rules.burst),
            budget_at=now,
            gap=rules.gap,
            urgent_at=now,
        )

    def next(self, now: float, orphans_due: float = math.inf) -> Step:
        """Return the step that is due, or a sleep until one is."""
        resync_at = self.resync_at(now)
        if resync_at <= now:
            return Step(StepKind.RESYNC)
        judge_at = max(self.judge_due, self.judge_from)
        if judge_at <= now:
            return Step(StepKind.JUDGE)
        if self.probe_due <= now:
            return Step(StepKind.PROBE)
        if orphans_due <= now:
            return Step(StepKind.ORPHANS)
        return Step(StepKind.SLEEP, min(resync_at, judge_at, self.probe_due, orphans_due))

    def resync_at(self, now: float) -> float:
        """Return when the next resync may begin."""
        need = self.need
        if self.resync_due <= now:
            need = max(need, Need.DRIFT)
        if need is Need.NONE:
            return self.resync_due
        if need is Need.NOW:
            return now
        left = self._refilled(now)
        if left >= 1:
            return now
        by_gap = now + (1 - left) * self.gap
        return min(by_gap, max(now, self.urgent_at)) if need is Need.URGENT else by_gap

    def is_at_rest(self, now: float) -> bool:
        """Return whether neither a resync nor a judgement is wanted now."""
        return self.need is Need.NONE and now < self.judge_due

    def want(self, need: Need) -> "Schedule":
        """Return the schedule with a resync wanted; several requests make one resync."""
        return self if need <= self.need else replace(self, need=need)

    def judge_at(self, at: float | None) -> "Schedule":
        """Return the schedule with a judgement of what nothing asks for at a moment: that reads nothing."""
        return self if at is None or at >= self.judge_due else replace(self, judge_due=at)

    def began(self, kind: StepKind, now: float) -> "Schedule":
        """Return the schedule while a resync or a judgement runs: what is wanted from now on is another one."""
        need = Need.NONE if kind is StepKind.RESYNC else self.need
        return replace(self, need=need, judge_due=math.inf, judge_from=now + JUDGE_GAP)

    def resynced(self, now: float, seconds: float) -> "Schedule":
        """Return the schedule after a resync whose read of Consul took `seconds`."""
        rules = self.rules
        return replace(
            self,
            resync_due=now + rules.period,
            budget=max(self._refilled(now) - 1, 0.0),
            budget_at=now,
            gap=max(rules.gap, seconds / rules.share),
            urgent_at=now + max(rules.urgent_gap, seconds / rules.urgent_share),
        )

    def probed(self, now: float) -> "Schedule":
        """Return the schedule after a probe."""
        return replace(self, probe_due=now + self.rules.probe)

    def _refilled(self, now: float) -> float:
        if self.gap <= 0:
            return float(self.rules.burst)
        return min(self.budget + (now - self.budget_at) / self.gap, float(self.rules.burst))


class GhostChecks(msgspec.Struct, frozen=True):
    """When the catalog is compared with the agent; a value that outcomes replace, in seconds of one clock.

    Looks are due `first` and `last` seconds after a deregistration or a start, so that two of them, at least
    `first` apart, show whatever the agent left. Looks take at most `share` of the time.
    """

    first: float = 30.0
    last: float = 65.0
    share: float = 0.02
    due: float = math.inf
    until: float = -math.inf
    earliest: float = -math.inf

    def noted(self, at: float) -> "GhostChecks":
        """Return the schedule after a deregistration or a start."""
        return replace(self.noted_once(at), until=max(self.until, at + self.last))

    def noted_once(self, at: float) -> "GhostChecks":
        """Return the schedule with one look, which asks for another if it finds something."""
        return replace(self, due=max(min(self.due, at + self.first), self.earliest))

    def looked(self, now: float, seconds: float, *, is_pending: bool) -> "GhostChecks":
        """Return the schedule after a look of `seconds`; `is_pending` if another one can settle more."""
        earliest = now + max(self.first, seconds / self.share)
        if now < self.until:
            due = max(earliest, min(self.until, now + self.last - self.first))
        else:
            due = earliest if is_pending else math.inf
        return replace(self, due=due, earliest=earliest)

    def failed(self, now: float) -> "GhostChecks":
        """Return the schedule after a look that failed."""
        return replace(self, due=now + self.first)


class Gate:
    """The gate before Consul: closed after a failure, for all work alike, and for longer each time.

    It joins the client's health with failures that are not Consul's own, such as a right that is missing.

    Only a success of what failed ends the backoff: reads that work say nothing of writes, nor the reverse.
    """

    def __init__(self, health: Health, timing: Timing, clock: Callable[[], float]) -> None:
        self._health = health
        self._timing = timing
        self._clock = clock
        self._problem, self._failed = "", ""
        self._closed_until = clock()
        self._delays = delays(timing.retry_first, timing.retry_cap)

    @property
    def is_up(self) -> bool:
        """True if Consul does what it is asked for."""
        return self._health.is_up and not self._problem

    @property
    def problem(self) -> str:
        """The reason why not, empty if it does."""
        return self._health.problem or self._problem

    @property
    def opens_at(self) -> float:
        """Moment before which no work may start, in seconds of the clock."""
        return max(self._closed_until, self._health.open_at)

    def close(self, what: str, problem: str) -> None:
        """Close the gate because a resync, batch or probe failed."""
        if self._failed != RESYNC or not self._problem:
            self._failed = what
        self._problem = problem
        self._closed_until = self._clock() + next(self._delays)

    def wait_a_moment(self) -> None:
        """Close the gate for the shortest time, without a failure."""
        self._closed_until = self._clock() + self._timing.retry_first

    def open(self, what: str, *, is_drained: bool) -> None:
        """Note a success; `is_drained` is True if nothing is left to write."""
        if self._failed == BATCH and what != BATCH and not is_drained:
            return
        if self._failed == RESYNC and what != RESYNC:
            return
        if self._problem:
            self._problem = ""
            self._delays = delays(self._timing.retry_first, self._timing.retry_cap)
