"""Our copy of what the API server's objects ask for: targets and rejections, never the objects."""

import asyncio
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import replace

from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import ObjectKey, Rejection, Source, Target
from k8s_consul_registrar.targets.wanted import SourceState, Wanted

Verdict = tuple[Target, ...] | Rejection


class Listing:
    """A list of one source while it arrives; it counts for nothing until it is complete."""

    def __init__(self, judge: Callable[[Item], Verdict | None]) -> None:
        self._judge = judge
        self.verdicts: dict[ObjectKey, Verdict] = {}
        self.indifferent: set[ObjectKey] = set()
        self.objects = 0
        self.is_opaque = False

    def add(self, items: Iterable[Item], known: AbstractSet[ObjectKey]) -> None:
        """Take a page in; of objects that ask for nothing only those in `known` are remembered."""
        for item in items:
            self.objects += 1
            verdict = self._judge(item)
            if verdict is None or item.key is None:
                self.is_opaque = True
            elif verdict != ():
                self.verdicts[item.key] = verdict
            elif item.key in known:
                self.indifferent.add(item.key)


class Mirror:
    """What every followed source asks for now, with how well each source is known.

    It belongs to one event loop. Memory follows targets and rejections, not objects.
    """

    def __init__(self, sources: Iterable[Source], judge: Callable[[Item], Verdict | None]) -> None:
        self._judge = judge
        self._states = {source: SourceState() for source in sources}
        self._verdicts: dict[Source, dict[ObjectKey, Verdict]] = {source: {} for source in self._states}
        self._claims: dict[str, tuple[Target, ...]] = {}
        self._departed: set[ObjectKey] = set()
        self._cluster_uid = ""
        self._changed = asyncio.Event()

    def start_listing(self) -> Listing:
        """Begin to gather a complete list."""
        return Listing(self._judge)

    def add_page(self, source: Source, listing: Listing, items: Iterable[Item]) -> None:
        """Take one page into a listing."""
        listing.add(items, self._verdicts[source].keys())

    def finish_listing(self, source: Source, listing: Listing, at: float) -> None:
        """Put a complete list in place of what was known; `at` is when it ended, monotonic seconds.

        An object that asked before and is in the list without asking has departed; one that is not in
        the list is merely absent.
        """
        before = self._verdicts[source]
        for key in before.keys() - listing.verdicts.keys():
            self._put(source, key, ())
        for key, verdict in listing.verdicts.items():
            if before.get(key) != verdict:
                self._put(source, key, verdict)
        self._departed |= listing.indifferent
        self._departed -= listing.verdicts.keys()
        self._states[source] = SourceState(
            listed_at=at, is_followed=True, objects=listing.objects, is_opaque=listing.is_opaque
        )
        self._changed.set()

    def fail(self, source: Source, problem: str) -> None:
        """Note that a source could not be read: what it asked for stays, its absences prove nothing."""
        state = self._states[source]
        if state.is_followed or state.problem != problem:
            self._states[source] = replace(state, is_followed=False, problem=problem)
            self._changed.set()

    def learn_cluster_uid(self, uid: str) -> None:
        """Take in the UID of the namespace kube-system, which tells one cluster from another."""
        if uid and uid != self._cluster_uid:
            self._cluster_uid = uid
            self._changed.set()

    def wanted(self) -> Wanted:
        """Return all that is known now, as a value that later changes do not touch."""
        self._changed.clear()
        rejections = {
            key: verdict
            for verdicts in self._verdicts.values()
            for key, verdict in verdicts.items()
            if isinstance(verdict, Rejection)
        }
        return Wanted(
            claims=dict(self._claims),
            rejections=rejections,
            sources=dict(self._states),
            departed=frozenset(self._departed),
            cluster_uid=self._cluster_uid,
        )

    async def changed(self) -> None:
        """Wait until something changed, or was listed again, since `wanted` was last called."""
        await self._changed.wait()

    def settled(self, departed: AbstractSet[ObjectKey]) -> None:
        """Forget departures that Consul no longer holds anything of."""
        self._departed -= departed

    def _put(self, source: Source, key: ObjectKey, verdict: Verdict) -> None:
        verdicts = self._verdicts[source]
        before = verdicts.pop(key, ())
        if not isinstance(before, Rejection):
            for target in before:
                rest = tuple(one for one in self._claims[target.id] if one.key != key)
                if rest:
                    self._claims[target.id] = rest
                else:
                    del self._claims[target.id]
        if verdict == ():
            return
        verdicts[key] = verdict
        if not isinstance(verdict, Rejection):
            for target in verdict:
                self._claims[target.id] = (*self._claims.get(target.id, ()), target)
