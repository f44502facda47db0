"""A cluster that is followed: every source by a follower of its own, all into one mirror."""

import asyncio
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.errors import AccessError, ClusterError
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.follow import Follower
from k8s_consul_registrar.kube.mirror import Mirror, Verdict
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import ObjectKey, Source
from k8s_consul_registrar.targets.wanted import Wanted

# The UID of this namespace stands for the cluster's identity, by a convention many tools share.
IDENTITY_NAMESPACE = "kube-system"


class FollowedCluster:
    """What a cluster wants, kept up to date while `run` runs."""

    def __init__(
        self,
        client: KubeClient,
        sources: Sequence[Source],
        judge: Callable[[Item], Verdict | None],
        *,
        period: float,
        timing: Timing,
    ) -> None:
        self._client = client
        self._period = period
        self._timing = timing
        self._mirror = Mirror(sources, judge)
        self._followers = {
            source: Follower(source, self._mirror, client, period=period, timing=timing) for source in sources
        }

    async def run(self) -> None:
        """Follow for ever; ends only by cancellation.

        Nothing is listed before the cluster's identity was asked for, so that what is registered carries
        it from the first write on, and a wrong cluster is known as wrong before anything is compared.
        """
        await self._identify()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_identified())
            for follower in self._followers.values():
                group.create_task(follower.run())

    def wanted(self) -> Wanted:
        """Return everything known now; it does not change afterwards."""
        return self._mirror.wanted()

    async def changed(self) -> None:
        """Wait until something changed, or was listed again, since `wanted` was last called."""
        await self._mirror.changed()

    def settled(self, departed: AbstractSet[ObjectKey]) -> None:
        """Forget these departures: Consul no longer holds anything of them."""
        self._mirror.settled(departed)

    def relist(self, source: Source, at: float) -> None:
        """Ask for a new complete list of a source at a moment of the monotonic clock."""
        self._followers[source].relist(at)

    async def _identify(self) -> None:
        """Ask for the identity until the API server answers; that we may not read it is an answer."""
        retry = delays(self._timing.retry_first, self._timing.retry_cap)
        while True:
            try:
                uid = await self._client.namespace_uid(IDENTITY_NAMESPACE)
            except (ClusterError, AccessError) as error:
                # While it is not known which cluster answers, no list of it proves an absence.
                for source in self._followers:
                    self._mirror.fail(source, str(error))
                await asyncio.sleep(next(retry))
            else:
                self._mirror.learn_cluster_uid(uid or "")
                return

    async def _keep_identified(self) -> None:
        """Ask again each period: a kubeconfig's address may come to lead to another cluster."""
        while True:
            await asyncio.sleep(self._period)
            await self._identify()
