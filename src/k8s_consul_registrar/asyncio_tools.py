"""The event loop and its helpers: long work in slices, tasks that end together."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from typing import Any, TypeVar

import uvloop

from k8s_consul_registrar.telemetry import get_logger

T = TypeVar("T")

log = get_logger("loop")


def new_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that logs the errors no task is there to receive."""
    loop = uvloop.new_event_loop()
    loop.set_exception_handler(_report)
    return loop


def _report(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """Log an error of the loop's own, with its traceback unless it only tells that a connection has closed.

    The loop's TLS may write to a transport in the very turn in which that was closed, by us or by the peer.
    """
    transport, error = context.get("transport"), context.get("exception")
    if transport is not None and transport.is_closing() and isinstance(error, RuntimeError):
        log.debug("TLS wrote to a closed connection", error=str(error))
    else:
        loop.default_exception_handler(dict(context))


async def in_slices(items: Iterable[T], size: int) -> AsyncIterator[T]:
    """Yield the items, and let other tasks run after every `size` of them."""
    for count, item in enumerate(items, 1):
        yield item
        if count % size == 0:
            await asyncio.sleep(0)


async def end_tasks(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until all of them have ended; their results and errors are dropped."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
