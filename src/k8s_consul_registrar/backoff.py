"""Delays: the one value that holds them all, and the jittered growth of those between retries."""

import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Every delay the daemon waits, in seconds; tests hand in a smaller one.

    A server that asks for more patience than `retry_after_cap` is asked again all the same.
    A watch is asked for once to twice `watch_timeout`, ended by us when it brought neither event nor
    bookmark for `watch_silence`, and counts as a failure where it lasted less than `watch_settle`. A source
    whose list or watch held something without a name is listed again after `relist_opaque`.
    """

    retry_first: float = 0.5
    retry_cap: float = 5.0
    retry_after_cap: float = 30.0
    connect_timeout: float = 5.0
    read_timeout: float = 30.0
    gather: float = 0.005
    probe: float = 2.0
    standby_look: float = 30.0
    orphan_look: float = 30.0
    tick: float = 5.0
    watch_timeout: float = 300.0
    watch_silence: float = 180.0
    watch_settle: float = 1.0
    relist_opaque: float = 300.0


def delays(first: float, cap: float, *, pick: random.Random | None = None) -> Iterator[float]:
    """Yield delays that double from `first` to `cap` seconds, each spread over its upper half.

    The spread keeps daemons that lost the same server from coming back in step.
    """
    pick = pick or random.Random()  # noqa: S311 - spreads load, guards nothing
    delay = first
    while True:
        yield pick.uniform(delay / 2, delay)
        delay = min(delay * 2, cap)
