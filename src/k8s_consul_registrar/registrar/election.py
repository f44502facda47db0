"""The rules of a leader election over one Lease: which of several replicas writes.

They are client-go's (`tools/leaderelection/leaderelection.go`). A record is judged by how long ago *we* first
saw it, by our own clock, never by the times written in it; every write names the version it replaces. Where
client-go counts the renew deadline from the end of the last renewal, we count from the start of its request:
an answer that we read late must not prolong what others measure from the write.

A Lease is no fence: a leader stopped between its last look at the clock and its write wakes up and writes.
"""

import dataclasses
from datetime import datetime, timedelta

import msgspec
from msgspec.structs import replace

from k8s_consul_registrar.model import Lease

NEVER = float("-inf")
RELEASED_DURATION = 1
_MICROTIME = "%Y-%m-%dT%H:%M:%S.%fZ"


class ElectionTiming(msgspec.Struct, frozen=True):
    """Times of a lease, in seconds: how long it lasts, when its holder stops writing, how often it is tried for.

    Between `renew_deadline` and `lease_duration` the last writes come to an end. A standby
    stretches `retry_period` by up to `jitter` times, so that replicas do not ask in step. ValueError unless
    lease_duration > renew_deadline > jitter * retry_period, client-go's own condition.
    """

    lease_duration: int = 15
    renew_deadline: float = 10.0
    retry_period: float = 2.0
    jitter: float = 1.2

    def __post_init__(self) -> None:
        """Refuse times under which two could lead, or one could not keep leading."""
        if not self.retry_period > 0 or not self.jitter >= 1:
            raise ValueError("the retry period must be above 0")
        if not self.lease_duration > self.renew_deadline:
            raise ValueError(
                f"the lease duration ({self.lease_duration:g} s) must be longer than "
                f"the renew deadline ({self.renew_deadline:g} s)"
            )
        if not self.renew_deadline > self.jitter * self.retry_period:
            raise ValueError(
                f"the renew deadline ({self.renew_deadline:g} s) must be longer than "
                f"{self.jitter:g} times the retry period ({self.retry_period:g} s)"
            )

    def stretched(self, spread: float) -> float:
        """Return the retry period, stretched by a share `spread` (0 to 1) of what is allowed."""
        return self.retry_period * (1 + (self.jitter - 1) * spread)


class Wait(msgspec.Struct, frozen=True):
    """Do nothing until a moment of the clock."""

    until: float


class ReadLease(msgspec.Struct, frozen=True):
    """Read the record."""


class CreateLease(msgspec.Struct, frozen=True):
    """Write the first record; it must not be there yet."""

    lease: Lease


class UpdateLease(msgspec.Struct, frozen=True):
    """Replace the version of the record that the lease names."""

    lease: Lease


class Done(msgspec.Struct, frozen=True):
    """The end: the lease is released, or was never ours."""


ElectionAction = Wait | ReadLease | CreateLease | UpdateLease | Done


class Election(msgspec.Struct, frozen=True):
    """The state of one contender; times are of its own clock, in seconds.

    `seen` is the record as last read or written, None where there is none, and `seen_at` when it was first
    seen like that. `is_fresh` says it may be written over without being read again; `may_hold`, that the
    record may name us. We lead until `writes_until`; before `next_at` the API server is asked nothing.
    """

    identity: str
    timing: ElectionTiming
    seen: Lease | None = None
    seen_at: float = NEVER
    is_fresh: bool = False
    may_hold: bool = False
    writes_until: float = NEVER
    next_at: float = NEVER
    has_clashed: bool = False
    is_resigning: bool = False

    def is_leading(self, now: float) -> bool:
        """Return whether we may start a write now."""
        return now < self.writes_until

    @property
    def is_ours(self) -> bool:
        """True if the record, as last seen, names us."""
        return self.seen is not None and self.seen.holder == self.identity

    @property
    def free_at(self) -> float:
        """The time at which we may take the record over, unless it is renewed."""
        if self.seen is None or not self.seen.holder or self.is_ours:
            return NEVER
        duration = self.seen.duration if self.seen.duration > 0 else self.timing.lease_duration
        return self.seen_at + duration


def next_action(election: Election, now: float, wall: datetime) -> ElectionAction:
    """Return the next action; `wall` (UTC) is only written into the record, for people."""
    if election.is_resigning:
        return _next_of_release(election, wall)
    if now < election.next_at:
        lapses = election.writes_until if election.is_leading(now) else election.next_at
        return Wait(min(election.next_at, lapses))
    if not election.is_fresh:
        return ReadLease()
    if election.seen is None:
        stamp = micro_time(wall)
        return CreateLease(Lease(election.identity, election.timing.lease_duration, stamp, stamp))
    return UpdateLease(
        _renewed(election, wall) if election.is_ours else _taken(election, election.seen, wall)
    )


def asked(election: Election, action: ElectionAction) -> Election:
    """Note that the action is under way: until a write is answered, the content of the record is unknown."""
    if isinstance(action, (CreateLease, UpdateLease)):
        return replace(election, is_fresh=False, may_hold=True)
    return election


def on_read(election: Election, lease: Lease | None, now: float, spread: float) -> Election:
    """Record the Lease as read, None if there is none; `now` is when the answer arrived."""
    is_same = lease is not None and lease == election.seen
    election = replace(
        election,
        seen=lease,
        seen_at=election.seen_at if is_same else now,
        is_fresh=True,
        next_at=NEVER,
    )
    if election.is_ours:
        return replace(election, may_hold=True)
    election = replace(election, may_hold=False, writes_until=NEVER)
    if now < election.free_at:
        next_at = min(now + election.timing.stretched(spread), election.free_at)
        return replace(election, is_fresh=False, next_at=next_at, has_clashed=False)
    return election


def on_written(election: Election, lease: Lease, started: float) -> Election:
    """Record our own write by a request that began at `started`."""
    election = replace(election, seen=lease, seen_at=started, is_fresh=True, has_clashed=False)
    if not election.is_ours:
        return replace(election, may_hold=False, writes_until=NEVER)
    return replace(
        election,
        may_hold=True,
        writes_until=started + election.timing.renew_deadline,
        next_at=started + election.timing.retry_period,
    )


def on_conflict(election: Election, now: float, spread: float) -> Election:
    """Record that another replica wrote: whatever we led, we do not until we have read who holds it.

    The record is read at once; after a second conflict in a row, when the next try is due.
    """
    next_at = now + election.timing.stretched(spread) if election.has_clashed else NEVER
    gives_up = election.is_resigning and election.has_clashed
    return replace(
        election,
        is_fresh=False,
        may_hold=election.may_hold and not gives_up,
        writes_until=NEVER,
        next_at=next_at,
        has_clashed=True,
    )


def on_failure(election: Election, started: float, spread: float) -> Election:
    """Record that a request begun at `started` got no answer that shows the record as it is now.

    A leader goes on until its deadline; one that is resigning leaves the lease to expire.
    """
    wait = election.timing.retry_period if election.is_ours else election.timing.stretched(spread)
    return replace(
        election,
        is_fresh=False,
        may_hold=election.may_hold and not election.is_resigning,
        next_at=started + wait,
    )


def resigned(election: Election) -> Election:
    """Stop leading at once; only the release is left."""
    return replace(election, is_resigning=True, writes_until=NEVER, has_clashed=False)


def micro_time(wall: datetime) -> str:
    """Return a time in UTC as Kubernetes' MicroTime."""
    return wall.strftime(_MICROTIME)


def _next_of_release(election: Election, wall: datetime) -> ElectionAction:
    if not election.may_hold:
        return Done()
    if not election.is_fresh:
        return ReadLease()
    return UpdateLease(_released(election, wall)) if election.is_ours else Done()


def _taken(election: Election, seen: Lease, wall: datetime) -> Lease:
    stamp = micro_time(wall)
    return dataclasses.replace(
        seen,
        holder=election.identity,
        duration=election.timing.lease_duration,
        acquired=stamp,
        renewed=stamp,
        transitions=seen.transitions + 1,
    )


def _renewed(election: Election, wall: datetime) -> Lease:
    assert election.seen is not None
    return dataclasses.replace(
        election.seen,
        duration=election.timing.lease_duration,
        renewed=_later(wall, election.seen.renewed),
    )


def _released(election: Election, wall: datetime) -> Lease:
    assert election.seen is not None
    stamp = micro_time(wall)
    return dataclasses.replace(
        election.seen, holder="", duration=RELEASED_DURATION, acquired=stamp, renewed=stamp
    )


def _later(wall: datetime, before: str) -> str:
    """Return a renewal time after the last one, even where the wall clock was set back.

    Others recognise a renewal only by its text: one that says what an earlier one said would be none to them.
    """
    stamp = micro_time(wall)
    try:
        last = datetime.strptime(before, _MICROTIME)  # noqa: DTZ007 - both are UTC, neither says so
        return max(stamp, micro_time(last + timedelta(microseconds=1)))
    except (ValueError, OverflowError):
        return stamp
