"""Delays: the one value that holds them all, and the jittered growth of those between retries."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass

from k8s_consul_registrar.errors import ClusterBusy


@dataclass(frozen=True, slots=True)
class Timing:
    """Every delay the daemon waits, in seconds; tests hand in a smaller one.

    A server that asks for more patience than `retry_after_cap` is asked again all the same.
    A watch is asked for once to twice `watch_timeout`, ended by us when it brought neither event nor
    bookmark for `watch_silence`, and counts as a failure where it lasted less than `watch_settle`. A source
    whose list or watch held something without a name is listed again after `relist_opaque`, and one that has
    not caught up for `catch_up` after its watch was resumed as well. Two writes of one service are at least
    `write_interval` apart. The catalog is compared with the agent `ghost_first` and `ghost_last` after a
    deregistration. Kubernetes Events repeat the same about an object once in `event_interval`.
    """

    retry_first: float = 0.5
    retry_cap: float = 5.0
    retry_after_cap: float = 30.0
    connect_timeout: float = 5.0
    read_timeout: float = 30.0
    gather: float = 0.005
    write_interval: float = 0.2
    probe: float = 2.0
    standby_look: float = 30.0
    orphan_look: float = 30.0
    ghost_first: float = 30.0
    ghost_last: float = 65.0
    tick: float = 5.0
    watch_timeout: float = 300.0
    watch_silence: float = 180.0
    watch_settle: float = 1.0
    relist_opaque: float = 300.0
    catch_up: float = 90.0
    event_interval: float = 3600.0


def delays(first: float, cap: float, *, pick: random.Random | None = None) -> Iterator[float]:
    """Yield delays that double from `first` to `cap` seconds, each spread over its upper half.

    The spread keeps daemons that lost the same server from coming back in step.
    """
    pick = pick or random.Random()  # noqa: S311 - spreads load, guards nothing
    delay = first
    while True:
        yield pick.uniform(delay / 2, delay)
        delay = min(delay * 2, cap)


class Backoff:
    """Waits between attempts, which grow while no progress is made."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self.reset()

    def reset(self) -> None:
        """Begin with the shortest wait again."""
        self._delays = delays(self._timing.retry_first, self._timing.retry_cap)

    def delay(self, error: Exception | None = None) -> float:
        """Return the next wait: at least as long as the API server asked for, up to a limit."""
        asked = error.retry_after if isinstance(error, ClusterBusy) else None
        return max(next(self._delays), min(asked or 0.0, self._timing.retry_after_cap))

    async def wait(self, error: Exception | None = None) -> None:
        """Wait until it is time for the next attempt."""
        await asyncio.sleep(self.delay(error))
