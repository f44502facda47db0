"""Gathers what passes over changes did, so that the log has a line a second of it and not fifty."""

import math
from dataclasses import replace
from typing import NamedTuple

from k8s_consul_registrar.registrar.status import PassReport

# Seconds between two lines at least; the first change after a quiet second is told at once.
EVERY = 1.0


class Gathered(NamedTuple):
    """So many passes, and what they did together."""

    passes: int
    report: PassReport


class Gathering:
    """What was not told yet; moments are seconds of one clock."""

    def __init__(self, every: float = EVERY) -> None:
        self._every = every
        self._gathered: Gathered | None = None
        self._may_tell = -math.inf

    @property
    def due(self) -> float:
        """When there is something to tell; never, where there is nothing."""
        return math.inf if self._gathered is None else self._may_tell

    def add(self, report: PassReport) -> None:
        """Take in one pass."""
        before = self._gathered
        self._gathered = Gathered(1, report) if before is None else _sum(before, report)

    def take(self, now: float) -> Gathered | None:
        """Return what is due by now, None for nothing."""
        if now < self.due:
            return None
        self._may_tell = now + self._every
        return self.rest()

    def rest(self) -> Gathered | None:
        """Return all that was not told, due or not."""
        gathered, self._gathered = self._gathered, None
        return gathered


def _sum(before: Gathered, report: PassReport) -> Gathered:
    total = before.report
    return Gathered(
        before.passes + 1,
        replace(
            report,
            registered=total.registered + report.registered,
            updated=total.updated + report.updated,
            deregistered=total.deregistered + report.deregistered,
            unchanged=total.unchanged + report.unchanged,
            refused=total.refused + report.refused,
            rejected=total.rejected + report.rejected,
            conflicts=(*total.conflicts, *report.conflicts),
            seconds=total.seconds + report.seconds,
        ),
    )
