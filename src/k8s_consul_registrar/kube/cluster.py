"""A cluster that is followed: every source by a follower of its own, all into one mirror."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.kube.activity import Activity, ActivityCounter
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.follow import Follower, Following
from k8s_consul_registrar.kube.identity import ClusterIdentity
from k8s_consul_registrar.kube.known import Verdict
from k8s_consul_registrar.kube.mirror import Mirror
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.poll import Poller
from k8s_consul_registrar.kube.watcher import Watcher
from k8s_consul_registrar.model import Kind, ObjectKey, Source
from k8s_consul_registrar.targets.wanted import Wanted


class FollowedCluster:
    """What a cluster wants, kept up to date while `run` runs.

    With `follow` each source is listed once and watched from there on; without it, it is listed every
    `period` seconds. `selectors` are label selectors by kind, as the API server takes them.
    """

    def __init__(
        self,
        client: KubeClient,
        sources: Sequence[Source],
        judge: Callable[[Item], Verdict | None],
        *,
        period: float,
        timing: Timing,
        follow: bool = True,
        selectors: Mapping[Kind, str] = MappingProxyType({}),
    ) -> None:
        self._mirror = Mirror(sources, judge)
        self._counters = {source: ActivityCounter() for source in sources}
        identity = ClusterIdentity(client, self._mirror)

        def follower(source: Source) -> Follower:
            following = Following(
                source,
                self._mirror,
                identity,
                timing,
                self._counters[source],
                selectors.get(source.kind, ""),
            )
            return Watcher(following, client) if follow else Poller(following, client, period=period)

        self._followers = {source: follower(source) for source in sources}

    async def run(self) -> None:
        """Follow for ever; ends only by cancellation.

        No source is listed before the cluster's identity was asked for, so that what is registered carries
        it from the first write on, and a wrong cluster is known as wrong before anything is compared.
        """
        async with asyncio.TaskGroup() as group:
            for follower in self._followers.values():
                group.create_task(follower.run())

    @property
    def mirror(self) -> Mirror:
        """What every source asks for now, for whoever shows it."""
        return self._mirror

    def wanted(self) -> Wanted:
        """Return everything known now; it does not change afterwards."""
        return self._mirror.wanted()

    def known(self) -> Wanted:
        """Return the same, but what changed still waits to be seen."""
        return self._mirror.known()

    def changes(self, also: AbstractSet[str] = frozenset()) -> Wanted:
        """Return what changed since it was last seen; `claims` are of those service IDs and `also` alone."""
        return self._mirror.changes(also)

    def needs_full_pass(self) -> bool:
        """Whether a list was completed, a source failed or recovered, or the cluster's UID changed."""
        return self._mirror.needs_full_pass()

    async def changed(self) -> None:
        """Wait until something changed since `wanted` or `changes` was last called."""
        await self._mirror.changed()

    def settled(self, departed: AbstractSet[ObjectKey]) -> None:
        """Forget these departures: Consul no longer holds anything of them."""
        self._mirror.settled(departed)

    def relist(self, source: Source, at: float) -> None:
        """Ask for a new complete list of a source at a moment of the monotonic clock."""
        self._followers[source].relist(at)

    def activity(self) -> Mapping[Source, Activity]:
        """Return how the following of each source went so far, for telemetry."""
        return {source: counter.snapshot() for source, counter in self._counters.items()}
