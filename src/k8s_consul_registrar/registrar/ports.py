"""What the reconciler asks of the two sides it keeps equal."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from k8s_consul_registrar.model import Disturbance, ObjectKey, Service, Source, Written
from k8s_consul_registrar.registrar.status import LostAgent
from k8s_consul_registrar.targets.wanted import Wanted


class Cluster(Protocol):
    """What a cluster wants, kept up to date by somebody else."""

    def wanted(self) -> Wanted:
        """Return everything known now; it does not change afterwards, and counts as seen."""
        ...

    def known(self) -> Wanted:
        """Return the same, but what changed still waits to be seen."""
        ...

    def changes(self, also: AbstractSet[str] = frozenset()) -> Wanted:
        """Return what changed since it was last seen, and what is known of the service IDs in `also`.

        Its `claims` hold just those service IDs, with no target where nobody asks for one any more.
        """
        ...

    def needs_full_pass(self) -> bool:
        """Whether more than single targets changed: a list was completed, or a source failed or recovered."""
        ...

    async def changed(self) -> None:
        """Wait until something changed since it was last seen."""
        ...

    def settled(self, departed: AbstractSet[ObjectKey]) -> None:
        """Forget these departures: Consul no longer holds anything of them."""
        ...

    def relist(self, source: Source, at: float) -> None:
        """Ask for a new complete list of a source at a moment, in seconds of the monotonic clock.

        It confirms, or not, what the last list did not show.
        """
        ...


class Leadership(Protocol):
    """Whether this replica is the one that writes."""

    @property
    def is_leader(self) -> bool:
        """Whether a write may start now."""
        ...

    async def changed(self) -> None:
        """Wait until leadership was won or lost since this last returned."""
        ...


class Alone:
    """The leadership of a registrar without replicas."""

    is_leader = True

    async def changed(self) -> None:
        """Wait for ever."""
        await asyncio.Event().wait()


class Sweeps(Protocol):
    """The removal of our services from places that nobody keeps any more."""

    look_due: float  # when to look again, in seconds of the monotonic clock

    @property
    def lost(self) -> tuple[LostAgent, ...]:
        """What is known of such places."""

    async def look(self) -> bool:
        """Look, at little cost, whether there is such a place; tell whether a full pass is wanted for one."""
        ...

    async def sweep(self) -> None:
        """Remove what may go; for the time after a full pass."""
        ...

    def rest(self) -> None:
        """Forget what was seen, since somebody else sees to it now."""
        ...


class Registry(Protocol):
    """Consul's record of services, in one place: an agent or a node of the catalog.

    Each raises a `ConsulError` when Consul cannot be used at all; what it refuses of single services is
    in the `Written`. `checks_versions` says that a write is made only over the version its `index` names.
    """

    checks_versions: bool

    def services(self) -> AsyncIterator[Service]:
        """Yield every service held there, whoever wrote it."""
        ...

    def lookup(self, ids: Sequence[str]) -> AsyncIterator[Service]:
        """Yield those of these services that are there now."""
        ...

    async def register(self, services: Iterable[Service]) -> Written:
        """Write services, over what is there under the same ID; each is taken only when there is room for it."""
        ...

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Remove services; one that is not there counts as done."""
        ...

    async def disturbance(self) -> Disturbance:
        """Return what others may have done to what is there; cheap enough to ask every few seconds."""
        ...

    async def lost_shards(self) -> Mapping[str, str]:
        """Return shard paths by service ID that are still on record though the service is not held here."""
        ...
