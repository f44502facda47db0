"""Tells cheaply whether somebody else changed what is on a node of the catalog.

Facts, seen on 1.8.7: the index of `/v1/catalog/node-services/<node>` is that of all nodes and services, so it
moves with changes elsewhere; but a blocking query wakes for changes of its own node only. Either costs
Consul a walk over the node's services (13 ms for 8,200), whatever the filter lets through.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import quote

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.errors import ConsulError

# Below the minute after which balancers like to cut a silent connection, in seconds.
WAIT = 45
# An answer this soon, in seconds, to a query that should have waited, is from something that cannot.
TOO_SOON = 1.0
# Looking takes at most one part in so many of the wall time.
SHARE = 50
# For so long, in seconds, others' changes may hide behind our own: with the wait for a full read, within the minute
# in which a target must be back.
HIDDEN = 40.0

NO_SERVICE = 'ID == "none"'


class NodeWatch:
    """Holds one blocking query on a node while nothing is written, and compares indexes otherwise.

    A change counts as ours when the index does not go beyond our own last write; a write whose index is not
    known explains every index until `settle` seconds after it. A change of somebody else's may so hide
    between two of ours, or beside one without an index: `hidden` seconds after it could have done so first,
    `is_disturbed` says True, and a full read tells.
    """

    def __init__(
        self,
        client: ConsulClient,
        *,
        settle: float = 1.0,
        hidden: float = HIDDEN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._settle = settle
        self._hidden = hidden
        self._clock = clock
        self._node = ""
        self._held: asyncio.Task[int] | None = None
        self._held_from = 0
        self._known = 0
        self._read_at = 0
        self._first_write = 0  # the index of our first write since the last look, 0 for none
        self._unindexed_until: float | None = None
        self._own_writes = 0  # since the query is held
        self._may_hide = False  # whether somebody else's change since then could pass for ours
        self._blind_since: float | None = None  # when our writes ended the held query, until it is held anew
        self._unsure_since: float | None = None  # since when something may be hidden
        self._last_write = 0  # the index of our last write since `begin`, 0 for none
        self._is_written_since = False  # whether we wrote since `begin`
        self._writes = 0  # begun so far
        self._writing = 0  # under way
        self._rest_until = 0.0
        self._is_disturbed = False

    async def begin(self, node: str) -> None:
        """Watch from now on, before a full read of the node, so that nothing falls between; raises."""
        if node != self._node:
            self.stop()
            self._node = node
        self._last_write, self._is_written_since = 0, False
        self._forget_writes()
        if self._held is None or self._held.done():
            self._hold(await self._look())

    def read(self, index: int) -> None:
        """Note that a full read showed everything up to an index; our writes during it may be beyond that."""
        self._known = max(index, self._last_write)
        self._read_at = index
        if not self._is_written_since:
            self._forget_writes()
        self._blind_since = self._unsure_since = None
        self._is_disturbed = False

    def stop(self) -> None:
        """Know nothing any more."""
        if self._held is not None:
            self._held.cancel()
        self._held = None
        self._known = 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Surround a write of ours: until its index is known, nobody can tell whose a change is."""
        self._writes += 1
        self._writing += 1
        try:
            yield
        finally:
            self._writing -= 1

    def wrote(self, index: int) -> None:
        """Note the index of a write of ours, 0 where it is not told."""
        self._is_written_since = True
        if not index:
            self._unindexed_until = self._clock() + self._settle
            self._may_hide = True
            return
        self._own_writes += 1
        self._may_hide = self._may_hide or self._own_writes > 1
        self._first_write = self._first_write or index
        self._last_write = max(self._last_write, index)
        self._known = max(self._known, index)

    async def is_disturbed(self) -> bool:
        """Whether somebody else may have changed the node since the last full read; raises a `ConsulError`."""
        self._is_disturbed = self._is_disturbed or self._has_been_unsure()
        if self._is_disturbed:
            return True
        if self._writing or not self._known:
            return False
        if self._held is not None:
            if not self._held.done():
                self._settle_down()
                return False
            if self._is_foreign(self._held.result()):
                self._is_disturbed = True
                return True
            if not self._held.result():
                self._may_hide = self._may_hide or self._own_writes > 0
            self._held = None
            self._blind_since = self._clock()
        if self._clock() < self._rest_until:
            return False
        writes = self._writes
        index = await self._look()
        if self._writes == writes:
            self._is_disturbed = not self._is_explained(index)
        return self._is_disturbed

    def _has_been_unsure(self) -> bool:
        """Whether for too long nobody could have told somebody else's change from ours."""
        since = self._blind_since if self._unsure_since is None else self._unsure_since
        return since is not None and self._clock() - since >= self._hidden

    def _is_foreign(self, woke_at: int) -> bool:
        """Whether the held query itself woke for somebody else: it ended below any write of ours."""
        if not woke_at:
            return False
        if woke_at < self._held_from:
            return True  # Consul's history was replaced
        is_ours_first = not self._first_write or woke_at >= self._first_write
        return woke_at > self._read_at and not is_ours_first and self._unindexed_until is None

    def _is_explained(self, index: int) -> bool:
        is_unindexed = self._unindexed_until is not None and index >= self._known
        if index != self._known and not is_unindexed:
            return False
        self._settle_down()
        self._known = index
        if self._may_hide and self._unsure_since is None:
            self._unsure_since = self._blind_since
        self._blind_since = None
        self._forget_writes()
        self._hold(index)
        return True

    def _forget_writes(self) -> None:
        self._first_write = self._own_writes = 0
        self._may_hide = False

    def _settle_down(self) -> None:
        """See whether every write without an index must have shown by now."""
        if self._unindexed_until is not None and self._clock() >= self._unindexed_until:
            self._unindexed_until = None

    def _hold(self, index: int) -> None:
        self._held_from = index
        self._held = self._client.hold(self._wait(index))

    async def _wait(self, index: int) -> int:
        """Return the index at which the node changed, lower than the one given if history did; 0: unknown."""
        try:
            while True:
                started = self._clock()
                woke_at = await self._query(index)
                if woke_at != index:
                    return woke_at
                if self._clock() - started < TOO_SOON:
                    return 0
                fresh = await self._query(0)
                if fresh < index:
                    return fresh
                index = fresh
        except ConsulError:
            return 0

    async def _look(self) -> int:
        started = self._clock()
        index = await self._query(0)
        ended = self._clock()
        self._rest_until = ended + SHARE * (ended - started)
        return index

    async def _query(self, index: int) -> int:
        params = {"filter": NO_SERVICE}
        if index:
            params |= {"index": str(index), "wait": f"{WAIT}s"}
        path = f"/v1/catalog/node-services/{quote(self._node, safe='')}"
        answer = await self._client.request("GET", path, params=params, wait=WAIT if index else 0)
        return max(answer.index, 1)
