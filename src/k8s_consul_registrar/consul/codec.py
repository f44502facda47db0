"""Consul's JSON: services in and out, one record at a time."""

from collections.abc import Iterator

import msgspec

from k8s_consul_registrar.errors import ConsulRefused
from k8s_consul_registrar.model import Service


class _Record(msgspec.Struct, gc=False, rename="pascal"):
    """A service as `/v1/agent/services` and `/v1/catalog/node-services` show it.

    Go sends an empty map or list as `null`. What is not named here (weights, tagged addresses) is
    Consul's own and takes no part in a comparison.
    """

    service: str = ""
    address: str = ""
    port: int = 0
    meta: dict[str, str] | None = None
    tags: list[str] | None = None
    modify_index: int = 0


class _Identified(msgspec.Struct, gc=False):
    """All that must be readable of a record in a list."""

    ID: str


class _Registration(msgspec.Struct, gc=False, omit_defaults=True):
    """The body of `PUT /v1/agent/service/register`."""

    ID: str
    Name: str
    Address: str
    Port: int
    Meta: dict[str, str]
    Tags: list[str] = []


_agent_services = msgspec.json.Decoder(dict[str, msgspec.Raw])
_record = msgspec.json.Decoder(_Record)
_identified = msgspec.json.Decoder(_Identified)
_encoder = msgspec.json.Encoder()


def decode_agent_services(body: bytes) -> Iterator[Service]:
    """Yield the services of an agent, whoever registered them.

    A record that cannot be read still holds its ID, so it is yielded bare and counts as not ours.
    Raises `ConsulRefused` when the body is no map of services.
    """
    try:
        records = _agent_services.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConsulRefused(f"/v1/agent/services is not what Consul sends: {error}") from None
    for service_id, raw in records.items():
        yield decode_service(service_id, raw)


def decode_listed(raw: msgspec.Raw | bytes) -> Service:
    """Read one record of a list of the catalog's, where the ID is in the record; raises `ConsulRefused`."""
    return decode_service(listed_id(raw), raw)


def listed_id(raw: msgspec.Raw | bytes) -> str:
    """Return the ID of one record of a list of the catalog's; raises `ConsulRefused` where there is none."""
    try:
        service_id = _identified.decode(raw).ID
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConsulRefused(f"a service of the catalog is not what Consul sends: {error}") from None
    if not service_id:
        raise ConsulRefused("a service of the catalog has no ID")
    return service_id


def decode_service(service_id: str, raw: msgspec.Raw | bytes) -> Service:
    """Read one record under its ID; an unreadable one becomes a service without name, address or meta."""
    try:
        record = _record.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Service(service_id, "", "", 0)
    return Service(
        id=service_id,
        name=record.service,
        address=record.address,
        port=record.port,
        meta=tuple(sorted((record.meta or {}).items())),
        tags=tuple(sorted(record.tags or ())),
        index=record.modify_index,
    )


def encode_registration(service: Service) -> bytes:
    """Write the body that registers a service at an agent."""
    return _encoder.encode(
        _Registration(
            ID=service.id,
            Name=service.name,
            Address=service.address,
            Port=service.port,
            Meta=dict(service.meta),
            Tags=sorted(service.tags),
        )
    )
