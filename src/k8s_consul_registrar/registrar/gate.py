"""The gate before Consul: closed after a failure, for all work alike, and for longer each time."""

from collections.abc import Callable

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.registrar.interfaces import Health

RESYNC, BATCH, PROBE = "resync", "batch", "probe"


class Gate:
    """Joins the client's health with failures that are not Consul's own, such as a right that is missing.

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
