"""Service names that something other than a registrar uses, anywhere in the catalog."""

from collections.abc import Callable
from contextlib import aclosing

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import MetaKeys, decode_instance
from k8s_consul_registrar.consul.records import list_instances
from k8s_consul_registrar.errors import ConsulFiltered
from k8s_consul_registrar.model import MANAGED_BY, Service

# Also true of a service without the key (seen on 1.8.7), so that Consul sends none of the registrars' own.
NOT_MANAGED = f'not ServiceMeta.managed_by == "{MANAGED_BY}"'


def is_managed(service: Service) -> bool:
    """Return whether a registrar of this program wrote a service."""
    return service.value("managed_by") == MANAGED_BY


async def has_foreign_instance(
    client: ConsulClient, name: str, meta_keys: MetaKeys, is_of_a_registrar: Callable[[Service], bool]
) -> bool:
    """Return whether an instance of this name, in any case of letters, is none of a registrar's.

    Raises a `ConsulError`, and `ConsulFiltered` where Consul says that the token may not see all instances.
    Consul before 1.13 shows an empty list to a token that may not read the name.
    """
    listing = list_instances(client, name, NOT_MANAGED)
    async with aclosing(listing.records()) as records:
        async for record in records:
            if not is_of_a_registrar(meta_keys.decode(decode_instance(record))):
                return True
    if listing.is_filtered:
        raise ConsulFiltered(f"the token may not see all services of the name {name}")
    return False
