"""Follows a source by listing it again and again."""

import asyncio

from k8s_consul_registrar.errors import ClusterError
from k8s_consul_registrar.kube.follow import Following, Lister, Patience, Relists


class Poller:
    """Lists one source every `period` seconds, sooner when asked to or after a failure."""

    def __init__(self, following: Following, client: Lister, *, period: float) -> None:
        self._following = following
        self._client = client
        self._period = period
        self._relists = Relists()

    def relist(self, at: float) -> None:
        """List again at a moment, in seconds of the clock, if the next list would be later."""
        self._relists.ask(at)

    async def run(self) -> None:
        """Follow the source for ever; ends only by cancellation."""
        patience = Patience(self._following.timing)
        while True:
            try:
                await self._list()
            except ClusterError as error:
                self._following.counter.ended(error.cause)
                self._following.mirror.fail(self._following.source, str(error))
                await patience.wait(error)
            else:
                patience.reset()
                await self._rest()

    async def _list(self) -> None:
        await self._following.identity.confirm()
        self._relists.begin(self._following.clock())
        await self._following.list_pages(self._client)

    async def _rest(self) -> None:
        until = self._following.clock() + self._period
        while True:
            due = until if self._relists.at is None else min(until, self._relists.at)
            if (left := due - self._following.clock()) <= 0:
                return
            self._relists.asked.clear()
            try:
                async with asyncio.timeout(left):
                    await self._relists.asked.wait()
            except TimeoutError:
                return
