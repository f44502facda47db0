"""How often all of Consul's services may be read: a bounded burst, then a bounded share of time."""

from dataclasses import dataclass

# Seconds between full reads of Consul beyond the first few.
FULL_READ_GAP = 30.0


@dataclass(frozen=True, slots=True)
class BudgetRules:
    """Full reads in a row that are allowed at once, and the least time between later ones.

    One read a `gap` (seconds), and no more than `share` of wall time: at 8,200 services a full read under
    load cost Consul a core for seconds, so events and small reads do the work in between. A read that is
    urgent heeds `urgent_gap` and `urgent_share` instead: nothing else removes what a new list does not show.
    """

    burst: int = 3
    gap: float = FULL_READ_GAP
    urgent_gap: float = 2.0
    share: float = 0.02
    urgent_share: float = 0.2


class Budget:
    """Counts full reads against the rules; all times are seconds of one monotonic clock."""

    def __init__(self, rules: BudgetRules, now: float) -> None:
        self._rules = rules
        self._left = float(rules.burst)
        self._gap = rules.gap
        self._at = now
        self._free_at = now

    def wait(self, now: float, *, is_urgent: bool = False) -> float:
        """Return how long the next full read has to wait, 0 when it may begin."""
        self._refill(now)
        if self._left >= 1:
            return 0.0
        by_gap = (1 - self._left) * self._gap
        return min(by_gap, max(0.0, self._free_at - now)) if is_urgent else by_gap

    def spend(self, now: float, seconds: float) -> None:
        """Count a full read that took `seconds` and ended now."""
        self._refill(now)
        self._left = max(self._left - 1, 0.0)
        self._gap = max(self._rules.gap, seconds / self._rules.share)
        self._free_at = now + max(self._rules.urgent_gap, seconds / self._rules.urgent_share)

    def _refill(self, now: float) -> None:
        if self._gap > 0:
            self._left = min(self._left + (now - self._at) / self._gap, float(self._rules.burst))
        else:
            self._left = float(self._rules.burst)
        self._at = now
