"""Previous locations: an agent or node where our services were before the settings changed, or its agent died."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.errors import ConsulBusy, ConsulError, ConsulUnreachable
from k8s_consul_registrar.model import Service, Written
from k8s_consul_registrar.telemetry import get_logger

# Makes a removal that it is given, and notes it with its proof (`registrar.audit`).
Remove: TypeAlias = Callable[
    [Callable[[Sequence[Service]], Awaitable[Written]], Sequence[Service]], Awaitable[Written]
]
BATCH = 1024  # services removed at once, so that a long list is never kept whole

log = get_logger("previous_location")


class Location(Protocol):
    """An agent, or a node of the catalog."""

    def services(self) -> AsyncIterator[Service]:
        """Yield every service there, whatever wrote it."""

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Remove services."""


class PreviousLocation:
    """A location that our services have left; the caller sees to it that all of them are at the new one.

    A synthetic node is left behind empty. Removing a node would remove every service on it, even one that
    was registered a moment ago. Services written there after `begin` stay: in a rollout it is the new place of
    the other registrar, whose settings are newer. `may_go` returns None where it is not known yet.
    """

    def __init__(
        self,
        name: str,
        location: Location,
        is_ours: Callable[[Service], bool],
        may_go: Callable[[Service], bool | None] = lambda _: True,
    ) -> None:
        self.name = name
        self._location = location
        self._is_ours = is_ours
        self._may_go = may_go
        self.is_in_doubt = False  # True if the last clearing left a service of which it was not known yet
        # Version and content of each service that was there at first; None where that does not matter.
        self._before: dict[str, tuple[int, int]] | None = None

    async def begin(self) -> None:
        """Note the services that are there now, because only they may be cleared; raises a `ConsulError`."""
        self._before = {service.id: _version(service) async for service in self.services()}

    async def services(self) -> AsyncIterator[Service]:
        """Yield our services that are still there; raises a `ConsulError`."""
        async for service in self._location.services():
            if self._is_ours(service):
                yield service

    def _is_to_go(self, service: Service) -> bool:
        if self._before is not None and self._before.get(service.id) != _version(service):
            return False
        may_go = self._may_go(service)
        self.is_in_doubt |= may_go is None
        return bool(may_go)

    async def clear(self, remove: Remove) -> Written:
        """Remove our services; one that another writer changes meanwhile is stale and stays. Raises a `ConsulError`."""
        removed = Written()
        self.is_in_doubt = False
        batch: list[Service] = []
        async for service in self.services():
            if not self._is_to_go(service):
                continue
            batch.append(service)
            if len(batch) == BATCH:
                removed += await remove(self._location.deregister, batch)
                batch = []
        return removed + await remove(self._location.deregister, batch) if batch else removed


def _version(service: Service) -> tuple[int, int]:
    """Return a version that changes with each write of a service; an agent knows none."""
    return max(service.index, 0), hash(service)


async def clear_previous_locations(
    locations: Sequence[PreviousLocation],
    *,
    remove: Callable[[str], Remove],
    is_ready: Callable[[], bool],
    timing: Timing,
) -> None:
    """Clear each previous location as soon as everything is at the new one, and again while a service is in doubt.

    Never the other way round: while anything is refused at the new place the old one keeps everything. What
    was written to a previous location after this began is not cleared: it belongs to another registrar, with
    newer settings. `remove` returns what removes services of a place.
    """
    for location in [one for one in locations if await _has_begun(one, timing)]:
        retry = delays(timing.retry_first, timing.retry_cap)
        while True:
            while not is_ready():  # noqa: ASYNC110 - it is over in a few seconds
                await asyncio.sleep(timing.retry_first)
            try:
                written = await location.clear(remove(location.name))
            except (ConsulUnreachable, ConsulBusy):
                await asyncio.sleep(next(retry))
                continue
            except ConsulError as error:
                _log_left(location, error)
                break
            _log_cleared(location, written)
            if not location.is_in_doubt:
                break
            await asyncio.sleep(next(retry))


async def _has_begun(location: PreviousLocation, timing: Timing) -> bool:
    """Note the services at a location, trying until Consul answers; return False if it cannot be read."""
    for delay in delays(timing.retry_first, timing.retry_cap):
        try:
            await location.begin()
        except (ConsulUnreachable, ConsulBusy):
            await asyncio.sleep(delay)
        except ConsulError as error:
            _log_left(location, error)
            return False
        else:
            return True
    raise AssertionError("unreachable: delays have no end")


def _log_left(location: PreviousLocation, error: ConsulError) -> None:
    # A place that the token may not read cannot be one that this registrar wrote to with it.
    log.debug("previous location is left as it is", place=location.name, problem=str(error))


def _log_cleared(location: PreviousLocation, written: Written) -> None:
    if written.done or written.failures:
        log.info(
            "removed services from previous location",
            place=location.name,
            removed=written.done,
            refused=len(written.failures),
        )
