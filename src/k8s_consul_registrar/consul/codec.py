"""Consul's JSON: services in and out, one record at a time, and the names of their meta keys."""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Annotated, TypeVar

import msgspec
from msgspec.structs import replace

from k8s_consul_registrar.errors import ConsulRefused
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.targets.meta import (
    LABEL_PREFIX,
    LONGEST_META_KEY,
    LONGEST_META_VALUE,
    OWN_KEYS,
    PARAM_PREFIX,
)

# Errors of a decoder: bad JSON, unexpected types, bad UTF-8, nesting without end.
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

# Keys that came later than META_KEYS, which may have given another key this name before.
LATER_KEYS = frozenset({"service"})

# An index of Raft. Ours are sent back, where a negative one would mean something else.
RaftIndex = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

T = TypeVar("T")


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
    modify_index: RaftIndex = 0


class _Listed(_Record, gc=False, rename="pascal"):
    """A service of a list of the catalog's, which says its ID itself."""

    id: str = msgspec.field(default="", name="ID")


class _Instance(msgspec.Struct, gc=False):
    """One instance in `/v1/catalog/service`, as far as its owner goes."""

    ServiceID: str
    ServiceName: str = ""
    ServiceMeta: dict[str, str] | None = None


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
_listed = msgspec.json.Decoder(_Listed)
_identified = msgspec.json.Decoder(_Identified)
_instance = msgspec.json.Decoder(_Instance)
_encoder = msgspec.json.Encoder()


def decode(decoder: msgspec.json.Decoder[T], body: msgspec.Raw | bytes, what: str) -> T:
    """Decode a body; raises `ConsulRefused` where it is not `what` Consul sends."""
    try:
        return decoder.decode(body)
    except DECODE_ERRORS as error:
        raise ConsulRefused(f"{what} is not what Consul sends: {error}") from None


def decode_agent_services(body: bytes) -> Iterator[Service]:
    """Yield the services of an agent, whatever registered them.

    A record that cannot be read still holds its ID, so it is yielded bare and counts as not ours.
    Raises `ConsulRefused` when the body is no map of services.
    """
    for service_id, raw in decode(_agent_services, body, "/v1/agent/services").items():
        if not service_id:
            raise ConsulRefused("a service of the agent has no ID")
        yield decode_service(service_id, raw)


def decode_listed(raw: msgspec.Raw | bytes) -> Service:
    """Read one record of a list of the catalog's; raises `ConsulRefused` where its ID cannot be read."""
    try:
        record = _listed.decode(raw)
        service_id = record.id
    except DECODE_ERRORS:
        record, service_id = None, decode(_identified, raw, "a service of the catalog").ID
    if not service_id:
        raise ConsulRefused("a service of the catalog has no ID")
    return _service(service_id, record)


def decode_service(service_id: str, raw: msgspec.Raw | bytes) -> Service:
    """Read one record under its ID."""
    try:
        return _service(service_id, _record.decode(raw))
    except DECODE_ERRORS:
        return _service(service_id, None)


def _service(service_id: str, record: _Record | None) -> Service:
    """Return a service; an unreadable record becomes one without name, address or meta."""
    if record is None:
        return Service(service_id, "", "", 0)
    return Service(
        id=service_id,
        name=record.service,
        address=record.address,
        port=record.port,
        meta=tuple(sorted(record.meta.items())) if record.meta else (),
        tags=tuple(sorted(record.tags)) if record.tags else (),
        index=record.modify_index,
    )


def decode_instance(raw: bytes) -> Service:
    """Read the ID, name and meta of one instance of a service; raises `ConsulRefused`."""
    record = decode(_instance, raw, "an instance of a service")
    if not record.ServiceID:
        raise ConsulRefused("an instance of a service has no ID")
    meta = tuple(sorted((record.ServiceMeta or {}).items()))
    return Service(record.ServiceID, record.ServiceName, "", 0, meta)


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


# A service with renamed keys says so itself, so that it is known as ours whatever is set later.
MAPPING_KEY = "meta_keys"
# By this key a service is known as a registrar's, before anything is known of its other keys.
FIXED_KEYS = frozenset({"managed_by"})
# Consul accepts no such key, so a service with it differs from all that we would write.
ASIDE = ":"

# Consul's rules for a key: agent/structs/structs.go, validateMetaPair; `consul-` is its own.
_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_META_KEY}}}")
_RESERVED_PREFIX = "consul-"


class MetaKeys(msgspec.Struct, frozen=True):
    """Which of our keys have another name in Consul: pairs of our name and Consul's, sorted.

    Nothing else knows of it: services are encoded as they leave for Consul and decoded as
    they come from it. No key is renamed to one of our own, so one of these found in Consul means what it
    always means, or nothing at all where it was renamed.
    """

    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The setting that says the same."""
        return ",".join(f"{ours}={theirs}" for ours, theirs in self.renamed)

    def wire(self, key: str) -> str:
        """Return the name in Consul of one of our meta keys."""
        return dict(self.renamed).get(key, key)

    def encode(self, service: Service) -> Service:
        """Return a service under the keys that Consul gets."""
        if not self.renamed and not _may_be_aside(service):
            return service
        names = dict(self.renamed)
        meta = [(names.get(key, key), value) for key, value in service.meta if not key.startswith(ASIDE)]
        if self.renamed:
            meta.append((MAPPING_KEY, self.text))
        return replace(service, meta=tuple(sorted(meta)))

    def decode(self, service: Service) -> Service:
        """Return a service that Consul holds, its keys under our names.

        One that was written under other settings is read by the names it states, and comes out unequal
        to anything we would write, so that it is written again. So does one in which another writer put a key of
        ours beside the name we gave it.
        """
        stated = service.value(MAPPING_KEY)
        if not stated and not self.renamed:
            return service
        keys = self if stated == self.text else _stated(stated)
        names = {theirs: ours for ours, theirs in keys.renamed}
        aside = dict(keys.renamed)
        meta = [
            (ASIDE + key if key in aside else names.get(key, key), value)
            for key, value in service.meta
            if key != MAPPING_KEY
        ]
        if keys is not self:
            meta.append((ASIDE + MAPPING_KEY, stated))
        return replace(service, meta=tuple(sorted(meta)))


def parse_meta_keys(entries: Iterable[str]) -> MetaKeys:
    """Read entries such as `cluster=cluster_name`; raises ValueError, fit for an operator."""
    renamed: dict[str, str] = {}
    for entry in entries:
        ours, _, theirs = (part.strip() for part in entry.partition("="))
        problem = _problem(ours, theirs)
        if not problem and ours in renamed:
            problem = "is renamed twice"
        if not problem and theirs in renamed.values():
            problem = f"would be {theirs}, as another key already is"
        if problem:
            raise ValueError(f"{entry!r}: {ours or 'the key'} {problem}")
        renamed[ours] = theirs
    keys = MetaKeys(tuple(sorted(renamed.items())))
    if len(keys.text) > LONGEST_META_VALUE:
        raise ValueError(f"is over the {LONGEST_META_VALUE} characters that Consul takes as a value of meta")
    return keys


def _may_be_aside(service: Service) -> bool:
    """Return whether keys were set aside, as far as the first one tells: letters, with which ours begin, come later."""
    return bool(service.meta) and service.meta[0][0] < "A"


def _problem(ours: str, theirs: str) -> str:
    if ours in FIXED_KEYS:
        return "cannot be renamed: by it a service is known as a registrar's"
    if ours not in OWN_KEYS:
        return f"is none of {', '.join(sorted(OWN_KEYS - FIXED_KEYS))}"
    if not _KEY.fullmatch(theirs) or theirs.startswith(_RESERVED_PREFIX):
        return f"cannot be {theirs!r}: a key is letters, digits, '_' or '-', at most {LONGEST_META_KEY}"
    if theirs in OWN_KEYS - LATER_KEYS or theirs == MAPPING_KEY:
        return f"cannot be {theirs}, which is one of the registrar's own keys"
    if theirs.startswith((PARAM_PREFIX, LABEL_PREFIX)):
        return f"cannot be {theirs}: {PARAM_PREFIX}… and {LABEL_PREFIX}… come from Pods"
    return ""


@lru_cache(maxsize=16)
def _stated(text: str) -> MetaKeys:
    """Read what a service states; a value that is no such mapping renames nothing."""
    try:
        return parse_meta_keys(text.split(",") if text else ())
    except ValueError:
        return MetaKeys()
