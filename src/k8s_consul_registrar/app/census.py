"""Counts for metrics, made when they are asked for: targets by kind and state, and the state of the watches."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping

from k8s_consul_registrar.admin.view import TargetState
from k8s_consul_registrar.app.view import View
from k8s_consul_registrar.kube.source_state import CAUSES, WatchStats
from k8s_consul_registrar.model import Kind, Source
from k8s_consul_registrar.registrar.metrics import Figures
from k8s_consul_registrar.targets.reasons import Reason

# So many targets are counted before the loop gets its turn: about 2 ms.
SLICE = 2000


class Census:
    """Counts targets and rejections when asked to, a slice at a time, and keeps that until something changes."""

    def __init__(self, view: View, stats: Callable[[], Mapping[Source, WatchStats]]) -> None:
        self._view = view
        self._stats = stats
        self._counted: int | None = None
        self._targets: Mapping[tuple[str, str], int] = _no_targets()
        self._rejections: Mapping[str, int] = dict.fromkeys(Reason, 0)
        self._turn = asyncio.Lock()

    async def refresh(self) -> None:
        """Count anew where anything changed since the last time."""
        async with self._turn:
            generation = self._view.generation
            if generation == self._counted:
                return
            targets = _no_targets()
            for number, labels in enumerate(self._view.states(), 1):
                targets[labels] += 1
                if number % SLICE == 0:
                    await asyncio.sleep(0)
            reasons = Counter[str](dict.fromkeys(Reason, 0))
            rejections = self._view.rejections()
            for start in range(0, len(rejections), SLICE):
                reasons.update(one.reason for one in rejections[start : start + SLICE])
                await asyncio.sleep(0)
            self._targets, self._rejections, self._counted = targets, reasons, generation

    def figures(self) -> Figures:
        """Return the counts of the last `refresh`, and how the following of each kind goes now."""
        restarts = {(kind.value, cause): 0 for kind in Kind for cause in CAUSES}
        lists: dict[str, int] = {}
        heard: dict[str, float] = {}
        boot = time.time() - time.monotonic()
        for source, stats in self._stats().items():
            kind = source.kind.value
            for cause, count in stats.restarts.items():
                restarts[kind, cause] += count
            lists[kind] = lists.get(kind, 0) + stats.lists
            at = 0.0 if stats.heard_at is None else boot + stats.heard_at
            heard[kind] = min(heard.get(kind, at), at)
        return Figures(self._targets, self._rejections, restarts, lists, heard)


def _no_targets() -> dict[tuple[str, str], int]:
    return {(kind.value, state.value): 0 for kind in Kind for state in TargetState}
