"""Which kubelets and Pods failed lately, for whoever looks for the one that does: a bounded list, no metric."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from k8s_consul_registrar.proxy.nodes import KUBELET, Endpoint
from k8s_consul_registrar.proxy.outcomes import Outcome

# Failures remembered, and for how long in seconds: five thousand kubelets failing at once are one cause.
MOST = 1024
LATELY = 900.0


class Failure(NamedTuple):
    """One scrape that failed; `at` is in epoch seconds, `reason` quotes nothing a caller or a peer sent."""

    at: float
    endpoint: Endpoint
    outcome: Outcome
    reason: str


class Failures:
    """The latest failures; `noted` counts all there ever were."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._latest: deque[Failure] = deque(maxlen=MOST)
        self.noted = 0

    def note(self, endpoint: Endpoint, outcome: Outcome, reason: str) -> None:
        """Remember one, at the cost of the oldest."""
        self.take(Failure(self._clock(), endpoint, outcome, reason))

    def take(self, failure: Failure) -> None:
        """Remember one that another process noted."""
        self._latest.append(failure)
        self.noted += 1

    def since(self, noted: int) -> list[Failure]:
        """Return those noted after so many, as far as they are remembered."""
        fresh = min(self.noted - noted, len(self._latest))
        return list(self._latest)[len(self._latest) - fresh :]

    def lately(self) -> list[Failure]:
        """Return those that are not too old, the latest last."""
        oldest = self._clock() - LATELY
        return [failure for failure in self._latest if failure.at >= oldest]


def failing_report(failures: list[Failure], names: Mapping[str, str]) -> dict[str, object]:
    """Return the failures by whom they are of, the latest first, as JSON takes it.

    `names` are those of Nodes and Pods by UID; whoever is gone since has none.
    """
    by_endpoint: dict[Endpoint, list[Failure]] = {}
    for failure in failures:
        by_endpoint.setdefault(failure.endpoint, []).append(failure)
    rows = []
    for endpoint, of_one in by_endpoint.items():
        latest = of_one[-1]
        rows.append(
            {
                "kind": "node" if endpoint.peer == KUBELET else "pod",
                "name": names.get(endpoint.uid, ""),
                "address": str(endpoint),
                "failures": len(of_one),
                "first": of_one[0].at,
                "last": latest.at,
                "outcome": latest.outcome.value,
                "reason": latest.reason,
            }
        )
    rows.sort(key=lambda row: row["last"], reverse=True)
    return {"seconds": LATELY, "remembered": MOST, "failing": rows}
