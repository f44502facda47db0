"""The rejections in order, counted and searchable: made when asked for, then kept a while."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from k8s_consul_registrar.admin.ordering import SLICE, sorted_in_turns
from k8s_consul_registrar.admin.view import RegistrarView
from k8s_consul_registrar.model import Rejection

# Seconds after which they are read again, whatever changed.
_GOOD_FOR = 10.0

_by_key = attrgetter("key")


class RejectionSearch(NamedTuple):
    """What to find: every term somewhere in a rejection's texts, and its kind, namespace and reason if given."""

    terms: tuple[str, ...] = ()
    kind: str = ""
    namespace: str = ""
    reason: str = ""

    def finds(self, one: Rejection) -> bool:
        """Whether a rejection is one of them."""
        return (
            (not self.kind or one.key.kind == self.kind)
            and (not self.namespace or one.key.namespace == self.namespace)
            and (not self.reason or one.reason == self.reason)
            and (not self.terms or self._has_terms(one))
        )

    def _has_terms(self, one: Rejection) -> bool:
        text = f"{one.key.namespace}/{one.key.name}\n{one.reason}\n{one.detail}\n{one.id}".casefold()
        return all(term in text for term in self.terms)


@dataclass(frozen=True, slots=True)
class Rejected:
    """The rejections of one moment, sorted by object, with how many there are of each reason."""

    rejections: list[Rejection] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    async def find(self, search: RejectionSearch) -> list[Rejection]:
        """Return those found, in order."""
        if search == RejectionSearch():
            return self.rejections
        found: list[Rejection] = []
        for start in range(0, len(self.rejections), SLICE):
            found += filter(search.finds, self.rejections[start : start + SLICE])
            await asyncio.sleep(0)
        return found


class RejectionIndex:
    """Reads the rejections of a view as they are asked for."""

    def __init__(self, view: RegistrarView, clock: Callable[[], float] = time.monotonic) -> None:
        self._view = view
        self._clock = clock
        self._turn = asyncio.Lock()
        self._latest = Rejected()
        self._made_of: tuple[int, int] | None = None
        self._made = 0.0

    async def snapshot(self) -> Rejected:
        """Return the rejections as they are."""
        async with self._turn:
            every = list(self._view.rejections())
            made_of = (self._view.generation, len(every))
            if made_of != self._made_of or self._clock() - self._made > _GOOD_FOR:
                reasons = Counter[str]()
                for start in range(0, len(every), SLICE):
                    reasons.update(one.reason for one in every[start : start + SLICE])
                    await asyncio.sleep(0)
                self._latest = Rejected(await sorted_in_turns(every, _by_key), reasons)
                self._made_of, self._made = made_of, self._clock()
            return self._latest
