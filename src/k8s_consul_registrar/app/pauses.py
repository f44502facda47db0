"""Keeps the pauses of Python's collector short, however many targets there are.

A full collection visits every object it tracks and nothing else runs meanwhile: 116 ms at 80,000 targets. What
is known of the cluster stays for long and is freed by its reference counts, so there is nothing to find.
"""

import gc
import time
from collections.abc import Callable, Mapping

# A full collection that takes longer than this, in seconds, is the last to visit what it found alive.
LONG = 0.02


class Pauses:
    """Sets aside (`gc.freeze`) what a long full collection has visited in vain.

    Cyclic garbage is never found among what was set aside. That is bounded: to take that long again, a
    collection has to find as many new objects, which takes a large part of the cluster to change.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = 0.0

    def watch(self) -> None:
        """Begin, for as long as the process lives."""
        gc.callbacks.append(self.notice)

    def notice(self, phase: str, info: Mapping[str, int]) -> None:
        """Take in that a collection begins or ends (Python, `gc.callbacks`)."""
        if phase == "start":
            self._began = self._clock()
        elif info["generation"] == 2 and self._clock() - self._began > LONG:
            gc.freeze()
