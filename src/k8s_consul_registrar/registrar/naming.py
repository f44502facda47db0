"""Keeps our services from names that services of others already use."""

from collections.abc import Set as AbstractSet

from k8s_consul_registrar.model import MANAGED_BY, ObjectKey, Rejection, Service
from k8s_consul_registrar.targets.reasons import Reason
from k8s_consul_registrar.targets.service_ids import kind_of_id


def comparable_name(name: str) -> str:
    """Return a name as Consul looks it up: the case of its letters does not count.

    Source: agent/consul/state/catalog.go, the index `service` of the services, `Lowercase: true`.
    """
    return name.lower()


def is_of_a_registrar(service: Service) -> bool:
    """Whether a registrar wrote a service, be it another cluster's, another instance's or the original.

    Registrars may share a name: their services are told apart by meta. The names to keep away from are
    those of services that something else looks up.
    """
    manager = service.value("managed_by")
    if manager:
        return manager == MANAGED_BY
    return bool(service.value("cluster")) and kind_of_id(service.id) is not None


def refuse_name(
    service_id: str, name: str, key: ObjectKey, held_name: str, taken: AbstractSet[str]
) -> Rejection | None:
    """Refuse to give a service a name that is taken, None where it may have it.

    `held_name` is the name it has in Consul now, empty where it is new: that one it keeps, since whoever
    comes later must not be able to end our monitoring. `taken` holds comparable names.
    """
    compared = comparable_name(name)
    if compared not in taken or compared == comparable_name(held_name):
        return None
    return Rejection(
        key,
        Reason.NAME_TAKEN,
        f"the service name {name} is used by a service that no registrar wrote",
        service_id,
    )
