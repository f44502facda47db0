"""How far a first sync is, said now and then while it is long."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from k8s_consul_registrar.telemetry import get_logger

# Seconds between two lines; a first sync that is done sooner has none.
EVERY = 5.0

log = get_logger("registrar")


@dataclass(frozen=True, slots=True)
class Progress:
    """A first sync at one moment.

    `listed` objects were read of the API server; `is_listed` says that those were all. `targets` came of them,
    `registered` of which are known to stand in Consul, `rejected` objects cannot be targets.
    """

    listed: int
    is_listed: bool
    targets: int
    registered: int
    rejected: int = 0


def describe(now: Progress, before: Progress | None, seconds: float) -> Mapping[str, object]:
    """Return what to say of a first sync, given where it was so many seconds ago (None: at its beginning).

    How long it will take is said once the lists are complete and targets are being registered.
    """
    registered = now.registered - (before.registered if before else 0)
    listed = now.listed - (before.listed if before else 0)
    facts: dict[str, object] = {
        "doing": "registering" if now.is_listed else "listing",
        "listed": now.listed,
        "targets": now.targets,
        "registered": now.registered,
        "rejected": now.rejected,
        "per_second": round(max(0, registered if now.is_listed else listed) / seconds, 1),
    }
    left = now.targets - now.registered
    if now.is_listed and registered > 0 and left > 0:
        facts["seconds_left"] = round(left * seconds / registered)
    return facts


async def tell_progress(
    read: Callable[[], Progress | None],
    backend: str,
    every: float = EVERY,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Log how far the first sync is every so many seconds until `read` returns None: it is done."""
    before, then = None, clock()
    while True:
        await asyncio.sleep(every)
        if (now := read()) is None:
            return
        at = clock()
        log.info("first sync under way", backend=backend, **describe(now, before, max(at - then, 0.001)))
        before, then = now, at
