"""Service names that belong to services of others, and must not be joined."""

from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet

from k8s_consul_registrar.errors import ConsulFiltered, ConsulForbidden, ConsulRefused
from k8s_consul_registrar.model import MANAGED_BY, Kind, Service
from k8s_consul_registrar.registrar.decide import Names, comparable_name
from k8s_consul_registrar.targets.service_names import kind_of_id
from k8s_consul_registrar.telemetry import get_logger

log = get_logger("names")


def is_of_a_registrar(service: Service) -> bool:
    """Return whether any registrar wrote a service: another cluster's, another instance's or the original.

    Registrars may share a name, since meta shows whose each service is.
    """
    manager = service.value("managed_by")
    if manager:
        return manager == MANAGED_BY
    return bool(service.value("cluster")) and kind_of_id(service.id) is not None


class NameGuard:
    """Keeps services from joining a name under which something else is looked up.

    A resync reports every foreign name at this registrar's own node. A new name of the `checked` kinds (those
    whose template is not the default, which contains the object's own name) is looked up once in the whole
    catalog, and the answer holds until the next resync. Where that look is denied or filtered, the resync's
    view decides. `names` has what is known.
    """

    def __init__(
        self,
        look: Callable[[str], Awaitable[bool]] | None = None,
        *,
        checked: AbstractSet[Kind] = frozenset(),
    ) -> None:
        self._look = look
        self.names = Names(checked if look is not None else frozenset())
        self._reading: set[str] = set()
        self._has_warned = False

    async def check(self, name: str) -> None:
        """Look a name up in the whole catalog; raises a `ConsulError` when Consul is unavailable."""
        compared = comparable_name(name)
        if self._look is None or compared in self.names.looked_up:
            return
        try:
            self.names.looked_up[compared] = await self._look(name)
        except (ConsulForbidden, ConsulFiltered, ConsulRefused) as error:
            self.names.looked_up[compared] = False
            if not self._has_warned:
                self._has_warned = True
                log.warning(
                    "service names cannot be checked in the whole catalog; only this registrar's own node is",
                    problem=str(error),
                )

    # Called by a resync

    def begin(self) -> None:
        """Begin to collect the foreign names of a complete read."""
        self._reading = set()

    def saw(self, service: Service) -> None:
        """Note a foreign service of the read."""
        if service.name and not is_of_a_registrar(service):
            self._reading.add(comparable_name(service.name))

    def finish(self) -> None:
        """Replace what the last read showed, and check names again when they are next given."""
        self.names.taken, self.names.looked_up = self._reading, {}
