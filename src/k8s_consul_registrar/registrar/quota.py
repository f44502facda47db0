"""Quota: how many targets a namespace may have; new ones beyond that are blocked until there is room.

What Consul holds counts, and stays unless QUOTA_REMOVE is set. The oldest object comes first, and goes last.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from typing import TypeAlias

from msgspec.structs import replace

from k8s_consul_registrar.asyncio_tools import in_slices
from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.model import Rejection, Target
from k8s_consul_registrar.registrar.brake import Proof
from k8s_consul_registrar.registrar.decide import (
    Action,
    AwaitProxy,
    Deregister,
    Desired,
    InSync,
    Nothing,
    Register,
    Reject,
    Rules,
    Standing,
    Update,
    Withheld,
    decide,
)
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.observed import (
    AsDesired,
    Foreign,
    Observed,
    ObservedState,
    Other,
    Unknown,
    object_behind,
)
from k8s_consul_registrar.telemetry import get_logger

# Seconds between two lines about namespaces at their limit, and how many of those a line names.
TELL_EVERY = 60.0
MOST_NAMED = 20
# Services looked at between two turns of the event loop.
SLICE = 250

_Rank: TypeAlias = tuple[int, str, str]

# Decisions by which a service stays that Consul holds, and records that have a place.
_HELD = (InSync, Update, AwaitProxy, Withheld)
_PLACED = (AsDesired, Other, Unknown)

log = get_logger("quota")


class LimitedState(ObservedState):
    """Observed state that has a quota count everything again after each complete read."""

    quota: "Quota"

    def finish_read(
        self,
        lost_shards: Mapping[str, str] | None = None,
        is_desired: Callable[[str], bool] = lambda _: True,
    ) -> set[str]:
        """Replace everything by what was read, and count everything again."""
        touched = super().finish_read(lost_shards, is_desired)
        self.quota.recount()
        return touched

    def is_in_flight(self, service_id: str) -> bool:
        """Return True while a write of an ID is on its way."""
        return service_id in self._in_flight


class _Queue:
    """The IDs of a namespace that wait for a place, the oldest object first."""

    def __init__(self) -> None:
        self.ranks: dict[str, _Rank] = {}
        # Empty until an ID is taken.
        self._heap: list[tuple[_Rank, str]] = []

    def add(self, service_id: str, rank: _Rank) -> None:
        """Let an ID wait."""
        if self.ranks.get(service_id) == rank:
            return
        self.ranks[service_id] = rank
        if self._heap:
            heappush(self._heap, (rank, service_id))
        # Entries of IDs that no longer wait stay until they are more than the others.
        if len(self._heap) > 2 * len(self.ranks) + 16:
            self._heap = []

    def take(self) -> str:
        """Return the first ID, which waits no longer; there must be one."""
        if not self._heap:
            self._heap = [(rank, one) for one, rank in self.ranks.items()]
            heapify(self._heap)
        while True:
            rank, service_id = heappop(self._heap)
            if self.ranks.get(service_id) == rank:
                del self.ranks[service_id]
                return service_id


class Quota:
    """The places of each namespace: at most `limit` are given away, and what Consul holds has one in any case.

    A change costs what it changes, whatever the size of the namespace. New targets wait until every source was
    listed, or cannot be, so that the order in which a list arrives decides nothing.

    With `removes`, services that are asked for beyond the limit are found by a resync, judged by the brake, and
    leave once it released them, as long as they are still too many.
    """

    def __init__(
        self,
        limit: int,
        observed: LimitedState,
        desired: DesiredState,
        blocked: dict[str, str],
        *,
        removes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the quota; `blocked` is where blocked IDs are shown, with their namespace."""
        self._limit = limit
        self._observed = observed
        self._desired = desired
        self.blocked = blocked
        self._removes = removes
        self._clock = clock
        self._namespace_of: dict[str, str] = {}
        self._taken: defaultdict[str, int] = defaultdict(int)
        # By namespace: IDs with a place that nothing asks for, and those that leave, the youngest object's first.
        self._unasked: defaultdict[str, set[str]] = defaultdict(set)
        self._leaving: defaultdict[str, dict[str, Proof]] = defaultdict(dict)
        # IDs that were too many at the last resync and that the brake has not released.
        self.over: frozenset[str] = frozenset()
        self._waiting: defaultdict[str, _Queue] = defaultdict(_Queue)
        # Namespaces in which a place may have become free, or wanted.
        self._open: set[str] = set()
        self._is_listed = False
        # The generation of the observed state that the counts show, -1 to count everything again.
        self._counted = -1
        self._admitted: list[str] = []
        self._told_at = float("-inf")
        observed.quota = self

    def recount(self) -> None:
        """Count everything again at the next look."""
        self._counted = -1

    async def find_over(self, rules: Rules) -> list[Target]:
        """Return the targets whose services are too many for their namespace, the youngest object's first.

        Services that nothing asks for do not count: they go by their own rules.
        """
        self._settle()
        excess = {one: self._excess(one) for one in self._taken} if self._removes and self._is_listed else {}
        held: dict[str, list[Target]] = {one: [] for one, count in excess.items() if count > 0}
        async for service_id, namespace in in_slices(
            tuple(self._namespace_of.items() if held else ()), SLICE
        ):
            claims = self._desired.claims.get(service_id)
            if namespace in held and claims and isinstance(self._observed.get(service_id), AsDesired | Other):
                held[namespace].append(min(claims, key=lambda one: one.rank))
        youngest: list[Target] = []
        for namespace, targets in held.items():
            targets.sort(key=lambda one: (one.rank, one.id), reverse=True)
            youngest += targets[: excess[namespace]]
        over = [
            one
            async for one in in_slices(youngest, SLICE)
            if self._proof(one.id) is None and self._may_remove(one.id, rules)
        ]
        self.over = frozenset(one.id for one in over)
        return over

    def release(self, service_id: str, proof: Proof) -> None:
        """Let a service leave that is too many; of those released together the youngest object's comes first."""
        if (namespace := self._namespace_of.get(service_id)) is not None:
            self._leaving[namespace][service_id] = proof
            self._open.add(namespace)
            self.over -= {service_id}

    def leaving(self) -> list[str]:
        """Return the services that leave and that Consul still holds."""
        self._settle()
        return [service_id for some in self._leaving.values() for service_id in some]

    def proof(self, service_id: str) -> Proof | None:
        """Return why a service leaves, None if it does not."""
        self._settle()
        return self._proof(service_id)

    def _proof(self, service_id: str) -> Proof | None:
        return self._leaving.get(self._namespace_of.get(service_id, ""), {}).get(service_id)

    def apply(self, action: Action, asked: Desired, observed: Observed, rules: Rules) -> Action:
        """Return what a quota makes of a decision: a new target beyond the limit is rejected, one that leaves removed."""
        service_id = asked.id
        is_held = self._leaving and isinstance(action, _HELD) and observed is not None
        if is_held and asked.claims and self.proof(service_id) is not None:
            return _removal(asked, observed, rules) or action
        if not isinstance(action.write if isinstance(action, Withheld) else action, Register):
            return action
        self._settle()
        target = self._desired.claims[service_id][0]
        namespace = target.key.namespace
        if not namespace or service_id in self._namespace_of:
            return action
        if not self._is_listed:
            return Nothing()  # it is decided again once everything was listed
        detail = f"namespace {namespace} has {self._taken[namespace]} targets, and MAX_TARGETS_PER_NAMESPACE is {self._limit}"
        return Reject(Rejection(target.key, Reason.NAMESPACE_FULL, detail))

    def admitted(self) -> list[str]:
        """Return the IDs that were kept waiting and have a place now, each once; log what is blocked now and then."""
        self._settle()
        admitted, self._admitted = self._admitted, []
        if self.blocked and (now := self._clock()) - self._told_at >= TELL_EVERY:
            self._told_at = now
            full = sorted(set(self.blocked.values()))
            log.warning(
                "namespaces are at their limit; new targets are blocked",
                limit=self._limit,
                blocked=len(self.blocked),
                namespaces=" ".join(full[:MOST_NAMED]),
            )
        return admitted

    def _settle(self) -> None:
        if not self._observed.is_complete:
            return
        claims = self._desired.claims
        changed = None if self._counted < 0 else self._observed.changed_since(self._counted)
        if changed is None:
            self._count_all()
        else:
            for service_id in changed:
                self._update(service_id, claims.get(service_id, ()))
        if not self._is_listed:
            statuses = self._desired.store.statuses().values()
            self._is_listed = all(one.listed_at is not None or one.problem for one in statuses)
            if self._is_listed:
                for namespace in tuple(self._waiting):
                    self._fill(namespace, claims)
                    left = self._waiting[namespace].ranks
                    for service_id in left:
                        self._block(service_id, namespace)
                    self._admitted += left
        if self._is_listed:
            for namespace in self._open:
                self._fill(namespace, claims)
                self._keep_enough(namespace)
            self._open.clear()
        self._counted = self._observed.generation

    def _count_all(self) -> None:
        """Count everything again; what was to leave and is not there any more has left."""
        for counts in (self._namespace_of, self._taken, self._unasked, self._waiting):
            counts.clear()
        claims = self._desired.claims
        for service_id in self._observed.ids():
            self._update(service_id, claims.get(service_id, ()))
        for service_id, asking in claims.items():
            if self._observed.get(service_id) is None:
                self._update(service_id, asking)
        for service_id in self.blocked.keys() - claims.keys():
            self._update(service_id, ())
        for namespace, leaving in self._leaving.items():
            self._open.add(namespace)
            for service_id in leaving.keys() - self._namespace_of.keys():
                del leaving[service_id]

    def _update(self, service_id: str, claims: tuple[Target, ...]) -> None:
        record = self._observed.get(service_id)
        key = claims[0].key if claims else object_behind(record)
        namespace = key.namespace if key is not None else self._namespace_of.get(service_id, "")
        is_held = isinstance(record, _PLACED) or self._observed.is_in_flight(service_id)
        if not is_held and self._proof(service_id) is not None:
            # It left, and waits like any other that is asked for.
            self._release(service_id)
            self._admitted.append(service_id)
        if not namespace or isinstance(record, Foreign) or not (claims or is_held):
            self._release(service_id)
        elif is_held:
            if service_id not in self._namespace_of:
                self._take(service_id, namespace)
            if claims:
                self._unasked[namespace].discard(service_id)
            else:
                self._unasked[namespace].add(service_id)
                self._stay(namespace, service_id)
                self._open.add(namespace)
        elif service_id not in self._namespace_of:
            self._waiting[namespace].add(service_id, min(one.rank for one in claims))
            self._open.add(namespace)
            if self._is_listed and service_id not in self.blocked:
                self._block(service_id, namespace)

    def _block(self, service_id: str, namespace: str) -> None:
        self.blocked[service_id] = namespace
        self._observed.changed(service_id)

    def _unblock(self, service_id: str) -> None:
        if self.blocked.pop(service_id, None) is not None:
            self._observed.changed(service_id)

    def _take(self, service_id: str, namespace: str) -> None:
        """Give a place to a service that has none."""
        self._namespace_of[service_id] = namespace
        self._taken[namespace] += 1
        self._waiting[namespace].ranks.pop(service_id, None)
        self._unblock(service_id)

    def _release(self, service_id: str) -> None:
        namespace = self._namespace_of.pop(service_id, None)
        if namespace is not None:
            self._taken[namespace] -= 1
            self._unasked[namespace].discard(service_id)
            self._stay(namespace, service_id)
            self._open.add(namespace)
        elif (waited := self.blocked.get(service_id)) is not None:
            self._waiting[waited].ranks.pop(service_id, None)
        self._unblock(service_id)

    def _fill(self, namespace: str, claims: Mapping[str, tuple[Target, ...]]) -> None:
        """Give the places of a namespace that are left to those that wait, the oldest object first."""
        waiting = self._waiting[namespace]
        while waiting.ranks and self._taken[namespace] < self._limit:
            service_id = waiting.take()
            if claims.get(service_id):
                self._take(service_id, namespace)
                self._admitted.append(service_id)
        if not waiting.ranks:
            self._waiting[namespace] = _Queue()  # the room of a crowd is free again

    def _excess(self, namespace: str) -> int:
        """Return by how much the services of a namespace that are asked for exceed the limit."""
        return self._taken[namespace] - len(self._unasked.get(namespace, ())) - self._limit

    def _keep_enough(self, namespace: str) -> None:
        """Let no more leave than are too many; of those that were to leave, the oldest object's stays first."""
        leaving = self._leaving.get(namespace)
        while leaving and len(leaving) > self._excess(namespace):
            service_id, _ = leaving.popitem()
            self._admitted.append(service_id)

    def _stay(self, namespace: str, service_id: str) -> None:
        """Forget that a service leaves for being too much."""
        if namespace in self._leaving:
            self._leaving[namespace].pop(service_id, None)

    def _may_remove(self, service_id: str, rules: Rules) -> bool:
        record = self._observed.get(service_id)
        return _removal(self._desired.ask(service_id, record), record, rules) is not None


def _removal(asked: Desired, observed: Observed, rules: Rules) -> Deregister | Withheld | None:
    """Return the removal of a service as if nothing asked for it, None if nothing proves that it may go."""
    action = decide(replace(asked, claims=(), standing=Standing.DEPARTED), observed, rules)
    return action if isinstance(action, (Deregister, Withheld)) else None


def quota_of(
    limit: int,
    observed: ObservedState,
    desired: DesiredState,
    blocked: dict[str, str],
    *,
    removes: bool = False,
) -> Quota | None:
    """Return the quota of a limited state, None where there is no limit."""
    if not isinstance(observed, LimitedState):
        return None
    return Quota(limit, observed, desired, blocked, removes=removes)
