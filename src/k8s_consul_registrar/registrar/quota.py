"""Quota: how many targets a namespace may have; new ones beyond that are blocked until there is room.

What Consul holds counts and stays. Of the others the oldest object comes first.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from typing import TypeAlias

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.model import Rejection, Target
from k8s_consul_registrar.registrar.decide import Action, Nothing, Register, Reject, Withheld
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.observed import (
    AsDesired,
    Foreign,
    ObservedState,
    Other,
    Unknown,
    object_behind,
)
from k8s_consul_registrar.telemetry import get_logger

# Seconds between two lines about namespaces at their limit, and how many of those a line names.
TELL_EVERY = 60.0
MOST_NAMED = 20

_Rank: TypeAlias = tuple[int, str, str]

log = get_logger("quota")


class LimitedState(ObservedState):
    """Observed state that tells a quota of each ID whose claims or record change."""

    quota: "Quota"

    def changed(self, service_id: str) -> None:
        """Note that the claims on an ID, or its record, changed."""
        super().changed(service_id)
        self.quota.touch(service_id)

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
        self._heap: list[tuple[_Rank, str]] = []

    def add(self, service_id: str, rank: _Rank) -> None:
        """Let an ID wait."""
        if self.ranks.get(service_id) == rank:
            return
        self.ranks[service_id] = rank
        heappush(self._heap, (rank, service_id))
        # Entries of IDs that no longer wait stay until they are more than the others.
        if len(self._heap) > 2 * len(self.ranks) + 16:
            self._heap = [(rank, one) for one, rank in self.ranks.items()]
            heapify(self._heap)

    def take(self) -> str:
        """Return the first ID, which waits no longer; there must be one."""
        while True:
            rank, service_id = heappop(self._heap)
            if self.ranks.get(service_id) == rank:
                del self.ranks[service_id]
                return service_id


class Quota:
    """The places of each namespace: at most `limit` are given away, and what Consul holds has one in any case.

    A change costs what it changes, whatever the size of the namespace. New targets wait until every source was
    listed, or cannot be, so that the order in which a list arrives decides nothing.
    """

    def __init__(
        self,
        limit: int,
        observed: LimitedState,
        desired: DesiredState,
        blocked: dict[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the quota; `blocked` is where blocked IDs are shown, with their namespace."""
        self._limit = limit
        self._observed = observed
        self._desired = desired
        self.blocked = blocked
        self._clock = clock
        self._namespace_of: dict[str, str] = {}
        self._taken: defaultdict[str, int] = defaultdict(int)
        self._waiting: defaultdict[str, _Queue] = defaultdict(_Queue)
        # Namespaces in which a place may have become free, or wanted.
        self._open: set[str] = set()
        self._is_listed = False
        self._touched: dict[str, None] = {}
        self._is_due = True
        self._admitted: list[str] = []
        self._told_at = float("-inf")
        observed.quota = self

    def touch(self, service_id: str) -> None:
        """Note that the claims on an ID, or its record, are about to change."""
        self._touched[service_id] = None

    def recount(self) -> None:
        """Count everything again at the next look."""
        self._is_due = True

    def apply(self, action: Action, service_id: str) -> Action:
        """Return what a quota makes of a decision: a new target beyond the limit is rejected."""
        is_new = isinstance(action, Register) or (
            isinstance(action, Withheld) and isinstance(action.write, Register)
        )
        if not is_new:
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
        now = self._clock()
        if self.blocked and now - self._told_at >= TELL_EVERY:
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
        if self._is_due:
            self._is_due = False
            self._namespace_of.clear()
            self._taken.clear()
            self._waiting.clear()
            touched = dict.fromkeys((*self._observed.ids(), *claims))
        else:
            touched = self._touched
        self._touched = {}
        for service_id in touched:
            self._update(service_id, claims.get(service_id, ()))
        if not self._is_listed:
            statuses = self._desired.store.statuses().values()
            self._is_listed = all(one.listed_at is not None or one.problem for one in statuses)
            if self._is_listed:
                for namespace, waiting in self._waiting.items():
                    for service_id in waiting.ranks:
                        self._block(service_id, namespace)
                    self._admitted += waiting.ranks
        if self._is_listed:
            for namespace in self._open:
                self._fill(namespace, claims)
            self._open.clear()

    def _update(self, service_id: str, claims: tuple[Target, ...]) -> None:
        record = self._observed.get(service_id)
        key = claims[0].key if claims else object_behind(record)
        namespace = key.namespace if key is not None else self._namespace_of.get(service_id, "")
        is_held = isinstance(record, AsDesired | Other | Unknown) or self._observed.is_in_flight(service_id)
        if not namespace or isinstance(record, Foreign) or not (claims or is_held):
            self._release(service_id)
        elif is_held:
            self._take(service_id, namespace)
        elif service_id not in self._namespace_of:
            self._waiting[namespace].add(service_id, min(one.rank for one in claims))
            self._open.add(namespace)
            if self._is_listed and service_id not in self.blocked:
                self._block(service_id, namespace)

    def _block(self, service_id: str, namespace: str) -> None:
        self.blocked[service_id] = namespace
        ObservedState.changed(self._observed, service_id)

    def _unblock(self, service_id: str) -> None:
        if self.blocked.pop(service_id, None) is not None:
            ObservedState.changed(self._observed, service_id)

    def _take(self, service_id: str, namespace: str) -> None:
        if service_id not in self._namespace_of:
            self._namespace_of[service_id] = namespace
            self._taken[namespace] += 1
            self._waiting[namespace].ranks.pop(service_id, None)
        self._unblock(service_id)

    def _release(self, service_id: str) -> None:
        namespace = self._namespace_of.pop(service_id, None)
        if namespace is not None:
            self._taken[namespace] -= 1
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


def quota_of(
    limit: int, observed: ObservedState, desired: DesiredState, blocked: dict[str, str]
) -> Quota | None:
    """Return the quota of a limited state, None where there is no limit."""
    return Quota(limit, observed, desired, blocked) if isinstance(observed, LimitedState) else None
