"""Clears the places our services have left, once they all are at the new one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.errors import ConsulBusy, ConsulError, ConsulUnreachable
from k8s_consul_registrar.model import Service, Written
from k8s_consul_registrar.registrar.passes import Passes
from k8s_consul_registrar.telemetry import get_logger

log = get_logger("relocation")


class Former(Protocol):
    """A place that may hold services of ours which belong elsewhere now."""

    name: str

    def services(self) -> AsyncIterator[Service]:
        """Yield them; raises a `ConsulError`."""
        ...

    async def clear(self) -> Written:
        """Remove them; raises a `ConsulError`."""
        ...


async def leave(
    places: Sequence[Former], passes: Passes, may_write: Callable[[], bool], timing: Timing
) -> None:
    """Clear each former place once, after the first full comparison at the new one is complete.

    Never the other way round: while anything is refused at the new place the old one keeps everything.
    """
    for place in places:
        retry = delays(timing.retry_first, timing.retry_cap)
        while True:
            while not (passes.is_complete and may_write()):  # noqa: ASYNC110 - it is over in a few seconds
                await asyncio.sleep(timing.retry_first)
            try:
                written = await place.clear()
            except (ConsulUnreachable, ConsulBusy):
                await asyncio.sleep(next(retry))
                continue
            except ConsulError as error:
                # A place we have no right to look at cannot be one we wrote to with this token.
                log.debug("a former place is left as it is", place=place.name, problem=str(error))
            else:
                if written.done or written.failures:
                    log.info(
                        "a former place is cleared",
                        place=place.name,
                        removed=written.done,
                        refused=len(written.failures),
                    )
            break
