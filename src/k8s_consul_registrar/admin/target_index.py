"""The targets in order, counted and searchable, for pages of them: built when asked for, then kept a while."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from k8s_consul_registrar.admin.ordering import sorted_in_turns
from k8s_consul_registrar.admin.view import SeenTarget, TargetState, TargetsView
from k8s_consul_registrar.model import Kind

# So many targets are looked at before the loop gets its turn: a few ms.
_SLICE = 1000
# Seconds an index is good for although targets changed: a page asks every few seconds.
_GOOD_FOR = 1.0
# Seconds without a question after which it is dropped: nobody looks at the page.
_KEPT_FOR = 60.0
# Searches whose findings are kept with an index, for the pages that follow and for other browsers.
_MOST_SEARCHES = 8


class Search(NamedTuple):
    """What to find: every term somewhere in a target's texts, and its kind, namespace and state if given."""

    terms: tuple[str, ...] = ()
    kind: str = ""
    namespace: str = ""
    states: frozenset[str] = frozenset()

    def finds(self, target: SeenTarget) -> bool:
        """Whether a target is one of them."""
        key = target.key
        return (
            (not self.kind or key.kind == self.kind)
            and (not self.namespace or key.namespace == self.namespace)
            and (not self.states or target.state in self.states)
            and (not self.terms or all(map(_text_of(target).__contains__, self.terms)))
        )


def parse_terms(text: str) -> tuple[str, ...]:
    """Split a search text at white space; upper and lower case are the same."""
    return tuple(dict.fromkeys(text.casefold().split()))


def _text_of(target: SeenTarget) -> str:
    service, key = target.service, target.key
    # A newline between them, which no term has, keeps a term from matching across two.
    return "\n".join(
        (
            service.id,
            service.name,
            f"{key.namespace}/{key.name}",
            f"{service.address}:{service.port}",
            target.state,
            target.detail,
            *service.tags,
            *(value for _, value in service.meta),
        )
    ).casefold()


_by_id = attrgetter("service.id")


@dataclass(slots=True)
class Snapshot:
    """The targets of one moment, sorted by ID, with how many there are of each sort."""

    generation: int
    made: float
    targets: list[SeenTarget] = field(default_factory=list)
    states: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(TargetState, 0)))
    kinds: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(Kind, 0)))
    namespaces: set[str] = field(default_factory=set)
    _found: dict[Search, list[SeenTarget]] = field(default_factory=dict)

    def add(self, targets: list[SeenTarget]) -> None:
        """Take in some targets; putting them in order is left to the end."""
        self.targets += targets
        self.states.update(target.state for target in targets)
        self.kinds.update(target.key.kind for target in targets)
        self.namespaces.update(target.key.namespace for target in targets if target.key.namespace)

    async def find(self, search: Search) -> list[SeenTarget]:
        """Return the targets found, in order."""
        if search == Search():
            return self.targets
        found = self._found.get(search)
        if found is None:
            found = []
            for start in range(0, len(self.targets), _SLICE):
                found += filter(search.finds, self.targets[start : start + _SLICE])
                await asyncio.sleep(0)
            while len(self._found) >= _MOST_SEARCHES:
                del self._found[next(iter(self._found))]
            self._found[search] = found
        return found


class TargetIndex:
    """Makes snapshots of a view as they are asked for."""

    def __init__(self, view: TargetsView, clock: Callable[[], float] = time.monotonic) -> None:
        self._view = view
        self._clock = clock
        self._latest: Snapshot | None = None
        self._turn = asyncio.Lock()
        self._dropping: asyncio.TimerHandle | None = None

    async def snapshot(self) -> Snapshot:
        """Return the targets as they are, or were a second ago."""
        if self._dropping is not None:
            self._dropping.cancel()
        self._dropping = asyncio.get_running_loop().call_later(_KEPT_FOR, self._drop)
        async with self._turn:
            latest = self._latest
            if latest is None or not self._is_good(latest):
                latest = self._latest = await self._take()
            return latest

    def _is_good(self, latest: Snapshot) -> bool:
        return latest.generation == self._view.generation or self._clock() - latest.made < _GOOD_FOR

    def _drop(self) -> None:
        self._latest = None

    async def _take(self) -> Snapshot:
        taken = Snapshot(self._view.generation, self._clock())
        slice_: list[SeenTarget] = []
        for target in self._view.targets():
            slice_.append(target)
            if len(slice_) == _SLICE:
                taken.add(slice_)
                slice_ = []
                await asyncio.sleep(0)
        taken.add(slice_)
        await asyncio.sleep(0)
        taken.targets = await sorted_in_turns(taken.targets, _by_id)
        return taken
