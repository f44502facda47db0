"""Feeds the proxy: the Nodes and Pods that may be scraped, followed at the API server."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.reflector import Following, Reflectors
from k8s_consul_registrar.kube.source_state import Failed, SourceStatus
from k8s_consul_registrar.kube.store import KEEP, Evidence, Store, Unreadable
from k8s_consul_registrar.model import (
    EVERY_OBJECT,
    Kind,
    Node,
    ObjectKey,
    Pod,
    Selector,
    Source,
    Undecodable,
)
from k8s_consul_registrar.proxy.nodes import Contest, Nodes, NodeTable
from k8s_consul_registrar.proxy.routes import Pods, ProxiedPod, proxied_pod
from k8s_consul_registrar.targets.scrape_config import PRIMARY
from k8s_consul_registrar.telemetry import Failures, get_logger

log = get_logger("feed")

ValueT = TypeVar("ValueT")


# A source that does not catch up after its watch was resumed is listed again at most this often.
CATCH_UP_PERIOD = 600.0  # seconds
# The API server's name is looked up this often, for at most this long.
RESOLVE_PERIOD, RESOLVE_TIMEOUT = 60.0, 5.0  # seconds
MAX_NAMED = 10  # contested addresses in the log at a time


@dataclass(frozen=True, slots=True)
class FeedRules:
    """Rules of both feeds; `stale_after` is in seconds behind the API server."""

    timing: Timing
    stale_after: float
    allow_loopback: bool
    clock: Callable[[], float] = time.monotonic


class Feed(Generic[ValueT]):
    """A Store of some sources for the proxy; an outage leaves its last values in place for a while.

    `has_known` turns true with the first complete list of each source and stays so: falling behind the API
    server later is shown, and no reason to be not ready.
    """

    kind: Kind

    def __init__(
        self,
        client: KubeClient,
        sources: Sequence[Source],
        rules: FeedRules,
        resolve: Callable[[Item], ValueT | Unreadable | None],
        selector: Selector = EVERY_OBJECT,
    ) -> None:
        self.rules = rules
        self.has_known = False
        self.store: Store[ValueT] = Store(sources, resolve, self, clock=rules.clock)
        self._began = rules.clock()
        self._has_failed = False
        self._failures = Failures()
        following = Following(
            client, rules.timing, CATCH_UP_PERIOD, selectors={self.kind: selector}, clock=rules.clock
        )
        self._reflectors = Reflectors(sources, self.store, following)

    async def run(self) -> None:
        """Follow the sources; ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reflectors.run())
            group.create_task(self._grow_stale())

    @property
    def problem(self) -> str:
        """The reason why a source has failed, empty while none has."""
        return next((one.problem for one in self.store.statuses().values() if one.problem), "")

    @property
    def behind_seconds(self) -> float:
        """The time since when some source is not followed, 0 while all are."""
        since = [_behind_since(one, self._began) for one in self.store.statuses().values()]
        behind = min((at for at in since if at is not None), default=None)
        return 0.0 if behind is None else max(0.0, self.rules.clock() - behind)

    @property
    def is_trusted(self) -> bool:
        """True if every source was listed, and none is behind for too long."""
        return self._is_listed and self.behind_seconds <= self.rules.stale_after

    @property
    def is_serving(self) -> bool:
        """True while the proxy serves these values."""
        raise NotImplementedError

    def on_object(
        self,
        key: ObjectKey,
        before: ValueT | None,
        after: ValueT | None,
        evidence: Evidence,  # noqa: ARG002 - of a StoreObserver
        heard_at: float | None,  # noqa: ARG002 - likewise
    ) -> None:
        """Pass on a value that changed."""
        if before is not None or after is not None:
            self.on_change(key, after)

    def on_source(self, source: Source, status: SourceStatus) -> None:  # noqa: ARG002 - of a StoreObserver
        """Log that a source failed or all are followed again, and serve what may be trusted."""
        self.has_known = self.has_known or self._is_listed
        statuses = self.store.statuses()
        problems = {str(one): each.problem for one, each in statuses.items() if each.problem}
        for _, problem in self._failures.fresh(problems.items()):
            log.warning("cannot follow", kind=self.kind.value, problem=problem, still_served=len(self.store))
        if self._has_failed and not self.problem:
            log.info("followed again", kind=self.kind.value, known=len(self.store))
        self._has_failed = bool(self.problem)
        self.on_trust()

    def on_change(self, key: ObjectKey, value: ValueT | None) -> None:
        """Use one object's new value."""
        raise NotImplementedError

    def on_trust(self) -> None:
        """Serve the values, or none, as `is_trusted` says."""
        raise NotImplementedError

    @property
    def _is_listed(self) -> bool:
        return all(one.listed_at is not None for one in self.store.statuses().values())

    async def _grow_stale(self) -> None:
        """Stop serving values that have become too old."""
        while True:
            left = self.rules.stale_after - self.behind_seconds
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

    `changed` is called after each new table. `api_server` is the URL of the API server: no Node and no Pod is
    dialled at its address and port.
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
        api_server: str = "",
        ip_family: str = PRIMARY,
    ) -> None:
        super().__init__(client, [Source(Kind.NODE)], rules, _node)
        self._api_url = api_server
        self._api_server: frozenset[tuple[str, int]] = frozenset()
        self._contested = Failures()
        self._nodes = nodes
        self._told = changed
        self._verify_node_name = verify_node_name
        self._ip_family = ip_family
        self._due: asyncio.TimerHandle | None = None
        self._counted = (-1, -1)

    async def run(self) -> None:
        """Follow the Nodes, and the addresses of the API server; ends only by cancellation."""
        await self._resolve_api_server()
        async with asyncio.TaskGroup() as group:
            group.create_task(super().run())
            group.create_task(self._follow_api_server())

    @property
    def is_serving(self) -> bool:
        """True while a table is served."""
        return self._nodes.known

    def on_change(self, key: ObjectKey, value: Node | None) -> None:  # noqa: ARG002 - the table has it
        """Make a new table soon."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(self.rules.timing.gather, self._publish)

    def on_trust(self) -> None:
        """Make a new table at once, or serve none."""
        self._publish()

    async def _follow_api_server(self) -> None:
        while True:
            await asyncio.sleep(RESOLVE_PERIOD)
            before = self._api_server
            await self._resolve_api_server()
            if self._api_server != before:
                self._publish()

    async def _resolve_api_server(self) -> None:
        """Look up the addresses of the API server; a failure leaves those that were known."""
        url = urlsplit(self._api_url)
        port = url.port or (80 if url.scheme == "http" else 443)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(RESOLVE_TIMEOUT):
                found = await asyncio.get_running_loop().getaddrinfo(
                    url.hostname or "", port, type=socket.SOCK_STREAM
                )
                self._api_server = frozenset((str(address[0]), port) for *_, address in found)

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
            self.store.values(),
            allow_loopback=self.rules.allow_loopback,
            verify_node_name=self._verify_node_name,
            api_server=self._api_server,
            family=self._ip_family,
        )
        if self._nodes.known and table == self._nodes.current:
            return
        self._nodes.replace(table)
        self._told()
        self._log_contests(table.contests)
        counted = len(self.store), len(table.by_name)
        if counted != self._counted:
            self._counted = counted
            log.info("nodes", known=counted[0], reachable=counted[1])
            if counted[0] and not counted[1]:
                log.warning(
                    "no Node has an address that may be dialled: link-local and the like never are, loopback "
                    "only with PROXY_ALLOW_LOOPBACK=true"
                )

    def _log_contests(self, contests: Sequence[Contest]) -> None:
        """Log each address that several Nodes claim once, and again when other Nodes claim it."""
        texts = {one.address: f"{one.winner} has it, not {', '.join(one.losers)}" for one in contests}
        for address, text in self._contested.fresh(texts.items())[:MAX_NAMED]:
            log.warning("several Nodes claim one address", address=address, problem=text)


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
        selector: Selector = EVERY_OBJECT,
        annotation_prefix: str,
        ip_family: str = PRIMARY,
    ) -> None:
        def resolve(item: Item) -> ProxiedPod | Unreadable | None:
            if isinstance(item, Undecodable):
                return KEEP
            if not isinstance(item, Pod):
                return None
            return proxied_pod(item, annotation_prefix, allow_loopback=rules.allow_loopback, family=ip_family)

        super().__init__(client, sources, rules, resolve, selector)
        self._pods = pods

    @property
    def is_serving(self) -> bool:
        """True while Pods are served."""
        return self._pods.known

    def on_change(self, key: ObjectKey, value: ProxiedPod | None) -> None:
        """Pass it to the Pods."""
        self._pods.put(key.namespace, key.name, value)

    def on_trust(self) -> None:
        """Serve them, or none."""
        if self.is_trusted:
            self._pods.known = True
        elif self._pods.known:
            self._pods.forget()


def _node(item: Item) -> Node | Unreadable | None:
    """Return a Node without its labels: only its addresses matter here, and those change seldom."""
    if isinstance(item, Undecodable):
        return KEEP
    return replace(item, labels={}) if isinstance(item, Node) else None


def _behind_since(status: SourceStatus, began: float) -> float | None:
    """Return since when a source is not followed, None while it is."""
    if status.listed_at is None:
        return began
    return status.state.since if isinstance(status.state, Failed) else None
