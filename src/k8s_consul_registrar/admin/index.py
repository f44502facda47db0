"""Rows in order, counted and searchable: read when they are asked for, in slices, and kept until they change."""

import asyncio
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

from k8s_consul_registrar.asyncio_tools import in_slices

# Rows that are read, counted, sorted or searched before the loop gets its turn: a few ms.
SLICE = 1000
# Items looked at for each boundary between two slices of a sort, so that the slices come out about even.
_SAMPLED = 8
# Searches whose results are kept with a snapshot, for the pages that follow and for other browsers.
_MAX_SEARCHES = 8

T = TypeVar("T")


class Search(NamedTuple):
    """A search: every term is found in a row's text, and each facet named has one of the values given."""

    terms: tuple[str, ...] = ()
    facets: tuple[tuple[str, frozenset[str]], ...] = ()


def parse_terms(text: str) -> tuple[str, ...]:
    """Split a search text at white space; upper and lower case are the same."""
    return tuple(dict.fromkeys(text.casefold().split()))


@dataclass(frozen=True, slots=True)
class IndexRules(Generic[T]):
    """The reading of one kind of row.

    `facets` are values of a row by which rows are counted and filtered, `zeros` those that are counted though
    no row has them; `order` is the key to sort by, `texts` yields the texts that are searched. Without `order`
    rows are counted and not kept. A snapshot serves for `fresh_for` seconds though the generation changed, and
    for at most `max_age` though it did not. It is dropped when nothing asked for it in `idle_for` seconds.
    """

    facets: Mapping[str, Callable[[T], Hashable]]
    zeros: Mapping[str, Iterable[Hashable]] = field(default_factory=dict)
    order: Callable[[T], Any] | None = None
    texts: Callable[[T], Iterable[str]] | None = None
    fresh_for: float = 0.0
    max_age: float = float("inf")
    idle_for: float | None = None

    def matcher(self, search: Search) -> Callable[[T], bool]:
        """Return the test that a row found by a search passes."""
        wanted = [(self.facets[name], values) for name, values in search.facets]
        texts = self.texts

        def matches(row: T) -> bool:
            if not all(value(row) in values for value, values in wanted):
                return False
            if not search.terms or texts is None:
                return not search.terms
            # A newline between them, which no term has, keeps a term from matching across two.
            text = "\n".join(texts(row)).casefold()
            return all(term in text for term in search.terms)

        return matches


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[T]):
    """The rows of one moment, sorted, with their number for each value of each facet."""

    rules: IndexRules[T]
    generation: Hashable
    read_at: float
    rows: list[T]
    counts: Mapping[str, Counter[Any]]
    _found: dict[Search, list[T]] = field(default_factory=dict)

    async def find(self, search: Search) -> list[T]:
        """Return the rows found, in order."""
        if search == Search():
            return self.rows
        found = self._found.get(search)
        if found is None:
            found, matches = [], self.rules.matcher(search)
            for start in range(0, len(self.rows), SLICE):
                found += filter(matches, self.rows[start : start + SLICE])
                await asyncio.sleep(0)
            while len(self._found) >= _MAX_SEARCHES:
                del self._found[next(iter(self._found))]
            self._found[search] = found
        return found


class Index(Generic[T]):
    """Snapshots of rows, taken as they are asked for."""

    def __init__(
        self,
        rows: Callable[[], Iterable[T]],
        generation: Callable[[], Hashable],
        rules: IndexRules[T],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rows = rows
        self._generation = generation
        self._rules = rules
        self._clock = clock
        self._latest: Snapshot[T] | None = None
        self._turn = asyncio.Lock()
        self._dropping: asyncio.TimerHandle | None = None

    async def snapshot(self) -> Snapshot[T]:
        """Return the rows as they are now."""
        if self._rules.idle_for is not None:
            if self._dropping is not None:
                self._dropping.cancel()
            self._dropping = asyncio.get_running_loop().call_later(self._rules.idle_for, self._drop)
        async with self._turn:
            latest = self._latest
            if latest is None or not self._is_good(latest):
                latest = self._latest = await self._read()
            return latest

    def _is_good(self, latest: Snapshot[T]) -> bool:
        age = self._clock() - latest.read_at
        if age > self._rules.max_age:
            return False
        return age < self._rules.fresh_for or latest.generation == self._generation()

    def _drop(self) -> None:
        self._latest = None

    async def _read(self) -> Snapshot[T]:
        rules, generation, read_at = self._rules, self._generation(), self._clock()
        rows: list[T] = []
        counts = {name: Counter[Any](dict.fromkeys(rules.zeros.get(name, ()), 0)) for name in rules.facets}
        iterator = iter(self._rows())
        while slice_ := list(islice(iterator, SLICE)):
            for name, value in rules.facets.items():
                counts[name].update(map(value, slice_))
            if rules.order is not None:
                rows += slice_
            await asyncio.sleep(0)
        if rules.order is not None:
            rows = await sorted_in_slices(rows, rules.order)
        return Snapshot(rules, generation, read_at, rows, counts)


async def sorted_in_slices(items: Sequence[T], key: Callable[[T], Any]) -> list[T]:
    """Return the items in order, and let other tasks run in between; equal items stay as they were.

    A sample gives boundaries, by which the items are dealt out into slices that follow one another; each
    is sorted by itself, so that there is nothing to merge.
    """
    count = len(items) // SLICE
    sample = sorted(key(item) for item in items[:: max(1, len(items) // (_SAMPLED * count or 1))])
    bounds = sample[_SAMPLED::_SAMPLED] if count else []
    slices: list[list[T]] = [[] for _ in range(len(bounds) + 1)]
    async for item in in_slices(items, SLICE):
        slices[bisect_right(bounds, key(item))].append(item)
    ordered: list[T] = []
    for one in slices:
        ordered += sorted(one, key=key)
        await asyncio.sleep(0)
    return ordered
