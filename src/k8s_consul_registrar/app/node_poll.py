"""Feeds the proxy: the table of Nodes off the API server, and the token kubelets trust."""

import asyncio
import time
from collections.abc import Callable

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.errors import AccessError, ClusterError
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.model import Kind, Node
from k8s_consul_registrar.proxy.nodes import Nodes, NodeTable
from k8s_consul_registrar.telemetry import get_logger

# The file behind a token is read again once a minute at the most; asking this often costs nothing.
TOKEN_PERIOD = 10.0

log = get_logger("nodes")


class NodePoll:
    """Lists the Nodes every few seconds; an outage leaves the last known ones in place for a while."""

    def __init__(
        self,
        client: KubeClient,
        nodes: Nodes,
        *,
        changed: Callable[[], None],
        allow_loopback: bool,
        verify_node_name: bool,
        stale_after: float,
        timing: Timing,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._nodes = nodes
        self._changed = changed
        self._allow_loopback = allow_loopback
        self._verify_node_name = verify_node_name
        self._stale_after = stale_after
        self._timing = timing
        self._clock = clock
        self._listed_at = clock()
        self._listed: dict[str, Node] = {}
        self.has_known = False
        self.problem = ""

    async def run(self) -> None:
        """Poll for ever; ends only by cancellation."""
        retry = delays(self._timing.retry_first, self._timing.retry_cap)
        while True:
            try:
                await self.list_once()
            except (ClusterError, AccessError) as error:
                self._failed(str(error))
                await asyncio.sleep(next(retry))
            else:
                retry = delays(self._timing.retry_first, self._timing.retry_cap)
                await asyncio.sleep(self._timing.node_poll)

    async def list_once(self) -> None:
        """Put the Nodes of one complete list in the table's place; a Node that cannot be read stays as it was."""
        listed: dict[str, Node] = {}
        async for page in self._client.pages(Kind.NODE):
            for item in page.items:
                if isinstance(item, Node):
                    listed[item.name] = item
                elif item.key is not None and item.key.name in self._listed:
                    listed[item.key.name] = self._listed[item.key.name]
        if self.problem:
            log.info("the API server answers again", nodes=len(listed))
        self._listed_at, self.problem = self._clock(), ""
        if listed != self._listed or not self._nodes.known:
            self._listed = listed
            table = NodeTable.of(
                listed.values(), allow_loopback=self._allow_loopback, verify_node_name=self._verify_node_name
            )
            self._nodes.replace(table)
            self._changed()
            log.info("nodes", known=len(listed), reachable=len(table.by_name))
            if listed and not table.by_name:
                log.warning(
                    "no Node has an address that may be dialled: link-local and the like never are, loopback "
                    "only with PROXY_ALLOW_LOOPBACK=true"
                )
        self.has_known = True

    def _failed(self, problem: str) -> None:
        if problem != self.problem:
            log.warning("cannot list the Nodes", problem=problem, still_served=len(self._listed))
        self.problem = problem
        if self._nodes.known and self._clock() - self._listed_at > self._stale_after:
            log.error("the Nodes last known are too old to be trusted", seconds=self._stale_after)
            self._nodes.forget()
            self._changed()


class KubeletToken:
    """The bearer token at hand, for code that must not wait; `keep_fresh` follows its rotation."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._token = ""
        self._problem = ""

    def __call__(self) -> str:
        """Return the token; raises `AccessError` where none could be had."""
        if self._problem:
            raise AccessError(self._problem)
        return self._token

    async def refresh(self) -> None:
        """Ask for the current token; one that was had stays while the next cannot be."""
        try:
            self._token = await self._access.token()
        except AccessError as error:
            if not self._token:
                self._problem = str(error)
            log.warning("no fresh token for the kubelets", problem=str(error))
        else:
            self._problem = ""

    async def keep_fresh(self) -> None:
        """Follow the token's rotation for ever; ends only by cancellation."""
        while True:
            await asyncio.sleep(TOKEN_PERIOD)
            await self.refresh()
