"""Resolution of annotated Services and their EndpointSlices into targets."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import msgspec

from k8s_consul_registrar.errors import Note, Reason, Rejected, has_control, quoted
from k8s_consul_registrar.model import (
    ContainerPort,
    EndpointSlice,
    Kind,
    KubeService,
    Namespace,
    Node,
    ObjectKey,
    Pod,
    Rejection,
    Resolved,
    ServiceWithSlices,
    SliceEndpoint,
    Target,
    Undecodable,
)
from k8s_consul_registrar.targets.annotations import (
    ScrapeSet,
    asks_for_scrapes,
    parse_scrapes,
    scrape_annotations,
)
from k8s_consul_registrar.targets.meta import LONGEST_META_VALUE, Meta, checked_meta, with_room
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.scrape_config import (
    IPV4,
    IPV6,
    PRIMARY,
    SERVICE,
    TCP,
    ScrapedPort,
    annotated_family,
    scraped_address,
    scraped_ports,
)
from k8s_consul_registrar.targets.service_names import (
    Subject,
    endpoint_service_id,
    service_name,
    service_tags,
)

FQDN = "FQDN"
EXTERNAL_NAME = "ExternalName"
# The families of settings and annotations, as Services and EndpointSlices name them.
_FAMILIES: Mapping[str, str] = {IPV4: "IPv4", IPV6: "IPv6"}
NOT_PROXIED = "with POD_ADDRESS=proxy or host only Pods that are annotated themselves can be scraped"
# Endpoints between equal ones that are compared one by one; more are compared as a whole.
FEW = 8


class ServiceScrape(msgspec.Struct, frozen=True, gc=False):
    """The scrape settings of an annotated Service, which all its endpoints share.

    `key` is the one of its endpoints' targets. Endpoints count in the address family `family`, those that are Pods in
    `pod_family`; an empty one stands for every family. In `scrapes` the ports stay texts, since each EndpointSlice has
    ports of its own. `target_labels` are those that annotations set, by their meta keys.
    """

    key: ObjectKey
    rank: tuple[int, str, str]
    family: str
    pod_family: str
    publishes_unready: bool
    scrapes: tuple[ScrapeSet, ...]
    labels: Mapping[str, str]
    target_labels: Mapping[str, str]

    def family_of(self, pod: str) -> str:
        """Return the family in which endpoints count that are a Pod, or none where its name is empty."""
        return self.pod_family if pod else self.family

    def counts(self, endpoint: SliceEndpoint, family: str) -> bool:
        """Return True if an endpoint of a family is scraped in its present condition."""
        is_of_family = self.family_of(endpoint.pod) in ("", family)
        return is_of_family and (endpoint.ready or endpoint.serving or self.publishes_unready)


# The value that the Store keeps of an object.
Value: TypeAlias = Resolved | ServiceScrape | EndpointSlice | Namespace


# Where a target is scraped: address, port and path.
ScrapePlace: TypeAlias = tuple[str, int, str]


class SliceTargets(NamedTuple):
    """The targets of one EndpointSlice by endpoint, and why some or all of its endpoints are rejected.

    `ports` are those of every target, by which one endpoint can come or go by itself; none where an endpoint is rejected or
    is in the slice twice.
    """

    targets: dict[SliceEndpoint, tuple[Target, ...]]
    rejection: Rejection | None = None
    ports: tuple[ScrapedPort, ...] = ()


class FewChanged(NamedTuple):
    """The endpoints that left a slice and that came to it, between others that stayed."""

    left: list[SliceEndpoint]
    came: list[SliceEndpoint]


def endpoints_key(namespace: str, service: str) -> ObjectKey:
    """Return the key of a Service's endpoints."""
    return ObjectKey(Kind.ENDPOINT, namespace, service)


def resolve_item(
    item: Pod | Node | Namespace | KubeService | EndpointSlice | ServiceWithSlices | Undecodable,
    rules: TargetRules,
) -> Value | None:
    """Return the value of an item: targets, a rejection, or a part that targets are made of."""
    match item:
        case Pod() | Node() | Undecodable(kind=Kind.POD | Kind.NODE):
            return resolve(item, rules)
        case KubeService():
            return resolve_service(item, rules)
        case Namespace() | EndpointSlice():
            return item if isinstance(item, Namespace) or item.service else None
        case ServiceWithSlices():
            return _resolve_whole(item, rules)
        case Undecodable(kind=Kind.SERVICE, key=ObjectKey() as key):
            return Rejection(endpoints_key(key.namespace, key.name), Reason.UNDECODABLE, item.problem)
    return None


def resolve_service(service: KubeService, rules: TargetRules) -> ServiceScrape | Rejection | None:
    """Return how the endpoints of an annotated Service are scraped, None if it is not annotated."""
    prefix, given = rules.annotation_prefix, service.annotations
    if not asks_for_scrapes(given, prefix):
        return None
    key = endpoints_key(service.namespace, service.name)
    if service.type == EXTERNAL_NAME:
        return Rejection(key, Reason.NO_ADDRESS, "a Service of type ExternalName has no endpoints")
    try:
        family, pod_family = _families(service, rules)
        scrapes = parse_scrapes(scrape_annotations(given, prefix), rules.intervals)
    except Rejected as rejected:
        return Rejection(key, rejected.reason, rejected.detail)
    return ServiceScrape(
        key=key,
        rank=(0, service.created, service.uid),
        family=family,
        pod_family=pod_family,
        publishes_unready=service.publishes_unready,
        scrapes=scrapes,
        labels=service.labels,
        target_labels={
            one.key: given[f"{prefix}{one.annotation}"]
            for one in rules.target_labels
            if f"{prefix}{one.annotation}" in given
        },
    )


def _families(service: KubeService, rules: TargetRules) -> tuple[str, str]:
    """Return the address families of a Service's endpoints, and of those that are Pods.

    That is the Service's first one. An annotation names another one for all; raises `Rejected` if the Service does not
    have it. The setting for Pods chooses another one for Pods where the Service has it.
    """
    families = service.families
    first = families[0] if families else ""
    if annotated := annotated_family(service.annotations, rules.annotation_prefix):
        family = _FAMILIES.get(annotated, first)
        if families and family not in families:
            raise Rejected(
                Reason.NO_IP_FAMILY, f"the Service has no {annotated} endpoints, only {', '.join(families)}"
            )
        return family, family
    of_pods = _FAMILIES.get(rules.pod_ip_family, first)
    return first, of_pods if of_pods in families or not families else first


def resolve_slice(
    scrape: ServiceScrape,
    part: EndpointSlice,
    rules: TargetRules,
    known: Mapping[SliceEndpoint, tuple[Target, ...]],
) -> SliceTargets:
    """Return the targets of one EndpointSlice; `known` are those of endpoints that need not be resolved again."""
    if part.family == FQDN:
        detail = f"EndpointSlice {quoted(part.name)} has names for addresses, and only an IP can be scraped"
        return SliceTargets({}, Rejection(scrape.key, Reason.INVALID_IP, detail))
    if not any(scrape.counts(one, part.family) for one in part.endpoints):
        return SliceTargets({})
    try:
        ports = scraped_ports(scrape.scrapes, part.ports, SERVICE)
    except Rejected as error:
        return SliceTargets({}, _rejection(scrape, part, error))
    return resolve_endpoints(scrape, part, part.endpoints, ports, rules=rules, known=known)


def resolve_endpoints(
    scrape: ServiceScrape,
    part: EndpointSlice,
    endpoints: Sequence[SliceEndpoint],
    ports: tuple[ScrapedPort, ...],
    *,
    rules: TargetRules,
    known: Mapping[SliceEndpoint, tuple[Target, ...]],
) -> SliceTargets:
    """Return the targets of some endpoints of a slice, at the ports that all of them have."""
    counting = [one for one in endpoints if scrape.counts(one, part.family)]
    rejected: Rejected | None = None
    targets: dict[SliceEndpoint, tuple[Target, ...]] = {}
    for endpoint in counting:
        try:
            found = known.get(endpoint)
            targets[endpoint] = (
                _targets(scrape, endpoint, ports, part.ports, rules) if found is None else found
            )
        except Rejected as error:
            rejected = rejected or error
    if rejected is not None:
        return SliceTargets(targets, _rejection(scrape, part, rejected))
    return SliceTargets(targets, None, ports if len(targets) == len(counting) else ())


def _rejection(scrape: ServiceScrape, part: EndpointSlice, error: Rejected) -> Rejection:
    return Rejection(scrape.key, error.reason, f"EndpointSlice {quoted(part.name, 300)}: {error.detail}")


def place_of(target: Target, rules: TargetRules) -> ScrapePlace:
    """Return where a target is scraped; through the proxy that is the Pod, at whatever port.

    Where a setting chooses the family of Pods' addresses, a Pod is one place at both of them: its Service may have endpoints
    of the other family only.
    """
    path = pod = ""
    for name, value in target.meta:
        if name == "metrics_path":
            path = value
        elif name == "pod":
            pod = value
    if pod and rules.is_pod_elsewhere:
        return "", 0, f"{target.key.namespace}/{pod}"
    if pod and rules.pod_ip_family != PRIMARY:
        return f"{target.key.namespace}/{pod}", target.port, path
    return target.address, target.port, path


def shape_of(part: EndpointSlice) -> tuple[str, str, tuple[ContainerPort, ...]]:
    """Return what a slice's targets depend on beside their endpoints."""
    return part.service, part.family, part.ports


def few_changed(
    was: Sequence[SliceEndpoint], now: Sequence[SliceEndpoint], made: SliceTargets
) -> FewChanged | None:
    """Return what changed between the same other endpoints of a slice with such targets, None if that is much."""
    if not made.ports or len(was) > FEW or len(now) > FEW:
        return None
    left, came = [one for one in was if one not in now], [one for one in now if one not in was]
    # One that comes and is there already is in the slice twice from now on.
    is_single = made.targets.keys().isdisjoint(came)
    return FewChanged(left, came) if is_single else None


def difference(
    before: Mapping[SliceEndpoint, tuple[Target, ...]],
    after: Mapping[SliceEndpoint, tuple[Target, ...]],
    gone: list[Target],
    come: list[Target],
) -> None:
    """Add to the lists the targets of endpoints that are no longer the same."""
    for endpoint, targets in before.items():
        if after.get(endpoint) != targets:
            gone += targets
    for endpoint, targets in after.items():
        if before.get(endpoint) != targets:
            come += targets


def _targets(
    scrape: ServiceScrape,
    endpoint: SliceEndpoint,
    ports: tuple[ScrapedPort, ...],
    declared: Sequence[ContainerPort],
    rules: TargetRules,
) -> tuple[Target, ...]:
    address = scraped_address(endpoint.address)
    if address is None:
        raise Rejected(Reason.INVALID_IP, f"the address {quoted(endpoint.address)} cannot be scraped")
    namespace, service = scrape.key.namespace, scrape.key.name
    subject = Subject(
        {
            "cluster": rules.cluster,
            "kind": Kind.ENDPOINT.value,
            "namespace": namespace,
            "service": service,
            "pod": endpoint.pod,
            "node": endpoint.node,
        },
        scrape.labels,
        endpoint_service_id(scrape.key, endpoint.pod or address, ports[0].suffix, rules.id_prefix),
    )
    name = service_name(rules.endpoint_name, subject, rules.longest_shard)
    tags = service_tags(rules.tags, subject, rules.longest_shard)
    own = {"kind": Kind.ENDPOINT.value, "namespace": namespace, "service": service, "pod": endpoint.pod}
    own |= {"node": endpoint.node, "zone": _usable_zone(endpoint.zone)}
    metas = {id(one): checked_meta({**one.meta, **scrape.target_labels, **own}) for one in scrape.scrapes}
    is_proxied = bool(rules.is_pod_elsewhere and endpoint.pod)
    return tuple(
        [
            Target(
                key=scrape.key,
                id=endpoint_service_id(scrape.key, endpoint.pod or address, port.suffix, rules.id_prefix),
                name=name,
                # At its Node only the Pod's own target can be scraped: there is no address to fall back to.
                address="" if is_proxied else address,
                port=port.number,
                meta=meta,
                rank=scrape.rank,
                tags=tags,
                ready=endpoint.ready if rules.has_readiness else None,
                notes=port.scrape.notes + notes,
                awaits=rules.awaited(has_zone=True),
                has_own_zone=True,
            )
            for port in ports
            for meta, notes in (_with_extra(metas[id(port.scrape)], endpoint, port.number, declared, rules),)
        ]
    )


def _with_extra(
    meta: Meta, endpoint: SliceEndpoint, port: int, declared: Sequence[ContainerPort], rules: TargetRules
) -> tuple[Meta, tuple[str, ...]]:
    """Return meta with what EXTRA_META adds of an endpoint, and the note if there is no room for all of it."""
    if not rules.extra_meta:
        return meta, ()
    name = next((one.name for one in declared if (one.number, one.protocol) == (port, TCP)), "")
    values = {"port_name": name, "pod_uid": endpoint.pod_uid, "ready": str(endpoint.ready).lower()}
    return with_room(meta, [(key, values.get(key, "")) for key in rules.extra_meta], Note.META_DROPPED)


@lru_cache(maxsize=256)
def _usable_zone(zone: str) -> str:
    """Return a zone, empty if it exceeds Consul's limits."""
    is_long = len(zone.encode("utf-8", "replace")) > LONGEST_META_VALUE
    return "" if is_long or has_control(zone) else zone


def _resolve_whole(item: ServiceWithSlices, rules: TargetRules) -> Resolved | None:
    """Return the targets of a whole Service, or the first rejection among its parts; None if it is not annotated."""
    if isinstance(item.service, Undecodable):
        return Rejection(item.key, Reason.UNDECODABLE, item.service.problem)
    scrape = resolve_service(item.service, rules)
    if scrape is None or isinstance(scrape, Rejection):
        return scrape
    found: dict[str, Target] = {}
    for part in item.slices:
        made = resolve_slice(scrape, part, rules, {})
        if made.rejection is not None:
            return made.rejection
        found |= {one.id: one for some in made.targets.values() for one in some}
    return tuple(found.values())
