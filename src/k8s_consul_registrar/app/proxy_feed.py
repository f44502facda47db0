"""Feeds the proxy: the Nodes and Pods that may be scraped, followed at the API server."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.kube.activity import ActivityCounter
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.follow import Following
from k8s_consul_registrar.kube.identity import AnyCluster
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.table import Table
from k8s_consul_registrar.kube.watcher import Watcher
from k8s_consul_registrar.model import Kind, Node, ObjectKey, Pod, Source
from k8s_consul_registrar.proxy.nodes import Nodes, NodeTable
from k8s_consul_registrar.proxy.pod_route import Pods, ProxiedPod, proxied_pod
from k8s_consul_registrar.telemetry import get_logger

log = get_logger("feed")

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class FeedRules:
    """What both feeds heed: `stale_after` is in seconds without sight of the API server."""

    timing: Timing
    stale_after: float
    allow_loopback: bool
    clock: Callable[[], float] = time.monotonic


class Feed(Generic[ValueT]):
    """Follows some sources; an outage leaves what was known last in place for a while.

    `has_known` turns true with the first complete list of each and stays so: losing sight of the API server
    later is shown, and no reason to be not ready.
    """

    kind: Kind

    def __init__(
        self,
        client: KubeClient,
        sources: Sequence[Source],
        rules: FeedRules,
        judge: Callable[[Item], ValueT | None],
        label_selector: str = "",
    ) -> None:
        self.rules = rules
        self.has_known = False
        self.table = Table(sources, judge, changed=self.on_change, sighted=self._on_sight, clock=rules.clock)
        self._was_blind = False
        self._watchers = [
            Watcher(
                Following(
                    source,
                    self.table,
                    AnyCluster(),
                    rules.timing,
                    ActivityCounter(),
                    label_selector,
                    rules.clock,
                ),
                client,
            )
            for source in sources
        ]

    async def run(self) -> None:
        """Follow for ever; ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            for watcher in self._watchers:
                group.create_task(watcher.run())
            group.create_task(self._grow_stale())

    @property
    def problem(self) -> str:
        """Why the API server is not followed, empty while it is."""
        return self.table.problem

    @property
    def blind_seconds(self) -> float:
        """For how long something is not followed, 0 while all is."""
        since = self.table.blind_since
        return 0.0 if since is None else max(0.0, self.rules.clock() - since)

    @property
    def is_trusted(self) -> bool:
        """Whether what is known may be served: all of it was listed, and lately enough."""
        return self.table.has_listed and self.blind_seconds <= self.rules.stale_after

    @property
    def is_serving(self) -> bool:
        """Whether what is known is served at present."""
        raise NotImplementedError

    def on_change(self, key: ObjectKey, value: ValueT | None) -> None:
        """Take in one object's value."""
        raise NotImplementedError

    def on_trust(self) -> None:
        """Serve what is known, or nothing, as `is_trusted` says."""
        raise NotImplementedError

    def _on_sight(self) -> None:
        self.has_known = self.has_known or self.table.has_listed
        is_blind = self.table.blind_since is not None
        if is_blind and self.problem:
            log.warning(
                "cannot follow", kind=self.kind.value, problem=self.problem, still_served=len(self.table)
            )
        elif self._was_blind and not is_blind:
            log.info("followed again", kind=self.kind.value, known=len(self.table))
        self._was_blind = is_blind and bool(self.problem)
        self.on_trust()

    async def _grow_stale(self) -> None:
        """Stop serving what has become too old."""
        while True:
            left = self.rules.stale_after - self.blind_seconds
            await asyncio.sleep(min(self.rules.timing.tick, left) if left > 0 else self.rules.timing.tick)
            if self.is_serving and not self.is_trusted:
                log.error(
                    "what is known is too old to be trusted",
                    kind=self.kind.value,
                    seconds=self.rules.stale_after,
                )
                self.on_trust()


class NodeFeed(Feed[Node]):
    """Keeps the table of kubelets; several changes in a moment make one new table.

    `changed` is called after each new table.
    """

    kind = Kind.NODE

    def __init__(
        self,
        client: KubeClient,
        nodes: Nodes,
        rules: FeedRules,
        *,
        changed: Callable[[], None],
        verify_node_name: bool,
    ) -> None:
        super().__init__(client, [Source(Kind.NODE)], rules, _node)
        self._nodes = nodes
        self._told = changed
        self._verify_node_name = verify_node_name
        self._due: asyncio.TimerHandle | None = None
        self._counted = (-1, -1)

    @property
    def is_serving(self) -> bool:
        """Whether a table is served."""
        return self._nodes.known

    def on_change(self, key: ObjectKey, value: Node | None) -> None:  # noqa: ARG002 - the table has it
        """Make a new table soon."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(self.rules.timing.gather, self._publish)

    def on_trust(self) -> None:
        """Make a new table at once, or serve none."""
        self._publish()

    def _publish(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if not self.is_trusted:
            if self._nodes.known:
                self._nodes.forget()
                self._told()
            return
        table = NodeTable.of(
            self.table.values(),
            allow_loopback=self.rules.allow_loopback,
            verify_node_name=self._verify_node_name,
        )
        if self._nodes.known and table == self._nodes.current:
            return
        self._nodes.replace(table)
        self._told()
        counted = len(self.table), len(table.by_name)
        if counted != self._counted:
            self._counted = counted
            log.info("nodes", known=counted[0], reachable=counted[1])
            if counted[0] and not counted[1]:
                log.warning(
                    "no Node has an address that may be dialled: link-local and the like never are, loopback "
                    "only with PROXY_ALLOW_LOOPBACK=true"
                )


class PodFeed(Feed[ProxiedPod]):
    """Keeps the Pods that may be scraped, each changed by itself."""

    kind = Kind.POD

    def __init__(
        self,
        client: KubeClient,
        pods: Pods,
        rules: FeedRules,
        *,
        sources: Sequence[Source],
        label_selector: str = "",
        annotation_prefix: str,
    ) -> None:
        def judge(item: Item) -> ProxiedPod | None:
            if not isinstance(item, Pod):
                return None
            return proxied_pod(item, annotation_prefix, allow_loopback=rules.allow_loopback)

        super().__init__(client, sources, rules, judge, label_selector)
        self._pods = pods

    @property
    def is_serving(self) -> bool:
        """Whether Pods are served."""
        return self._pods.known

    def on_change(self, key: ObjectKey, value: ProxiedPod | None) -> None:
        """Take it over."""
        self._pods.put(key.namespace, key.name, value)

    def on_trust(self) -> None:
        """Serve them, or none."""
        if self.is_trusted:
            self._pods.known = True
        elif self._pods.known:
            self._pods.forget()


def _node(item: Item) -> Node | None:
    """Keep of a Node what its kubelet is reached by: its labels and heartbeats change all the time."""
    return replace(item, labels={}) if isinstance(item, Node) else None
