"""Our copy of what the API server's objects ask for: targets and rejections, never the objects."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from k8s_consul_registrar.kube.asked import Asked
from k8s_consul_registrar.kube.known import Known, Verdict
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import Kind, Node, ObjectKey, Rejection, Source, Target
from k8s_consul_registrar.targets.wanted import SourceState, Wanted
from k8s_consul_registrar.targets.zones import Zones

# More absences than these are inferred in slices of as many, some milliseconds each.
SLICE = 2000


class Mirror:
    """What every followed source asks for now, with how well each source is known.

    It belongs to one event loop. Memory follows targets and rejections, not objects.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        judge: Callable[[Item], Verdict | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._judge = judge
        self._clock = clock
        self._known = {source: Known() for source in sources}
        has_nodes = Source(Kind.NODE) in self._known
        self._zones = Zones() if has_nodes else None
        # Set once the Nodes were listed, or could not be, or are none of ours: what Pods may wait for.
        self.nodes_tried = asyncio.Event()
        if not has_nodes:
            self.nodes_tried.set()
        self._asked = Asked()
        self._departed: set[ObjectKey] = set()
        self._cluster_uid = ""
        self._needs_full_pass = False
        self._changed = asyncio.Event()
        # Moves with every change, for whoever keeps what was made of the claims.
        self.generation = 0

    def start_listing(self, source: Source) -> None:
        """Begin to take in a list: what it holds counts at once, what it lacks only at its end.

        A list that broke off is begun anew the same way.
        """
        known = self._known[source]
        known.unseen = set(known.verdicts)
        known.listed_objects = 0
        known.is_list_opaque = False

    def put(self, source: Source, item: Item, *, is_added: bool = True) -> None:
        """Take in an object as it is now; `is_added` says that it was not there before.

        An object that asked before and does so no more has departed.
        """
        known = self._known[source]
        self._count(known, int(is_added))
        verdict = self._judge(item)
        if isinstance(item, Node):
            self._learn_zone(item, self._moment(known))
        if verdict is None or item.key is None:
            self._blur(known)
            return
        if isinstance(verdict, Rejection):
            key = verdict.key
        elif verdict:
            key = verdict[0].key
            if self._zones is not None:
                verdict = self._zones.place(verdict)
        else:
            key = item.key
        if known.unseen:
            known.unseen.discard(key)
        before = known.verdicts.get(key, ())
        if before == verdict:
            return
        self._replace(known, key, before, verdict, self._moment(known))
        if verdict == ():
            self._departed.add(key)
        else:
            self._departed.discard(key)

    def remove(self, source: Source, item: Item) -> None:
        """Take in that an object is gone, which is a fact; `item` is its last state."""
        known = self._known[source]
        self._count(known, -1)
        if item.key is None:
            self._blur(known)
            return
        if known.unseen:
            known.unseen.discard(item.key)
        before = known.verdicts.get(item.key, ())
        if before != ():
            self._replace(known, item.key, before, (), self._moment(known))
            self._departed.add(item.key)

    def infer_absences(self, source: Source) -> bool:
        """Take in a slice of what a list that is all there did not show; return whether more is left.

        That is for lists that lack very much. From then to the list's end the source proves no absence,
        since whoever looks in between sees a part of them.
        """
        known = self._known[source]
        if known.unseen is None or len(known.unseen) <= SLICE:
            return False
        known.is_followed = False
        self._drop(known, [known.unseen.pop() for _ in range(SLICE)])
        return True

    def finish_listing(self, source: Source, at: float) -> None:
        """Take in that a list is complete; `at` is when it ended, in monotonic seconds.

        What it did not show is absent.
        """
        known = self._known[source]
        unseen, known.unseen = known.unseen or set(), None
        self._drop(known, unseen)
        known.objects = known.listed_objects
        known.is_opaque = known.is_list_opaque
        known.listed_at, known.is_followed, known.problem = at, True, ""
        if source.kind is Kind.NODE:
            self.nodes_tried.set()
        self._wake_for_full_pass()

    def fail(self, source: Source, problem: str) -> None:
        """Note that a source cannot be followed: what it asks for stays, its absences prove nothing."""
        known = self._known[source]
        if source.kind is Kind.NODE:
            self.nodes_tried.set()
        if known.is_followed or known.problem != problem:
            known.is_followed, known.problem = False, problem
            self._wake_for_full_pass()

    def resume(self, source: Source) -> None:
        """Note that a source that was listed completely is followed again from where it was lost."""
        known = self._known[source]
        if not known.is_followed and known.listed_at is not None and known.unseen is None:
            known.is_followed, known.problem = True, ""
            self._wake_for_full_pass()

    def learn_cluster_uid(self, uid: str) -> None:
        """Take in the UID of the namespace kube-system, which tells one cluster from another."""
        if uid and uid != self._cluster_uid:
            self._cluster_uid = uid
            self._wake_for_full_pass()

    def is_opaque(self, source: Source) -> bool:
        """Whether something was seen there that could not even be named, since the last list or in it."""
        return self._known[source].is_opaque

    def wanted(self) -> Wanted:
        """Return all that is known now, as a value that later changes do not touch."""
        self._needs_full_pass = False
        _, heard = self._asked.take()
        self._changed.clear()
        return self._value(dict(self._asked.claims), heard)

    def known(self) -> Wanted:
        """Return the same, but what changed still waits to be seen."""
        return self._value(dict(self._asked.claims), {})

    @property
    def claims(self) -> Mapping[str, Sequence[Target]]:
        """The targets by service ID as they are at this moment; it changes under the reader."""
        return self._asked.claims

    @property
    def rejections(self) -> Mapping[ObjectKey, Rejection]:
        """The rejections as they are at this moment; it changes under the reader."""
        return self._asked.rejections

    @property
    def cluster_uid(self) -> str:
        """The cluster's identity, empty while it is not known."""
        return self._cluster_uid

    def states(self) -> dict[Source, SourceState]:
        """Return how well each source is known."""
        return {source: known.state() for source, known in self._known.items()}

    def changes(self, also: AbstractSet[str] = frozenset()) -> Wanted:
        """Return what changed since the last call of this or `wanted`, as a value; all else is as in `wanted`.

        `claims` are of the service IDs whose targets changed, and of `also`; empty where nobody asks now.
        """
        dirty, heard = self._asked.take()
        self._changed.clear()
        return self._value({one: self._asked.claims.get(one, ()) for one in dirty | also}, heard)

    def needs_full_pass(self) -> bool:
        """Whether more than single targets changed since `wanted` was last called.

        A list was completed, a source failed or recovered, or the cluster turned out to be another; and
        every source was listed or failed at least once, so that a start ends in one comparison, not several.
        """
        return self._needs_full_pass and all(
            known.listed_at is not None or known.problem for known in self._known.values()
        )

    async def changed(self) -> None:
        """Wait until something changed since `wanted` or `changes` was last called."""
        await self._changed.wait()

    def settled(self, departed: AbstractSet[ObjectKey]) -> None:
        """Forget departures that Consul no longer holds anything of."""
        self._departed -= departed

    def _value(self, claims: Mapping[str, tuple[Target, ...]], heard: Mapping[str, float]) -> Wanted:
        return Wanted(
            claims=claims,
            rejections=self._asked.rejected(),
            sources=self.states(),
            departed=frozenset(self._departed),
            cluster_uid=self._cluster_uid,
            heard=heard,
        )

    def _learn_zone(self, node: Node, at: float | None) -> None:
        """Move the Pods of a Node, and no others, where its zone is another one than was known."""
        if self._zones is None:
            return
        for key in self._zones.learn(node):
            known = self._known.get(Source(Kind.POD)) or self._known[Source(Kind.POD, key.namespace)]
            before = known.verdicts[key]
            if isinstance(before, Rejection):
                continue
            after = self._zones.place(before)
            if after != before:
                self._replace(known, key, before, after, at)

    def _drop(self, known: Known, keys: Iterable[ObjectKey]) -> None:
        for key in keys:
            self._replace(known, key, known.verdicts[key], (), None)

    def _moment(self, known: Known) -> float | None:
        """Return when an event of this source is heard of: now; None within a list, which tells of the past."""
        return None if known.unseen is not None else self._clock()

    def _count(self, known: Known, step: int) -> None:
        if known.unseen is not None:
            known.listed_objects = max(0, known.listed_objects + step)
        else:
            known.objects = max(0, known.objects + step)

    def _blur(self, known: Known) -> None:
        """Note something nameless: whatever is not known of this source may be what it is about."""
        known.is_list_opaque = True
        if not known.is_opaque:
            known.is_opaque = True
            self._wake_for_full_pass()

    def _wake_for_full_pass(self) -> None:
        self._needs_full_pass = True
        self.generation += 1
        self._changed.set()

    def _replace(
        self, known: Known, key: ObjectKey, before: Verdict, after: Verdict, at: float | None
    ) -> None:
        """Put a verdict that differs in place of the one before, and note the service IDs it is about."""
        if self._zones is not None:
            self._zones.moved(key, before, after)
        if after == ():
            del known.verdicts[key]
        else:
            known.verdicts[key] = after
        self._asked.replace(key, before, after, at)
        self.generation += 1
        self._changed.set()
