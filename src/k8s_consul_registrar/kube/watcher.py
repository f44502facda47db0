"""Follows a source by one list and a watch from there on, resumed whenever it ends."""

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from k8s_consul_registrar.errors import (
    ClusterAhead,
    ClusterError,
    ClusterExpired,
    ClusterRefused,
    ClusterUnreachable,
    ClusterUnstreamed,
)
from k8s_consul_registrar.kube.activity import ENDED, RELIST
from k8s_consul_registrar.kube.follow import Following, Lister, Patience, Relists
from k8s_consul_registrar.kube.watch import Bookmark, Broken, Changed, Deleted, WatchEvent
from k8s_consul_registrar.model import Kind

# After these the version we hold leads nowhere: the source is listed again.
LOST = (ClusterExpired, ClusterAhead, ClusterRefused)


class WatchClient(Lister, Protocol):
    """Watches one API server."""

    streams_lists: bool

    def watch(
        self,
        kind: Kind,
        *,
        namespace: str = "",
        label_selector: str = "",
        resource_version: str = "",
        send_initial_events: bool = False,
        timeout_seconds: int,
    ) -> AsyncGenerator[list[WatchEvent], None]:
        """Yield batches of events, an empty one first; raises a `ClusterError`."""
        ...

    async def probe_version(
        self, kind: Kind, *, namespace: str = "", label_selector: str = "", resource_version: str
    ) -> None:
        """Make sure that the server's history contains a version; raises a `ClusterError`."""
        ...


class Watcher:
    """Keeps one source of the mirror level with the API server, by events.

    A list comes first, as the initial events of the watch where the server offers them. A watch that ends
    is resumed from the last version heard of, once the server has confirmed that it knows that version:
    a history that was restored from a backup would answer by silence. Whatever makes the version doubtful
    (410 in either form, another cluster, an answer that makes no sense) leads to a new list.
    """

    def __init__(self, following: Following, client: WatchClient) -> None:
        self._following = following
        self._mirror = following.mirror
        self._source = following.source
        self._client = client
        self._relists = Relists()
        self._patience = Patience(following.timing)
        # Where to resume from, empty while a list is due, and in which cluster.
        self._version = ""
        self._uid = ""
        # Whether a connection was lost, or a list asked for, since we last knew which cluster answers.
        self._is_doubtful = True
        # Whether a list is streaming in as initial events.
        self._is_listing = False
        # Whether the present watch brought an event or a bookmark.
        self._has_heard = False
        # Ends the present watch when a new list is due.
        self._deadline: asyncio.Timeout | None = None

    def relist(self, at: float) -> None:
        """List again at a moment, in seconds of the clock; the watch goes on until then."""
        self._relists.ask(at)
        self._set_deadline()

    async def run(self) -> None:
        """Follow the source for ever; ends only by cancellation."""
        clock, settle = self._following.clock, self._following.timing.watch_settle
        while True:
            began = clock()
            self._has_heard = False
            error = await self._attempt()
            is_brief = clock() - began < settle
            if self._has_heard or (error is None and not is_brief):
                self._patience.reset()
            if self._must_wait(error, is_brief=is_brief):
                await self._patience.wait(error)

    def _must_wait(self, error: ClusterError | None, *, is_brief: bool) -> bool:
        """Whether the next attempt, made at once, could be one of a quick succession of the same."""
        if error is None:
            return is_brief and bool(self._version)
        if isinstance(error, ClusterExpired):
            return is_brief or not self._has_heard
        return not isinstance(error, ClusterAhead | ClusterUnstreamed)

    async def _attempt(self) -> ClusterError | None:
        """Follow by one connection to its end; return why it failed, None where it merely ended."""
        counter = self._following.counter
        try:
            await self._confirm_identity()
            await self._follow()
        except ClusterUnstreamed as error:
            return error
        except ClusterError as error:
            self._is_doubtful = True
            if isinstance(error, LOST):
                self._version = ""
            counter.ended(error.cause)
            self._mirror.fail(self._source, str(error))
            return error
        finally:
            self._is_listing = False
        counter.ended(ENDED if self._version else RELIST)
        return None

    async def _confirm_identity(self) -> None:
        """Ask which cluster answers, after a lost connection and before a list.

        A version of one cluster means nothing in another.
        """
        if not self._is_doubtful:
            return
        uid = await self._following.identity.confirm()
        if uid and self._uid and uid != self._uid:
            self._version = ""
        self._uid = uid or self._uid
        self._is_doubtful = False

    async def _follow(self) -> None:
        """List if that is due, then watch until the watch ends or a new list is due."""
        if self._version:
            await self._client.probe_version(
                self._source.kind,
                namespace=self._source.namespace,
                label_selector=self._following.label_selector,
                resource_version=self._version,
            )
        else:
            self._relists.begin(self._following.clock())
            if self._client.streams_lists:
                self._mirror.start_listing(self._source)
                self._is_listing = True
            else:
                self._version = await self._following.list_pages(self._client)
        deadline = self._deadline = asyncio.timeout(None)
        try:
            async with deadline:
                self._set_deadline()
                await self._watch()
        except TimeoutError:
            if not deadline.expired():
                raise
            self._version, self._is_doubtful = "", True
        finally:
            self._deadline = None

    async def _watch(self) -> None:
        longest = self._following.timing.watch_timeout
        batches = self._client.watch(
            self._source.kind,
            namespace=self._source.namespace,
            label_selector=self._following.label_selector,
            resource_version=self._version,
            send_initial_events=self._is_listing,
            timeout_seconds=max(1, int(random.uniform(longest, 2 * longest))),  # noqa: S311 - spreads load
        )
        async with aclosing(batches):
            async for batch in batches:
                await self._take(batch)
        if self._is_listing:
            raise ClusterUnreachable(f"cannot list {self._source}: the API server broke off its answer")

    async def _take(self, batch: Sequence[WatchEvent]) -> None:
        if not self._is_listing:
            self._mirror.resume(self._source)
        for event in batch:
            if isinstance(event, Bookmark) and event.ends_initial_events and self._is_listing:
                await self._following.finish_listing()
                self._is_listing = False
                self._set_deadline()
            else:
                self._apply(event)
            if not self._is_listing:
                self._has_heard = True
                self._version = event.version or self._version
        if batch:
            self._following.counter.heard_at = self._following.clock()
        if self._mirror.is_opaque(self._source):
            self.relist(self._following.clock() + self._following.timing.relist_opaque)

    def _apply(self, event: WatchEvent) -> None:
        match event:
            case Changed():
                self._mirror.put(self._source, event.item, is_added=event.is_added)
            case Deleted():
                self._mirror.remove(self._source, event.item)
            case Broken():
                raise event.error

    def _set_deadline(self) -> None:
        """Let the watch end when a list is due; one that is streaming in is not cut short."""
        if self._deadline is None or self._is_listing or self._relists.at is None or self._deadline.expired():
            return
        wait = max(0.0, self._relists.at - self._following.clock())
        self._deadline.reschedule(asyncio.get_running_loop().time() + wait)
