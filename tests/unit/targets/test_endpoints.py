"""`targets.endpoints`: Services and EndpointSlices to targets or a reason."""

from typing import Any

import pytest

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.model import (
    EndpointSlice,
    Kind,
    KubeService,
    ObjectKey,
    Rejection,
    ServiceWithSlices,
    SliceEndpoint,
    Target,
    Undecodable,
)
from k8s_consul_registrar.targets.endpoints import ServiceScrape, resolve_item, resolve_service, resolve_slice
from k8s_consul_registrar.targets.meta import EXTRA_KEYS
from k8s_consul_registrar.targets.resolve import TargetRules
from support.builders import annotated, make_kube_service, make_slice, tcp

RULES = TargetRules()
KEY = ObjectKey(Kind.ENDPOINT, "shop", "web")
WEB = SliceEndpoint("198.51.100.1", pod="web-1", node="node-a", zone="eu-1a")


def targets_of(
    *parts: EndpointSlice, service: KubeService | None = None, rules: TargetRules = RULES
) -> list[Target] | Rejection:
    """Return everything that a Service and its slices ask for, in order of the IDs, or the rejection."""
    made = resolve_item(ServiceWithSlices(KEY, service or make_kube_service(), parts), rules)
    if isinstance(made, Rejection) or made is None:
        return made or []
    assert isinstance(made, tuple)
    return sorted(made, key=lambda one: one.id)


def ids_of(*parts: EndpointSlice, **given: Any) -> list[str]:
    """Return the IDs of the targets, which there must be."""
    made = targets_of(*parts, **given)
    assert not isinstance(made, Rejection), made
    return [one.id for one in made]


def reason_of(*parts: EndpointSlice, **given: Any) -> str:
    """Return why a Service is rejected."""
    made = targets_of(*parts, **given)
    assert isinstance(made, Rejection), made
    assert made.key == KEY
    return made.reason


def test_endpoint_of_a_pod_has_every_field_of_the_issue() -> None:
    """ID, kind, name, address and meta are those that the documents name."""
    service = make_kube_service(annotations=annotated(path="/stats?format=prom", scheme="https"))
    made = targets_of(make_slice("web-abc", WEB), service=service)
    assert isinstance(made, list)
    (target,) = made
    assert target.id == "svc--shop--web--web-1--9102"
    assert target.key == KEY
    assert target.name == "svc--shop--web"
    assert (target.address, target.port) == ("198.51.100.1", 9102)
    assert dict(target.meta) == {
        "kind": "endpoint",
        "namespace": "shop",
        "service": "web",
        "pod": "web-1",
        "node": "node-a",
        "zone": "eu-1a",
        "metrics_path": "/stats",
        "scheme": "https",
        "param_format": "prom",
    }


def test_endpoint_without_a_pod_has_its_address_in_the_id() -> None:
    """A database outside the cluster has no Pod, and IPv6 addresses are spelled in one way."""
    assert ids_of(make_slice("web-1", SliceEndpoint("192.0.2.9"))) == ["svc--shop--web--192.0.2.9--9102"]
    six = make_kube_service(families=("IPv6",))
    part = make_slice("web-1", SliceEndpoint("2001:DB8::0:9"), family="IPv6")
    assert ids_of(part, service=six) == ["svc--shop--web--2001:db8::9--9102"]


@pytest.mark.parametrize(
    ("port", "ports", "found"),
    [
        ("9000", (tcp(9102),), [9000]),
        ("admin", (tcp(9102, "http"), tcp(9103, "admin")), [9103]),
        (None, (tcp(9102, "http"),), [9102]),
        (None, (tcp(53, "dns", "UDP"), tcp(9102, "http")), [9102]),
        (None, (tcp(53, "dns", "UDP"), tcp(9153, "sctp", "SCTP")), Reason.NO_PORT),
        (None, (tcp(80, "http"), tcp(81, "admin")), Reason.AMBIGUOUS_PORT),
        ("dns", (tcp(53, "dns", "UDP"), tcp(80, "http")), Reason.UNKNOWN_PORT_NAME),
        ("70000", (tcp(80, "http"),), Reason.INVALID_PORT),
        ("80,admin", (tcp(80, "http"), tcp(81, "admin")), [80, 81]),
    ],
)
def test_port_is_a_number_a_name_or_the_only_tcp_port(
    port: str | None, ports: tuple[Any, ...], found: list[int] | Reason
) -> None:
    """A port comes from the annotation or is the only one; otherwise the Service is rejected."""
    given = annotated() if port is None else annotated(port=port)
    service = make_kube_service(annotations=given)
    part = make_slice("web-1", WEB, ports=ports)
    if isinstance(found, Reason):
        assert reason_of(part, service=service) == found
    else:
        assert ids_of(part, service=service) == [f"svc--shop--web--web-1--{number}" for number in found]


def test_rejection_for_ports_speaks_of_the_service() -> None:
    """Its author declares no container."""
    for port, ports in ((None, ()), ("admin", (tcp(80, "http"),))):
        service = make_kube_service(annotations=annotated() if port is None else annotated(port=port))
        made = targets_of(make_slice("web-1", WEB, ports=ports), service=service)
        assert isinstance(made, Rejection)
        assert made.detail.startswith("EndpointSlice 'web-1': ")
        assert "container" not in made.detail


@pytest.mark.parametrize(
    ("ready", "serving", "publishes_unready", "counts"),
    [
        (True, True, False, True),
        (False, True, False, True),
        (True, False, False, True),
        (False, False, False, False),
        (False, False, True, True),
    ],
)
def test_endpoint_counts_while_ready_or_serving(
    ready: bool, serving: bool, publishes_unready: bool, counts: bool
) -> None:
    """An endpoint that is neither counts only with publishNotReadyAddresses."""
    service = make_kube_service(publishes_unready=publishes_unready)
    part = make_slice("web-1", SliceEndpoint("198.51.100.1", pod="web-1", ready=ready, serving=serving))
    assert bool(ids_of(part, service=service)) is counts


def test_slice_of_another_family_than_the_primary_one_is_left_out() -> None:
    """In a dual-stack Service one Pod is in two slices, and is one target."""
    service = make_kube_service(families=("IPv6", "IPv4"))
    four = make_slice("web-4", WEB)
    six = make_slice("web-6", SliceEndpoint("2001:db8::1", pod="web-1"), family="IPv6")
    made = targets_of(four, six, service=service)
    assert isinstance(made, list)
    assert [one.address for one in made] == ["2001:db8::1"]


DUAL = ("IPv4", "IPv6")


@pytest.mark.parametrize(
    ("families", "annotation", "setting", "found"),
    [
        (DUAL, None, "primary", "198.51.100.1"),
        (DUAL, None, "ipv6", "2001:db8::1"),
        (DUAL, "ipv6", "primary", "2001:db8::1"),
        (DUAL, "ipv4", "ipv6", "198.51.100.1"),
        (DUAL, "primary", "ipv6", "198.51.100.1"),
        (("IPv4",), None, "ipv6", "198.51.100.1"),
        (("IPv4",), "ipv6", "primary", Reason.NO_IP_FAMILY),
        (DUAL, "ipv5", "primary", Reason.INVALID_IP_FAMILY),
        ((), None, "ipv6", "2001:db8::1"),
    ],
)
def test_annotation_then_setting_chooses_the_family_of_endpoints_that_are_pods(
    families: tuple[str, ...], annotation: str | None, setting: str, found: str
) -> None:
    """Each Pod is one target, under the same ID whatever its address."""
    given = annotated() if annotation is None else annotated(ip__family=annotation)
    service = make_kube_service(families=families, annotations=given)
    six = make_slice("web-6", SliceEndpoint("2001:db8::1", pod="web-1"), family="IPv6")
    made = targets_of(
        make_slice("web-4", WEB), six, service=service, rules=TargetRules(pod_ip_family=setting)
    )
    if isinstance(made, Rejection):
        assert made.reason == found
    else:
        assert [(one.address, one.id) for one in made] == [(found, "svc--shop--web--web-1--9102")]


def test_setting_for_pods_leaves_endpoints_outside_the_cluster_where_they_are() -> None:
    """A database has the addresses that its slice says; the API server may have made its Service dual-stack."""
    rules, database = TargetRules(pod_ip_family="ipv6"), make_slice("db-1", SliceEndpoint("192.0.2.9"))
    service = make_kube_service(families=DUAL)
    assert ids_of(database, service=service, rules=rules) == ["svc--shop--web--192.0.2.9--9102"]


def test_endpoint_has_the_name_of_its_port_its_pods_uid_and_its_readiness() -> None:
    """With EXTRA_META; what only the Pod itself says is left out."""
    rules = TargetRules(extra_meta=EXTRA_KEYS)
    ports = (tcp(80, "http"), tcp(9102, "metrics"), tcp(9102, "dns", "UDP"))
    service = make_kube_service(annotations=annotated(port="9102,7000"))
    endpoint = SliceEndpoint("198.51.100.1", pod="web-1", ready=False, pod_uid="a-uid")
    part = make_slice("web-1", endpoint, ports=ports)
    made = targets_of(part, service=service, rules=rules)
    plain = targets_of(part, service=service)
    assert isinstance(made, list)
    assert isinstance(plain, list)
    extra = [dict(set(one.meta) - set(other.meta)) for one, other in zip(made, plain, strict=True)]
    assert extra == [
        {"pod_uid": "a-uid", "ready": "false"},
        {"pod_uid": "a-uid", "port_name": "metrics", "ready": "false"},
    ]
    assert all(list(one.meta) == sorted(one.meta) for one in made)


def test_names_for_addresses_are_rejected() -> None:
    """A slice of type FQDN has nothing that can be scraped, and says so."""
    assert reason_of(make_slice("web-1", SliceEndpoint("db.example"), family="FQDN")) == Reason.INVALID_IP


@pytest.mark.parametrize("address", ["0.0.0.0", "224.0.0.1", "nonsense"])
def test_address_that_cannot_be_scraped_is_rejected(address: str) -> None:
    """An unspecified or multicast address is no target."""
    assert reason_of(make_slice("web-1", SliceEndpoint(address))) == Reason.INVALID_IP


def test_endpoint_that_is_rejected_takes_no_other_with_it() -> None:
    """The endpoints beside one that cannot be scraped are targets all the same."""
    scrape = resolve_service(make_kube_service(), RULES)
    assert isinstance(scrape, ServiceScrape)
    made = resolve_slice(scrape, make_slice("web-1", SliceEndpoint("nonsense"), WEB), RULES, {})
    assert [one.id for one in made.targets[WEB]] == ["svc--shop--web--web-1--9102"]
    assert made.rejection is not None


def test_external_name_is_rejected() -> None:
    """A Service that is only a name in DNS has no endpoints."""
    made = resolve_service(make_kube_service(type="ExternalName"), RULES)
    assert isinstance(made, Rejection)
    assert made.reason == Reason.NO_ADDRESS


def test_service_that_is_not_annotated_asks_for_nothing() -> None:
    """Without `scrape: "true"` there are no targets and no reason."""
    assert resolve_service(make_kube_service(annotations={}), RULES) is None
    assert ids_of(make_slice("web-1", WEB), service=make_kube_service(annotations={})) == []


def test_service_without_endpoints_is_no_mistake() -> None:
    """A slice without ports is rejected only if there is something to scrape in it."""
    assert ids_of(make_slice("web-1", ports=())) == []
    assert (
        ids_of(make_slice("web-1", SliceEndpoint("198.51.100.1", ready=False, serving=False), ports=())) == []
    )


def test_zone_over_the_limits_is_left_out() -> None:
    """A zone that Consul would refuse does not cost the target."""
    made = targets_of(make_slice("web-1", SliceEndpoint("198.51.100.1", pod="web-1", zone="z" * 600)))
    assert isinstance(made, list)
    assert "zone" not in dict(made[0].meta)


def test_known_endpoint_is_not_resolved_again() -> None:
    """Targets that are known are taken over as the same objects."""
    scrape = resolve_service(make_kube_service(), RULES)
    assert isinstance(scrape, ServiceScrape)
    first = resolve_slice(scrape, make_slice("web-1", WEB), RULES, {})
    other = SliceEndpoint("198.51.100.2", pod="web-2")
    second = resolve_slice(scrape, make_slice("web-1", other, WEB), RULES, first.targets)
    assert second.targets[WEB] is first.targets[WEB]
    assert [one.id for one in second.targets[other]] == ["svc--shop--web--web-2--9102"]


def test_undecodable_service_is_rejected_and_an_undecodable_slice_has_no_value() -> None:
    """A Service that cannot be read keeps its endpoints; a slice without a name is the Store's to note."""
    service = Undecodable(Kind.SERVICE, ObjectKey(Kind.SERVICE, "shop", "web"), "broken")
    assert resolve_item(service, RULES) == Rejection(KEY, Reason.UNDECODABLE, "broken")
    assert resolve_item(Undecodable(Kind.ENDPOINT, None, "broken"), RULES) is None
