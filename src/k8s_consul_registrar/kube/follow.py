"""What followers of a source share: how they list, how long they wait, and when they list again."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.errors import ClusterBusy, ClusterError
from k8s_consul_registrar.kube.activity import ActivityCounter
from k8s_consul_registrar.kube.objects import Item, Page
from k8s_consul_registrar.model import Kind, Source

# After so many objects of a page others get their turn.
SLICE = 100
# Timers may fire early by the resolution of the loop's clock, in seconds.
TIMER_SLACK = 0.01


class Lister(Protocol):
    """Reads complete lists, a page at a time."""

    def pages(
        self, kind: Kind, *, namespace: str = "", label_selector: str = ""
    ) -> AsyncGenerator[Page, None]:
        """Yield the pages of one consistent list; raises a `ClusterError`."""
        ...


class Identity(Protocol):
    """Knows which cluster answers."""

    async def confirm(self) -> str:
        """Return the cluster's UID, empty where it is hidden; raises a `ClusterError`."""
        ...


class Copy(Protocol):
    """Takes in what is heard of a source; a mirror of targets, or a table of something smaller."""

    def start_listing(self, source: Source) -> None:
        """Begin to take in a list, or begin it anew where it broke off."""
        ...

    def put(self, source: Source, item: Item, *, is_added: bool = True) -> None:
        """Take in an object as it is now."""
        ...

    def remove(self, source: Source, item: Item) -> None:
        """Take in that an object is gone; `item` is its last state."""
        ...

    def infer_absences(self, source: Source) -> bool:
        """Take in a slice of what a complete list lacks; return whether more is left."""
        ...

    def finish_listing(self, source: Source, at: float) -> None:
        """Take in that a list is complete, at a moment of the clock."""
        ...

    def fail(self, source: Source, problem: str) -> None:
        """Note that a source cannot be followed."""
        ...

    def resume(self, source: Source) -> None:
        """Note that a source is followed again from where it was lost."""
        ...

    def is_opaque(self, source: Source) -> bool:
        """Whether something was seen there that could not even be named."""
        ...


class Follower(Protocol):
    """Keeps one source of the mirror level with the API server."""

    def relist(self, at: float) -> None:
        """List again at a moment, in seconds of the clock, if no list began since and the next would be later."""
        ...

    async def run(self) -> None:
        """Follow the source for ever; ends only by cancellation."""
        ...


@dataclass(frozen=True, slots=True)
class Following:
    """What a follower of one source works with."""

    source: Source
    mirror: Copy
    identity: Identity
    timing: Timing
    counter: ActivityCounter
    label_selector: str = ""
    clock: Callable[[], float] = time.monotonic

    async def list_pages(self, client: Lister) -> str:
        """Read one complete list into the mirror and return its version; raises a `ClusterError`."""
        self.mirror.start_listing(self.source)
        pages = client.pages(
            self.source.kind, namespace=self.source.namespace, label_selector=self.label_selector
        )
        version = ""
        async with aclosing(pages):
            async for page in pages:
                version = page.resource_version
                for count, item in enumerate(page.items, 1):
                    self.mirror.put(self.source, item)
                    if count % SLICE == 0:
                        await asyncio.sleep(0)
        await self.finish_listing()
        return version

    async def finish_listing(self) -> None:
        """Tell the mirror that the list is complete."""
        while self.mirror.infer_absences(self.source):  # noqa: ASYNC110 - gives way between slices
            await asyncio.sleep(0)
        self.counter.heard_at = self.clock()
        self.mirror.finish_listing(self.source, self.counter.heard_at)
        self.counter.lists += 1


class Relists:
    """The moment, if any, at which somebody wants a new list of a source."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.asked = asyncio.Event()

    def ask(self, at: float) -> None:
        """Want a list that begins at a moment or later, in seconds of the clock."""
        if self.at is None or at < self.at:
            self.at = at
            self.asked.set()

    def begin(self, now: float) -> None:
        """Note that a list begins, which is repeated until one is complete: it serves what was due by now."""
        if self.at is not None and self.at <= now + TIMER_SLACK:
            self.at = None


class Patience:
    """The waits between attempts: they grow while nothing comes of them."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self.reset()

    def reset(self) -> None:
        """Begin with the shortest wait again."""
        self._delays = delays(self._timing.retry_first, self._timing.retry_cap)

    async def wait(self, error: ClusterError | None = None) -> None:
        """Wait, at least as long as the API server asked for, within reason."""
        asked = error.retry_after if isinstance(error, ClusterBusy) else None
        await asyncio.sleep(max(next(self._delays), min(asked or 0.0, self._timing.retry_after_cap)))
