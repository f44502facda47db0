"""Record of the selection under which the services in Consul were written."""

import asyncio
from collections.abc import Callable

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.errors import ConsulBusy, ConsulError, ConsulFenced, ConsulUnreachable
from k8s_consul_registrar.telemetry import get_logger

log = get_logger("selection")


class SelectionRecord:
    """Compares our selection with that of the run that wrote the services, and records ours.

    The earlier one is known from the catalog's node, or from HTTP_SD_STATE_FILE: `saved_cluster_uid` is the
    cluster that a file written under our own selection is about, empty if there is none. Our own selection is
    recorded only once everything was written under it and the brake holds nothing: services that it holds
    were written under the earlier one.
    """

    def __init__(
        self,
        digest: str,
        *,
        catalog: CatalogRegistry | None,
        cluster_uid: Callable[[], str],
        saved_cluster_uid: str = "",
    ) -> None:
        self.digest = digest
        self._catalog = catalog
        self._cluster_uid = cluster_uid
        self._saved_cluster_uid = saved_cluster_uid
        self._is_settled = False

    def is_same(self) -> bool:
        """Return whether the services are known to have been written under our selection."""
        if self._catalog is not None and self._catalog.recorded_selection:
            return self._catalog.recorded_selection == self.digest
        return bool(self._saved_cluster_uid) and self._saved_cluster_uid == self._cluster_uid()

    @property
    def is_settled(self) -> bool:
        """True if every service is one of our selection."""
        return self._is_settled or self.is_same()

    async def keep(self, *, is_settled: Callable[[], bool], timing: Timing) -> None:
        """Record our selection once, as soon as every service is one of it."""
        retry = delays(timing.retry_first, timing.retry_cap)
        while True:
            while not is_settled():  # noqa: ASYNC110 - it is over in a few seconds, or in minutes
                await asyncio.sleep(timing.retry_first)
            self._is_settled = True
            if self._catalog is None:
                return
            try:
                if await self._catalog.record_selection():
                    log.info("recorded the selection at the catalog's node", selection=self.digest)
            except (ConsulUnreachable, ConsulBusy, ConsulFenced):
                await asyncio.sleep(next(retry))
            except ConsulError as error:
                # Without a record the next start only waits longer before it removes much.
                log.warning("the selection cannot be recorded", problem=str(error))
                return
            else:
                return
