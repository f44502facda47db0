"""Drift of a node of the catalog: changes that are not ours, noticed at little cost.

Facts, seen on 1.8.7: the index of `/v1/catalog/node-services/<node>` is that of all nodes and services, so it
moves with changes of other nodes; but a blocking query wakes for changes of its own node only. Either costs
Consul a walk over the node's services (13 ms for 8,200), whatever the filter lets through.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import quote

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.errors import ConsulError

# In seconds: Consul 1.22 and later drop an answer that takes longer than 30 s, and balancers like to cut a
# connection that is silent for a minute.
WAIT = 25
# An answer this soon, in seconds, to a query that should have waited, is from something that cannot.
TOO_SOON = 1.0
# Looking takes at most one part in this many of the wall time.
SHARE = 50
# Others' changes may hide behind our own for this many seconds: with the wait for a full read, that is within
# the minute in which a target must be back.
HIDDEN = 40.0

NO_SERVICE = 'ID == "none"'


class NodeDrift:
    """One blocking query on a node while nothing is written, and a comparison of indexes otherwise.

    A change counts as ours when the index does not go beyond our own last write; a write whose index is not
    known explains every index until `settle` seconds after it. A foreign change may so be masked by our own,
    between two of our writes or beside one without an index. Once that has been possible for `hidden`
    seconds, `has_drifted` returns True and lets a full read decide. An index below one that was seen earlier,
    or one of our own writes that does not go beyond it, means that Consul's history was replaced (a snapshot
    restored, a data directory emptied): that is drift at once, until a full read that began afterwards.
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
        self._querying: asyncio.Task[int] | None = None
        self._queried_from = 0
        self._known = 0
        self._read_at = 0
        self._first_write = 0  # the index of our first write since the last look, 0 for none
        self._unindexed_until: float | None = None
        self._own_writes = 0  # since the query was sent
        self._may_mask = False  # a foreign change since then could pass for ours
        self._unwatched_since: float | None = None  # when our writes ended the query, until the next
        self._masked_since: float | None = None  # since when something may be masked
        self._last_write = 0  # the index of our last write since `begin`, 0 for none
        self._is_written_since = False  # we wrote since `begin`
        self._writes = 0  # begun so far
        self._writing = 0  # under way
        self._rest_until = 0.0
        self._has_drifted = False
        self._newest = 0  # the highest index seen since history last went back
        self._rewinds = 0  # how often history went back
        self._rewinds_at_begin = 0
        self._rewinds_read = 0  # those that a full read began after
        self._newest_at_begin = 0

    async def begin(self, node: str) -> None:
        """Watch from now on, before a full read of the node, so that nothing falls between; raises."""
        if node != self._node:
            self.stop()
            self._node = node
            self._newest = 0
        self._last_write, self._is_written_since = 0, False
        self._forget_writes()
        if self._querying is None or self._querying.done():
            self._start_query(await self._look())
        self._rewinds_at_begin, self._newest_at_begin = self._rewinds, self._newest

    def read(self, index: int) -> None:
        """Record that a full read showed everything up to an index; our writes during it may be beyond that."""
        self._rewinds_read = self._rewinds_at_begin
        self._see(index, self._newest_at_begin)
        self._known = max(index, self._last_write)
        self._read_at = index
        if not self._is_written_since:
            self._forget_writes()
        self._unwatched_since = self._masked_since = None
        self._has_drifted = False

    def stop(self) -> None:
        """Forget everything but the highest index."""
        if self._querying is not None:
            self._querying.cancel()
        self._querying = None
        self._known = 0
        self._rewinds_read = self._rewinds

    @contextmanager
    def writing(self) -> Iterator[int]:
        """Surround our own write: until its index is known, foreign changes look like ours.

        The context is the highest index seen before it, for `wrote`.
        """
        self._writes += 1
        self._writing += 1
        try:
            yield self._newest
        finally:
            self._writing -= 1

    def wrote(self, index: int, newest: int = 0) -> None:
        """Record the index of our own write, 0 where it is unknown; `newest` was the highest one seen before it."""
        self._is_written_since = True
        if not index:
            self._unindexed_until = self._clock() + self._settle
            self._may_mask = True
            return
        self._see(index, newest + 1)
        self._own_writes += 1
        self._may_mask = self._may_mask or self._own_writes > 1
        self._first_write = self._first_write or index
        self._last_write = max(self._last_write, index)
        self._known = max(self._known, index)

    async def has_drifted(self) -> bool:
        """Return whether others may have changed the node since the last full read; raises a `ConsulError`."""
        self._has_drifted = self._has_drifted or self._was_masked_too_long()
        if self._has_drifted or self._rewinds != self._rewinds_read:
            return True
        if self._writing or not self._known:
            return False
        if self._querying is not None:
            if not self._querying.done():
                self._settle_down()
                return False
            if self._woke_for_others(self._querying.result()):
                self._has_drifted = True
                return True
            if not self._querying.result():
                self._may_mask = self._may_mask or self._own_writes > 0
            self._querying = None
            self._unwatched_since = self._clock()
        if self._clock() < self._rest_until:
            return False
        writes = self._writes
        index = await self._look()
        if self._writes == writes:
            self._has_drifted = not self._is_explained(index)
        return self._has_drifted or self._rewinds != self._rewinds_read

    def _was_masked_too_long(self) -> bool:
        """Return whether a foreign change could have been masked by ours for too long."""
        since = self._unwatched_since if self._masked_since is None else self._masked_since
        return since is not None and self._clock() - since >= self._hidden

    def _woke_for_others(self, woke_at: int) -> bool:
        """Return True if a foreign change ended the blocking query: its index is below all of our own writes."""
        if not woke_at:
            return False
        is_ours_first = not self._first_write or woke_at >= self._first_write
        return woke_at > self._read_at and not is_ours_first and self._unindexed_until is None

    def _is_explained(self, index: int) -> bool:
        is_unindexed = self._unindexed_until is not None and index >= self._known
        if index != self._known and not is_unindexed:
            return False
        self._settle_down()
        self._known = index
        if self._may_mask and self._masked_since is None:
            self._masked_since = self._unwatched_since
        self._unwatched_since = None
        self._forget_writes()
        self._start_query(index)
        return True

    def _forget_writes(self) -> None:
        self._first_write = self._own_writes = 0
        self._may_mask = False

    def _settle_down(self) -> None:
        """Forget writes without an index once they must have shown."""
        if self._unindexed_until is not None and self._clock() >= self._unindexed_until:
            self._unindexed_until = None

    def _start_query(self, index: int) -> None:
        self._queried_from = index
        self._querying = self._client.start(self._wait(index))

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
        newest = self._newest
        answer = await self._client.request("GET", path, params=params, wait=WAIT if index else 0)
        self._see(max(answer.index, 1), newest)
        return max(answer.index, 1)

    def _see(self, index: int, least: int) -> None:
        """Compare an index with the lowest one that it can be, by what was seen before its request was sent."""
        if index < least:
            self._rewinds += 1
            self._newest = index
        else:
            self._newest = max(self._newest, index)
