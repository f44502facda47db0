"""Reflectors: each lists and watches one source and feeds a Store."""

import asyncio
import random
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from k8s_consul_registrar.backoff import Backoff, Timing
from k8s_consul_registrar.errors import (
    ClusterAhead,
    ClusterError,
    ClusterExpired,
    ClusterRefused,
)
from k8s_consul_registrar.kube.client import PAGE_SIZE, KubeClient
from k8s_consul_registrar.kube.cluster import ClusterUid
from k8s_consul_registrar.kube.objects import Broken, Changed, Deleted, WatchEvent
from k8s_consul_registrar.kube.source_state import (
    AFTER,
    ENDED,
    RELIST,
    WatchCounts,
    WatchStats,
    compare_versions,
    is_reached,
)
from k8s_consul_registrar.kube.store import Store
from k8s_consul_registrar.model import EVERY_OBJECT, Kind, Selector, Source
from k8s_consul_registrar.telemetry import get_logger

# Timers may fire early by the resolution of the loop's clock.
TIMER_SLACK = 0.01  # seconds
# A request for a list so shortly after another is served by the same one.
REQUEST_SPACING = 1.0  # seconds
SLICE = 10  # events taken over before the loop gets its turn; less than a millisecond of work
# After these the version we hold leads nowhere: the source is listed again.
VERSION_LOST = (ClusterExpired, ClusterAhead, ClusterRefused)
# Lists in pages that may expire in a row before one without pages.
MAX_EXPIRED_LISTS = 2
log = get_logger("kube")


class _Reason(Enum):
    """Reasons of our own for a new list, beside requests for one."""

    PERIOD = auto()
    NAMELESS = auto()
    CATCH_UP = auto()


@dataclass(frozen=True, slots=True)
class Following:
    """The way in which the sources of a mode are followed.

    With `watches` False a source is listed every `period` seconds. `period` is also the least time between two
    lists whose only reason is that the source did not catch up. `selectors` are by kind. `cluster_uid` None means
    that any cluster may answer.
    """

    client: KubeClient
    timing: Timing
    period: float
    watches: bool = True
    selectors: Mapping[Kind, Selector] = field(default_factory=dict)
    cluster_uid: ClusterUid | None = None
    on_internal_error: Callable[[str, Exception], None] | None = None
    clock: Callable[[], float] = time.monotonic


class Reflector:
    """Keeps one source of a Store level with the API server.

    A list comes first, then a watch from its version. A watch that ends is resumed from the last version
    received, after the server named its present version: ours being newer means that its history went
    back. Until that version is reached the source is catching up.
    """

    def __init__(
        self,
        source: Source,
        store: Store[Any],
        following: Following,
        before_objects: Callable[[Kind], Awaitable[None]] | None = None,
    ) -> None:
        """Make the reflector; what a list shows waits for `before_objects`, while the list is on its way."""
        self._source = source
        self._store = store
        self._following = following
        self._client, self._timing, self._clock = following.client, following.timing, following.clock
        self._selector = following.selectors.get(source.kind, EVERY_OBJECT)
        self._before_objects = before_objects
        self._backoff = Backoff(following.timing)
        # Set once the source was listed or has failed.
        self.tried = asyncio.Event()
        # The version to resume from, empty while a list is due, and the cluster it belongs to.
        self._version = ""
        self._uid = ""
        self._is_cluster_doubtful = True
        # The version that ends catching up, empty while the source is not behind.
        self._until = ""
        self._expired_lists = 0
        # When new lists are due: as requested, and for reasons of our own.
        self._requests: list[float] = []
        self._dues: dict[_Reason, float] = {}
        self._last_catch_up_list = float("-inf")
        # Ends the present watch or pause when a list is due.
        self._deadline: asyncio.Timeout | None = None
        # When the present watch began, None before it; True once it brought an event or a bookmark.
        self._watch_began: float | None = None
        self._has_heard = False
        self._counts = WatchCounts()
        self._logged: set[str] = set()

    def relist(self, at: float) -> None:
        """List again at a moment, in seconds of the clock; the watch goes on until then."""
        if not any(at <= due <= at + REQUEST_SPACING for due in self._requests):
            self._requests.append(at)
            self._move_deadline()

    def stats(self) -> WatchStats:
        """Return the counts so far."""
        return self._counts.stats()

    async def run(self) -> None:
        """Follow the source; ends only by cancellation.

        A wait follows each error, and each watch that ended at once. The waits grow until a watch makes
        progress: it lasts, or brings something and can be resumed.
        """
        while True:
            error = await self._attempt()
            if error is not None:
                self._fail(error)
            self.tried.set()
            if self._made_progress(error):
                self._backoff.reset()
            if error is not None or (self._version and self._is_brief()):
                await self._backoff.wait(error)

    def _is_brief(self) -> bool:
        """Return whether the last attempt had no watch, or one that ended at once."""
        return self._watch_began is None or self._clock() - self._watch_began < self._timing.watch_settle

    def _made_progress(self, error: Exception | None) -> bool:
        """Return True if the waits may be short again: a list is costly, so one list alone is not enough for a watch."""
        if error is None and (not self._following.watches or not self._is_brief()):
            return True
        return self._has_heard and (bool(self._version) or not self._is_brief())

    async def _attempt(self) -> Exception | None:
        """List or resume, then watch or pause; return the error that ended it, None for an ordinary end."""
        self._watch_began, self._has_heard = None, False
        try:
            await self._confirm_cluster()
            await self._ask_present_version()
            if not self._version:
                await self._list()
            await self._watch_until_due()
        except ClusterError as error:
            return error
        except Exception as error:  # noqa: BLE001 - an exception fails this source and nothing else
            self._note_internal_error(error)
            return error
        return None

    def _fail(self, error: Exception) -> None:
        self._is_cluster_doubtful = True
        if isinstance(error, ClusterError):
            problem, cause = str(error), error.cause
        else:
            problem, cause = f"internal error: {type(error).__name__}, see the log", ClusterError.cause
        if isinstance(error, VERSION_LOST) or not isinstance(error, ClusterError):
            self._version = ""
        self._counts.ended(cause)
        try:
            self._store.fail(self._source, problem, cause)
        except Exception as another:  # noqa: BLE001 - likewise
            self._note_internal_error(another)

    def _note_internal_error(self, error: Exception) -> None:
        """Count an exception that nothing outside may cause; log each place it comes from once."""
        self._counts.internal_errors += 1
        if self._following.on_internal_error is not None:
            self._following.on_internal_error(f"source {self._source}", error)
            return
        place = "".join(traceback.format_tb(error.__traceback__)[-1:]) + type(error).__name__
        if place not in self._logged:
            self._logged.add(place)
            log.error("internal error", source=str(self._source), exc_info=error)

    async def _confirm_cluster(self) -> None:
        """Ask which cluster answers, after a lost connection and before a list.

        A version of one cluster means nothing in another.
        """
        if self._following.cluster_uid is None or not self._is_cluster_doubtful:
            return
        uid = await self._following.cluster_uid.confirm()
        if uid and self._uid and uid != self._uid:
            self._version = ""
        self._uid = uid or self._uid
        self._is_cluster_doubtful = False

    async def _ask_present_version(self) -> None:
        """Ask, before a watch is resumed, for the version up to which events may be missing.

        A watch from a version that lies in the server's future would be silent, so that is found out first.
        """
        self._until = ""
        self._dues.pop(_Reason.CATCH_UP, None)
        if not self._version:
            return
        present = await self._client.current_version(self._source.kind, namespace=self._source.namespace)
        order = compare_versions(self._version, present)
        if order == 1:
            raise ClusterAhead(
                f"cannot watch {self._source}: our version {self._version} is newer than the API server's "
                f"{present}: its history went back"
            )
        self._until = present
        if order == 0:
            return
        now = self._clock()
        patience = 0.0 if order is None else self._timing.catch_up
        due = max(now + patience, self._last_catch_up_list + self._following.period)
        if due <= now:
            self._version, self._last_catch_up_list = "", now
            self._is_cluster_doubtful = True
        else:
            self._dues[_Reason.CATCH_UP] = due

    async def _list(self) -> None:
        """Read one complete list into the Store, and its version."""
        began = self._clock()
        self._requests = [due for due in self._requests if due > began + TIMER_SLACK]
        self._dues.clear()
        self._until = ""
        is_whole = self._expired_lists >= MAX_EXPIRED_LISTS
        if is_whole:
            self._expired_lists = 0
        self._store.start_listing(self._source, began)
        version = ""
        pages = self._client.pages(
            self._source.kind,
            namespace=self._source.namespace,
            selector=self._selector,
            page_size=None if is_whole else PAGE_SIZE,
            # Following takes both rights, so that both are named where one is missing.
            verb="list and watch" if self._following.watches else "list",
        )
        try:
            async with aclosing(pages):
                async for page in pages:
                    if not version and self._before_objects is not None:
                        await self._before_objects(self._source.kind)
                    version = version or page.resource_version
                    for item in page.items:
                        self._store.put(self._source, item)
                    await asyncio.sleep(0)
        except ClusterExpired:
            self._expired_lists += 1
            raise
        self._expired_lists = 0
        while self._store.infer_absences(self._source):  # noqa: ASYNC110 - gives way between slices
            await asyncio.sleep(0)
        self._counts.heard_at = self._clock()
        self._store.finish_listing(self._source, self._counts.heard_at)
        self._counts.lists += 1
        self._version = version
        self.tried.set()

    async def _watch_until_due(self) -> None:
        """Watch, or pause where nothing is watched, until the watch ends or a new list is due."""
        deadline = self._deadline = asyncio.timeout(None)
        try:
            async with deadline:
                if not self._following.watches:
                    self._dues[_Reason.PERIOD] = self._clock() + self._following.period
                self._move_deadline()
                await (self._watch() if self._following.watches else asyncio.Event().wait())
        except TimeoutError:
            if not deadline.expired():
                raise
            if self._dues.get(_Reason.CATCH_UP, float("inf")) <= self._clock() + TIMER_SLACK:
                self._last_catch_up_list = self._clock()
            self._version, self._is_cluster_doubtful = "", True
        finally:
            self._deadline = None
        if self._version:
            self._store.resume(self._source, "")
        if self._following.watches:
            self._counts.ended(ENDED if self._version else RELIST)

    async def _watch(self) -> None:
        shortest = self._timing.watch_timeout
        batches = self._client.watch(
            self._source.kind,
            namespace=self._source.namespace,
            selector=self._selector,
            resource_version=self._version,
            timeout_seconds=max(1, int(random.uniform(shortest, 2 * shortest))),  # noqa: S311 - spreads load
        )
        async with aclosing(batches):
            async for batch in batches:
                if self._watch_began is None:
                    self._watch_began = self._clock()
                    if self._until:
                        self._store.resume(self._source, self._until)
                for count, event in enumerate(batch, 1):
                    self._apply(event)
                    if count % SLICE == 0:
                        await asyncio.sleep(0)
                if batch:
                    self._counts.heard_at = self._clock()
                self._note_progress()

    def _apply(self, event: WatchEvent) -> None:
        match event:
            case Changed():
                self._store.put(self._source, event.item, is_added=event.is_added)
            case Deleted():
                self._store.remove(self._source, event.item)
            case Broken():
                raise event.error
        self._has_heard = True
        self._version = event.version or self._version

    def _note_progress(self) -> None:
        if self._until and is_reached(self._version, self._until):
            self._until = ""
            self._dues.pop(_Reason.CATCH_UP, None)
            self._move_deadline()
            self._store.caught_up(self._source)
        if _Reason.NAMELESS not in self._dues and self._store.status(self._source).has_nameless:
            self._dues[_Reason.NAMELESS] = self._clock() + self._timing.relist_opaque
            self._move_deadline()

    def _move_deadline(self) -> None:
        """Let the present watch or pause end when the next list is due."""
        if self._deadline is None or self._deadline.expired():
            return
        due = min([*self._requests, *self._dues.values()], default=None)
        left = None if due is None else max(0.0, due - self._clock())
        self._deadline.reschedule(None if left is None else asyncio.get_running_loop().time() + left)


class Reflectors:
    """All reflectors of a mode, one per source, into one Store."""

    def __init__(self, sources: Sequence[Source], store: Store[Any], following: Following) -> None:
        self._reflectors = {
            source: Reflector(source, store, following, self._others_tried) for source in sources
        }

    async def run(self) -> None:
        """Follow every source; ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            for reflector in self._reflectors.values():
                group.create_task(reflector.run())

    async def _others_tried(self, kind: Kind) -> None:
        """Wait until the kinds that one depends on were listed or have failed, so that it is written once."""
        first, patience = AFTER.get(kind, ((), 0.0))
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                for other in [one for source, one in self._reflectors.items() if source.kind in first]:
                    await other.tried.wait()

    def relist(self, source: Source, at: float) -> None:
        """Request a new complete list of a source at a moment of the clock."""
        self._reflectors[source].relist(at)

    def stats(self) -> Mapping[Source, WatchStats]:
        """Return each source's counts."""
        return {source: reflector.stats() for source, reflector in self._reflectors.items()}
