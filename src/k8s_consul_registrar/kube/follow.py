"""Keeps the mirror level with the API server: one follower a source, each failing alone."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.errors import AccessError, ClusterBusy, ClusterError
from k8s_consul_registrar.kube.mirror import Mirror
from k8s_consul_registrar.kube.objects import Page
from k8s_consul_registrar.model import Kind, Source

# A server that asks for more patience than this is asked again all the same, in seconds.
LONGEST_RETRY_AFTER = 30.0


class Lister(Protocol):
    """Reads complete lists, a page at a time."""

    def pages(self, kind: Kind, *, namespace: str = "") -> AsyncIterator[Page]:
        """Yield the pages of one consistent list; raises a `ClusterError`."""
        ...


class Follower:
    """Lists one source every `period` seconds, sooner when asked to or after a failure."""

    def __init__(
        self,
        source: Source,
        mirror: Mirror,
        client: Lister,
        *,
        period: float,
        timing: Timing,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = source
        self._mirror = mirror
        self._client = client
        self._period = period
        self._timing = timing
        self._clock = clock
        self._relist_at: float | None = None
        self._asked = asyncio.Event()

    def relist(self, at: float) -> None:
        """List again at a moment, in seconds of the clock, if the next list would be later."""
        if self._relist_at is None or at < self._relist_at:
            self._relist_at = at
            self._asked.set()

    async def run(self) -> None:
        """Follow the source for ever; ends only by cancellation."""
        retry = delays(self._timing.retry_first, self._timing.retry_cap)
        while True:
            try:
                await self.list_once()
            except (ClusterError, AccessError) as error:
                self._mirror.fail(self.source, str(error))
                asked = error.retry_after if isinstance(error, ClusterBusy) else None
                await asyncio.sleep(max(next(retry), min(asked or 0.0, LONGEST_RETRY_AFTER)))
            else:
                retry = delays(self._timing.retry_first, self._timing.retry_cap)
                await self._rest()

    async def list_once(self) -> None:
        """Read one complete list into the mirror; a list that breaks off changes nothing there."""
        self._relist_at = None
        listing = self._mirror.start_listing()
        async for page in self._client.pages(self.source.kind, namespace=self.source.namespace):
            self._mirror.add_page(self.source, listing, page.items)
            await asyncio.sleep(0)
        self._mirror.finish_listing(self.source, listing, self._clock())

    async def _rest(self) -> None:
        until = self._clock() + self._period
        while True:
            due = until if self._relist_at is None else min(until, self._relist_at)
            if (left := due - self._clock()) <= 0:
                return
            self._asked.clear()
            try:
                async with asyncio.timeout(left):
                    await self._asked.wait()
            except TimeoutError:
                return
