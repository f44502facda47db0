"""Takes part in the election: drives its pure rules by the clock and the API server's answers."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from k8s_consul_registrar.errors import ClusterConflict, ClusterError
from k8s_consul_registrar.model import Lease
from k8s_consul_registrar.registrar.election import (
    CreateLease,
    Done,
    Election,
    ElectionAction,
    ElectionTiming,
    ReadLease,
    UpdateLease,
    Wait,
    asked,
    next_action,
    on_conflict,
    on_failure,
    on_read,
    on_written,
    resigned,
)
from k8s_consul_registrar.telemetry import get_logger

# A wait that a loop's coarse timer ends too early is not to become a busy one, in seconds.
SHORTEST_WAIT = 0.001

# CLOCK_MONOTONIC stands still while the machine is suspended, others' leases do not.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

log = get_logger("elector")


def clock() -> float:
    """Return seconds since the machine started, the time it was suspended included where that is known."""
    return time.clock_gettime(_CLOCK)


def utc_now() -> datetime:
    """Return the wall clock's time."""
    return datetime.now(UTC)


class Leases(Protocol):
    """One Lease of an API server; each raises a `ClusterError`."""

    async def get(self) -> Lease | None:
        """Return the record, None where there is none."""

    async def create(self, lease: Lease) -> Lease:
        """Write the first record; raises `ClusterConflict` when there is one."""

    async def update(self, lease: Lease) -> Lease:
        """Replace the version the lease names; raises `ClusterConflict` when there is another."""


class Elector:
    """One of several replicas that want to write, of which one at a time may.

    Ask `is_leader` before every write, however short ago the last was asked for, and end a write under way
    at `writes_until`: both look at the clock as they are asked, so a process that was stopped past its
    deadline learns it before it writes. Cancelling `run` gives the lease back; stop writing before that.
    """

    def __init__(
        self,
        leases: Leases,
        identity: str,
        timing: ElectionTiming,
        *,
        clock: Callable[[], float] = clock,
        wall: Callable[[], datetime] = utc_now,
        pick: random.Random | None = None,
    ) -> None:
        self._leases = leases
        self._timing = timing
        self._election = Election(identity, timing)
        self._clock = clock
        self._wall = wall
        self._pick = pick or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._flipped = asyncio.Event()
        self._told_leading = False
        self._told_holder = ""
        self._told_problem = ""

    @property
    def identity(self) -> str:
        """The name of this replica in the Lease."""
        return self._election.identity

    @property
    def is_leader(self) -> bool:
        """True if a write may start now."""
        return self._election.is_leading(self._clock())

    @property
    def writes_until(self) -> float:
        """When writes must have ended, in seconds of `time.monotonic`, that is of the loop's own clock.

        It lies in the past where we do not lead. It moves with every renewal: read it again for each write.
        """
        return time.monotonic() + self._election.writes_until - self._clock()

    @property
    def holder(self) -> str:
        """The holder of the lease when it was last seen, empty if there was none."""
        return self._election.seen.holder if self._election.seen else ""

    async def changed(self) -> None:
        """Wait until leadership was won or lost since this last returned; for one caller only."""
        await self._flipped.wait()
        self._flipped.clear()

    async def run(self) -> None:
        """Take part until it is cancelled, and then gives back what it holds."""
        try:
            while True:
                action = next_action(self._election, self._clock(), self._wall())
                if isinstance(action, Wait):
                    await asyncio.sleep(max(SHORTEST_WAIT, action.until - self._clock()))
                else:
                    await self._ask(action)
                self._tell()
        finally:
            self._election = resigned(self._election)
            self._tell()
            await self._release()

    async def _release(self) -> None:
        """Have the next leader not wait for the lease to expire; as long as a retry would take, no longer."""
        held = self._election.may_hold
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.retry_period):
                while True:
                    action = next_action(self._election, self._clock(), self._wall())
                    if isinstance(action, Done):
                        break
                    await self._ask(action)
        if held:
            log.info("lease is left to expire" if self.holder else "lease given back")

    async def _ask(self, action: ElectionAction) -> None:
        """Send one request and record its result."""
        started = self._clock()
        self._election = asked(self._election, action)
        try:
            async with asyncio.timeout(self._patience(started)):
                self._election = await self._answered(action, started)
        except ClusterConflict:
            self._election = on_conflict(self._election, self._clock(), self._pick.random())
        except (ClusterError, TimeoutError) as error:
            self._election = on_failure(self._election, started, self._pick.random())
            self._complain(str(error) or "the API server took too long to answer")
        else:
            is_half_done = isinstance(action, ReadLease) and self._election.is_fresh
            if not is_half_done:  # the write to come may fail as the last one did
                self._complain("")

    async def _answered(self, action: ElectionAction, started: float) -> Election:
        match action:
            case ReadLease():
                found = await self._leases.get()
                return on_read(self._election, found, self._clock(), self._pick.random())
            case CreateLease():
                lease = await self._leases.create(action.lease)
                return on_written(self._election, lease, started)
            case UpdateLease():
                lease = await self._leases.update(action.lease)
                return on_written(self._election, lease, started)
            case _:
                raise AssertionError(f"{action} asks for nothing")

    def _patience(self, now: float) -> float:
        """Return how long a request may take: so short that another fits in before the deadline."""
        patience = self._timing.renew_deadline / 2
        return (
            min(patience, self._election.writes_until - now) if self._election.is_leading(now) else patience
        )

    def _tell(self) -> None:
        """Wake who waits for a change, and log it."""
        election = self._election
        leads = self.is_leader
        if leads is not self._told_leading:
            self._told_leading = leads
            self._flipped.set()
            transitions = election.seen.transitions if election.seen else 0
            log.info(
                "became leader" if leads else "lost leadership",
                identity=election.identity,
                transitions=transitions,
            )
        if self.holder != self._told_holder:
            self._told_holder = self.holder
            if not election.is_ours:
                log.info("standing by", identity=election.identity, holder=self.holder)

    def _complain(self, problem: str) -> None:
        """Log a problem once, not every time it comes again."""
        if problem and problem != self._told_problem:
            log.warning("the lease cannot be read or renewed", problem=problem)
        if not problem and self._told_problem:
            log.info("the lease can be read and renewed again")
        self._told_problem = problem
