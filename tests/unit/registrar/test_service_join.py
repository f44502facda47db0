"""`registrar.service_join` in `registrar.desired`: Services, slices and Pods joined, whatever the order of events."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.model import (
    ContainerPort,
    EndpointSlice,
    Kind,
    KubeService,
    ObjectKey,
    Pod,
    Rejection,
    SliceEndpoint,
    Source,
    Target,
)
from k8s_consul_registrar.registrar.claims import Change
from k8s_consul_registrar.registrar.decide import Register, Rules, Standing, decide
from k8s_consul_registrar.registrar.desired import GRACE
from k8s_consul_registrar.registrar.observed import AsDesired
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.service_join import Winner
from k8s_consul_registrar.targets.endpoints import ServiceScrape, resolve_service, resolve_slice
from k8s_consul_registrar.targets.resolve import TargetRules, resolve_pod
from k8s_consul_registrar.targets.service_names import RandomShards
from support.builders import annotated, make_kube_service, make_pod, make_slice, tcp
from support.memory import PODS, SERVICES, SLICES, MemoryCluster, Thing
from support.waiting import Clock

SOURCES = (PODS, SERVICES, SLICES)
RULES = TargetRules()
WEB = ObjectKey(Kind.ENDPOINT, "shop", "web")
ONE = SliceEndpoint("198.51.100.1", pod="web-1", node="node-a")
TWO = SliceEndpoint("198.51.100.2", pod="web-2", node="node-a")
ID_ONE, ID_TWO = "svc--shop--web--web-1--9102", "svc--shop--web--web-2--9102"


@dataclass
class Scene:
    """A listed cluster without objects, everything it told since, and a complete read of an empty Consul."""

    rules: TargetRules = RULES
    sources: tuple[Source, ...] = SOURCES
    clock: Clock = field(default_factory=lambda: Clock(100.0))
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cluster = MemoryCluster(self.sources, rules=self.rules, clock=self.clock)
        self.desired, self.observed = self.cluster.desired, self.cluster.observed
        self.desired.subscribe(self.changes.append, lambda *_: None)
        for source in self.sources:
            self.cluster.put_list((), source)
        self.observed.begin_read()
        self.observed.finish_read()

    def put(self, *items: Thing) -> None:
        """Put objects by events, and have Consul hold what is asked for."""
        for item in items:
            self.cluster.put(item)
        self.write()

    def write(self) -> None:
        """Have Consul hold what is asked for."""
        for service_id, claims in self.desired.claims.items():
            self.observed.put(service_id, AsDesired(claims[0], "", ""))

    def standing(self, service_id: str, key: ObjectKey = WEB) -> Standing:
        """Return what is known of the endpoint behind an ID."""
        return self.desired.standing(service_id, Kind.ENDPOINT, key)

    @property
    def asked(self) -> set[str]:
        """The IDs that are asked for."""
        return set(self.desired.claims)

    @property
    def dropped(self) -> list[str]:
        """The IDs that changes said are no longer asked for."""
        return [one for change in self.changes for one in change.dropped]


def service_meta(scene: Scene, service_id: str) -> str:
    """Return the meta `service` of a target, empty without one."""
    (target,) = scene.desired.claims[service_id]
    return dict(target.meta).get("service", "")


# Departures


def test_endpoint_that_leaves_its_slice_departs_after_the_grace() -> None:
    """An event that shows a slice without an endpoint is a fact, and its service goes a moment later."""
    scene = Scene()
    scene.put(make_kube_service(), make_slice("web-a", ONE, TWO))
    assert scene.asked == {ID_ONE, ID_TWO}
    scene.cluster.put(make_slice("web-a", TWO))
    assert (scene.asked, scene.dropped) == ({ID_TWO}, [ID_ONE])
    assert scene.changes[-1].wait == GRACE
    assert scene.standing(ID_ONE) is Standing.STALE
    scene.clock.offset += GRACE
    assert scene.standing(ID_ONE) is Standing.DEPARTED


def test_endpoint_in_two_slices_stays_until_both_lack_it() -> None:
    """Between two slices an endpoint may be in both, and the removal from one says nothing."""
    scene = Scene()
    scene.put(make_kube_service(), make_slice("web-a", ONE), make_slice("web-b", ONE))
    scene.cluster.remove(make_slice("web-a", ONE))
    assert (scene.asked, scene.dropped) == ({ID_ONE}, [])
    scene.cluster.put(make_slice("web-b"))
    assert (scene.asked, scene.dropped) == (set(), [ID_ONE])


def test_endpoint_that_is_in_its_slice_twice_stays_until_both_are_gone() -> None:
    """One of two equal entries that leaves says nothing, whether the two came together or one after the other."""
    for first in ([ONE, ONE, TWO], [ONE, TWO]):
        scene = Scene()
        scene.put(make_kube_service(), make_slice("web-a", *first), make_slice("web-a", ONE, TWO, ONE))
        scene.put(make_slice("web-a", ONE, TWO))
        assert (scene.asked, scene.dropped) == ({ID_ONE, ID_TWO}, [])
        scene.put(make_slice("web-a", TWO))
        assert (scene.asked, scene.dropped) == ({ID_TWO}, [ID_ONE])


def test_endpoint_that_moves_to_another_slice_is_asked_for_again_within_the_grace() -> None:
    """Where the old slice lets go first, nothing is due before the new one shows the endpoint."""
    scene = Scene()
    scene.put(make_kube_service(), make_slice("web-a", ONE, TWO))
    scene.cluster.put(make_slice("web-a", TWO))
    assert scene.standing(ID_ONE) is Standing.STALE
    scene.cluster.put(make_slice("web-b", ONE))
    assert scene.asked == {ID_ONE, ID_TWO}
    assert scene.desired.departures == 0


def test_slices_that_are_replaced_by_others_lose_no_endpoint() -> None:
    """A Service that is sharded into other slices, the old ones deleted, keeps every service."""
    scene = Scene()
    scene.put(make_kube_service(), make_slice("web-a", ONE, TWO))
    scene.put(make_slice("web-b", ONE), make_slice("web-c", TWO))
    scene.cluster.remove(make_slice("web-a", ONE, TWO))
    assert (scene.asked, scene.dropped, scene.desired.departures) == ({ID_ONE, ID_TWO}, [], 0)


def test_endpoint_missing_from_a_list_is_only_inferred() -> None:
    """An endpoint that a list of slices lacks may be in a slice that is yet to come: nothing departs."""
    scene = Scene()
    scene.put(make_kube_service(), make_slice("web-a", ONE, TWO))
    scene.cluster.start_list([make_slice("web-a", TWO)], SLICES)
    assert scene.standing(ID_ONE) is Standing.STALE
    assert (scene.dropped, scene.desired.has_absences) == ([], True)
    scene.cluster.store.finish_listing(SLICES, scene.clock())
    assert scene.standing(ID_ONE) is Standing.ABSENT
    assert scene.desired.departures == 0


def test_endpoint_of_a_source_that_is_not_listed_proves_nothing() -> None:
    """Both Services and slices must be synced before an endpoint counts as absent."""
    for lost in (SERVICES, SLICES):
        scene = Scene()
        scene.put(make_kube_service(), make_slice("web-a", ONE))
        scene.cluster.put_list((), SLICES)
        assert scene.standing(ID_ONE) is Standing.ABSENT
        scene.cluster.store.fail(lost, "cannot list", "unreachable")
        assert scene.standing(ID_ONE) is Standing.STALE


def test_namespace_whose_slices_cannot_be_listed_keeps_what_is_there() -> None:
    """With NAMESPACES one failing source keeps its own endpoints, and those of the others come and go."""
    kinds = (Kind.SERVICE, Kind.ENDPOINT)
    scene = Scene(sources=tuple(Source(kind, one) for one in ("other", "shop") for kind in kinds))
    there = make_kube_service("db", "other"), make_slice("db-a", TWO, service="db", namespace="other")
    scene.put(make_kube_service(), make_slice("web-a", ONE), *there)
    (elsewhere,) = scene.asked - {ID_ONE}
    scene.cluster.store.fail(Source(Kind.ENDPOINT, "other"), "cannot list", "forbidden")
    scene.cluster.put(make_slice("web-a"))
    scene.clock.offset += GRACE
    assert scene.standing(ID_ONE) is Standing.DEPARTED
    assert scene.asked == {elsewhere}
    scene.cluster.start_list((), Source(Kind.ENDPOINT, "other"))
    scene.cluster.store.fail(Source(Kind.ENDPOINT, "other"), "cannot list", "forbidden")
    assert scene.asked == {elsewhere}


def test_service_that_is_no_longer_annotated_departs_with_every_endpoint() -> None:
    """The Service itself says that none of its endpoints is asked for, even those seen in no slice."""
    scene = Scene()
    scene.put(make_kube_service(), make_slice("web-a", ONE, TWO))
    scene.cluster.put_list([make_slice("web-a", TWO)], SLICES)  # ONE is inferred to be absent
    scene.cluster.put(make_kube_service(annotations={}))
    assert scene.asked == set()
    assert {scene.standing(ID_ONE), scene.standing(ID_TWO)} == {Standing.DEPARTED}
    assert scene.changes[-1].heard_at is None  # bulk work


def test_service_missing_from_a_list_is_only_inferred() -> None:
    """A Service that a list lacks keeps its services until a resync has judged that."""
    scene = Scene()
    scene.put(make_kube_service(), make_slice("web-a", ONE))
    scene.cluster.put_list((), SERVICES)
    assert (scene.asked, scene.dropped, scene.desired.departures) == (set(), [], 0)
    assert scene.standing(ID_ONE) is Standing.ABSENT


def test_endpoint_that_stops_counting_departs() -> None:
    """An endpoint that is neither ready nor serving is one less."""
    scene = Scene()
    scene.put(make_kube_service(), make_slice("web-a", ONE))
    unready = SliceEndpoint(ONE.address, pod=ONE.pod, node=ONE.node, ready=False, serving=False)
    scene.cluster.put(make_slice("web-a", unready))
    assert scene.dropped == [ID_ONE]


# Rejections


def test_service_that_is_rejected_keeps_what_consul_holds() -> None:
    """A slip in an annotation takes no service away, and giving it up brings them back."""
    scene = Scene()
    scene.put(make_kube_service(), make_slice("web-a", ONE, TWO))
    scene.cluster.put(make_kube_service(annotations=annotated(scheme="gopher")))
    assert (scene.asked, scene.dropped) == (set(), [])
    assert scene.desired.rejections[WEB].reason == Reason.INVALID_SCHEME
    assert scene.standing(ID_ONE) is Standing.REJECTED
    scene.cluster.put(make_kube_service())
    assert (scene.asked, dict(scene.desired.rejections)) == ({ID_ONE, ID_TWO}, {})


def test_slice_that_is_rejected_keeps_its_endpoints_and_those_that_leave_go() -> None:
    """Of a Service that is rejected in part, what is still there stays and what is gone goes."""
    scene = Scene()
    service = make_kube_service(annotations=annotated(port="metrics"))
    named = (tcp(9102, "metrics"),)
    scene.put(service, make_slice("web-a", ONE, TWO, ports=named))
    scene.cluster.put(make_slice("web-a", ONE, ports=(tcp(9102, "other"),)))
    assert scene.desired.rejections[WEB].reason == Reason.UNKNOWN_PORT_NAME
    assert scene.dropped == [ID_TWO]
    scene.clock.offset += GRACE
    assert scene.standing(ID_ONE) is Standing.REJECTED
    assert scene.standing(ID_TWO) is Standing.DEPARTED


def test_rejection_is_the_same_whatever_slice_comes_first() -> None:
    """Several rejected slices are one reason, that of the first name."""
    parts = [
        make_slice("web-b", ONE, ports=()),
        make_slice("web-a", TWO, ports=(tcp(80, "a"), tcp(81, "b"))),
    ]
    for order in (parts, parts[::-1]):
        scene = Scene()
        scene.put(make_kube_service(), *order)
        assert scene.desired.rejections[WEB].reason == Reason.AMBIGUOUS_PORT


# Pods and other Services at one place


def test_pod_is_one_place_at_both_its_addresses_where_a_setting_chooses_the_family() -> None:
    """A Service of a dual-stack cluster has one family unless it asks for both; another port is another place."""
    six = "2001:db8::1"
    pod = make_pod("web-1", ip=ONE.address, ips=(ONE.address, six))
    things: list[Thing] = [
        pod,
        make_kube_service(annotations=annotated(port="9102,9103")),
        make_slice("web-a", ONE),
        make_kube_service("older", created="2025-11-22T10:00:00Z", annotations=annotated(port="9103")),
        make_slice("older-a", ONE, service="older"),
    ]
    for items in (things, things[::-1]):
        scene = Scene(rules=TargetRules(pod_ip_family="ipv6"))
        scene.put(*items)
        assert scene.asked == {"pod--shop--web-1", "svc--shop--older--web-1--9103"}
        (target,) = scene.desired.claims["pod--shop--web-1"]
        assert target.address == six
        assert service_meta(scene, "pod--shop--web-1") == "web"
        scene.cluster.remove(pod)
        assert scene.asked == {ID_ONE, "svc--shop--older--web-1--9103"}


def test_pod_at_the_same_place_wins_and_gains_the_service() -> None:
    """A Pod target is scraped in place of the endpoint, and names the Service."""
    pod = make_pod("web-1", ip=ONE.address)
    orders: tuple[list[Thing], ...] = (
        [pod, make_kube_service(), make_slice("web-a", ONE)],
        [make_kube_service(), make_slice("web-a", ONE), pod],
        [make_slice("web-a", ONE), pod, make_kube_service()],
    )
    for items in orders:
        scene = Scene()
        scene.put(*items)
        assert scene.asked == {"pod--shop--web-1"}
        assert service_meta(scene, "pod--shop--web-1") == "web"
        join = scene.desired.join
        assert join is not None
        assert join.yielded == {Winner.POD: 1}


def test_endpoint_comes_back_when_its_pod_goes_and_the_pod_takes_over_again() -> None:
    """When the winner goes the endpoint is looked at again, and a Pod that comes takes its place as a fact."""
    scene = Scene()
    pod = make_pod("web-1", ip=ONE.address)
    scene.put(make_kube_service(), make_slice("web-a", ONE), pod)
    scene.cluster.put(make_pod("web-1", ip=ONE.address, annotations={}))
    assert scene.asked == {ID_ONE}
    scene.write()
    scene.cluster.put(pod)
    assert scene.asked == {"pod--shop--web-1"}
    last = next(change for change in reversed(scene.changes) if change.dropped)
    assert (last.dropped, last.wait) == ((ID_ONE,), 0.0)
    assert "pod--shop--web-1" in last.asked  # its registration goes first
    assert scene.standing(ID_ONE) is Standing.DEPARTED


def test_record_of_an_endpoint_that_gives_way_from_the_start_departs() -> None:
    """A service of an earlier run goes once a Pod is seen at its place, without any absence."""
    scene = Scene()
    scene.put(make_pod("web-1", ip=ONE.address), make_kube_service(), make_slice("web-a", ONE))
    assert scene.standing(ID_ONE) is Standing.DEPARTED


def test_pod_with_another_path_or_port_takes_nothing() -> None:
    """Only the same address, port and path are one place."""
    scene = Scene()
    pod = make_pod("web-1", ip=ONE.address, annotations=annotated(port="9102", path="/other"))
    scene.put(pod, make_kube_service(), make_slice("web-a", ONE))
    assert scene.asked == {"pod--shop--web-1", ID_ONE}
    assert service_meta(scene, "pod--shop--web-1") == ""


def test_older_of_two_services_wins_and_the_other_follows_it() -> None:
    """Two Services over one endpoint are one target, and the younger takes over when the older goes."""
    young = make_kube_service("young", created="2026-11-23T10:00:00Z")
    scene = Scene()
    scene.put(
        young, make_slice("young-a", ONE, service="young"), make_kube_service(), make_slice("web-a", ONE)
    )
    assert scene.asked == {ID_ONE}
    scene.cluster.remove(make_kube_service())
    assert scene.asked == {"svc--shop--young--web-1--9102"}


def test_service_of_another_namespace_is_not_named_on_a_pod() -> None:
    """The meta `service` is a Service of the Pod's own namespace."""
    scene = Scene()
    scene.put(
        make_pod("web-1", ip=ONE.address),
        make_kube_service(namespace="other"),
        make_slice("web-a", SliceEndpoint(ONE.address), namespace="other"),
    )
    assert scene.asked == {"pod--shop--web-1"}
    assert service_meta(scene, "pod--shop--web-1") == ""


def test_same_id_of_two_services_is_two_claims() -> None:
    """Two IDs never collide silently: the decision sees both."""
    first = make_kube_service("a--b", created="2026-11-22T10:00:00Z")
    second = make_kube_service("a", created="2026-11-23T10:00:00Z")
    scene = Scene()
    scene.put(
        first,
        second,
        make_slice("x", SliceEndpoint("198.51.100.1", pod="c"), service="a--b"),
        make_slice("y", SliceEndpoint("198.51.100.2", pod="b--c"), service="a"),
    )
    (service_id,) = scene.asked
    assert {one.key.name for one in scene.desired.claims[service_id]} == {"a--b", "a"}


def test_endpoints_of_one_service_that_lead_to_one_id_are_said() -> None:
    """The second scrape of one port and a Pod with a number in its name can end as one ID."""
    service = make_kube_service(annotations=annotated(port="9102,2", path2="/more"))
    alike = SliceEndpoint("198.51.100.3", pod="web-1--9102")
    scene = Scene()
    scene.put(service, make_slice("web-a", ONE), make_slice("web-b", alike))
    shared = "svc--shop--web--web-1--9102--2"
    assert len(scene.desired.claims[shared]) == 1
    assert scene.desired.rejections[WEB].reason == Reason.ID_TAKEN
    assert shared in scene.desired.rejections[WEB].detail
    scene.cluster.remove(make_slice("web-b", alike))
    assert dict(scene.desired.rejections) == {}


def test_scrapes_of_one_path_with_other_parameters_are_all_asked_for() -> None:
    """As for a Pod: a probe of two modules through one exporter is two targets."""
    given = annotated(port="9102", path="/probe?module=a", path2="/probe?module=b", port2="9102")
    scene = Scene()
    scene.put(make_kube_service(annotations=given), make_slice("web-a", ONE))
    assert scene.asked == {ID_ONE, f"{ID_ONE}--2"}
    scene.put(make_pod("web-1", ip=ONE.address, annotations=annotated(port="9102", path="/probe")))
    assert scene.asked == {"pod--shop--web-1"}


# Through the proxy


def test_endpoint_of_a_pod_through_the_proxy_is_its_pods_target_or_rejected() -> None:
    """The proxy serves only Pods that are annotated themselves; other endpoints are scraped directly."""
    scene = Scene(rules=TargetRules(pods_through_proxy=True))
    alone = SliceEndpoint("192.0.2.99")
    scene.put(make_kube_service(), make_slice("web-a", ONE, alone))
    assert scene.asked == {"svc--shop--web--192.0.2.99--9102"}
    assert scene.desired.rejections[WEB].reason == Reason.NOT_PROXIED
    scene.put(make_pod("web-1", ip=ONE.address, host_ip="192.0.2.10"))
    assert scene.asked == {"svc--shop--web--192.0.2.99--9102", "pod--shop--web-1"}
    assert service_meta(scene, "pod--shop--web-1") == "web"
    assert dict(scene.desired.rejections) == {}


# Cost


def test_change_of_one_endpoint_moves_only_that_one() -> None:
    """In a Service of many slices an event tells of one ID only, and other targets stay the same objects."""
    scene = Scene()
    parts = [
        make_slice(
            f"web-{part:02}",
            *(SliceEndpoint(f"10.0.{part}.{one}", pod=f"p-{part}-{one}") for one in range(100)),
        )
        for part in range(5)
    ]
    scene.put(make_kube_service(), *parts)
    before = {one: claims[0] for one, claims in scene.desired.claims.items()}
    scene.changes.clear()
    moved = SliceEndpoint("10.0.3.200", pod="p-3-7")
    points = [moved if one.pod == "p-3-7" else one for one in parts[3].endpoints]
    scene.cluster.put(make_slice("web-03", *points))
    assert [(change.asked, change.dropped) for change in scene.changes] == [
        (("svc--shop--web--p-3-7--9102",), ())
    ]
    after = {one: claims[0] for one, claims in scene.desired.claims.items()}
    assert {one for one in before if after[one] is not before[one]} == {"svc--shop--web--p-3-7--9102"}


# Whatever the order


Place = tuple[str, int, str]


def place(target: Target, rules: TargetRules) -> Place:
    """Return where a target is scraped: at an address, or at either one of a Pod."""
    meta = dict(target.meta)
    is_either = rules.pod_ip_family != "primary" and "pod" in meta
    where = f"{target.key.namespace}/{meta['pod']}" if is_either else target.address
    return where, target.port, meta["metrics_path"]


def query(target: Target) -> tuple[tuple[str, str], ...]:
    """Return what tells scrapes of one place apart."""
    return tuple(pair for pair in target.meta if pair[0] == "scheme" or pair[0].startswith("param_"))


def end(target: Target) -> tuple[str, int, str]:
    """Return the endpoint that a target is of."""
    return target.address, target.port, dict(target.meta).get("pod", "")


def offered(objects: Iterable[Thing], target_rules: TargetRules) -> tuple[list[Target], dict[ObjectKey, str]]:
    """Compute from scratch every endpoint's target, one for each Service and ID, and the rejected Services."""
    objects = list(objects)
    parts = sorted((one for one in objects if isinstance(one, EndpointSlice)), key=lambda one: one.name)
    offers: dict[tuple[str, ObjectKey], list[Target]] = {}
    rejected: dict[ObjectKey, str] = {}
    for item in objects:
        scrape = resolve_service(item, target_rules) if isinstance(item, KubeService) else None
        if isinstance(scrape, Rejection):
            rejected[scrape.key] = scrape.reason
        if not isinstance(scrape, ServiceScrape):
            continue
        place = scrape.key.namespace, scrape.key.name
        for part in (one for one in parts if (one.namespace, one.service) == place):
            targets, rejection, _ = resolve_slice(scrape, part, target_rules, {})
            if rejection is not None:
                rejected.setdefault(scrape.key, rejection.reason)
            for one in (target for some in targets.values() for target in some):
                offers.setdefault((one.id, one.key), []).append(one)
    for (_, key), some in offers.items():
        if len({end(one) for one in some}) > 1:
            rejected.setdefault(key, Reason.ID_TAKEN)
    chosen = [min(some, key=lambda one: (one.address, one.port, one.meta)) for some in offers.values()]
    return chosen, rejected


def fresh(
    objects: Iterable[Thing], target_rules: TargetRules
) -> tuple[dict[str, set[Target]], dict[ObjectKey, str]]:
    """Compute from scratch, in the plainest way, who asks for each ID and which Services are rejected why."""
    objects = list(objects)
    chosen, rejected = offered(objects, target_rules)
    first: dict[Place, Target] = {}
    scraped: dict[tuple[Place, tuple[tuple[str, str], ...]], Target] = {}
    for target in sorted(chosen, key=lambda one: (one.rank, one.key, one.id)):
        if first.setdefault(place(target, target_rules), target).key == target.key:
            scraped.setdefault((place(target, target_rules), query(target)), target)
    resolved = [resolve_pod(item, target_rules) for item in objects if isinstance(item, Pod)]
    of_pods = [target for some in resolved if isinstance(some, tuple) for target in some]
    claims: dict[str, set[Target]] = {}
    for target in of_pods:
        winner = first.get(place(target, target_rules))
        meta = dict(target.meta)
        if winner is not None and winner.key.namespace == target.key.namespace:
            meta["service"] = winner.key.name
        claims.setdefault(target.id, set()).add(replace(target, meta=tuple(sorted(meta.items()))))
    taken = {place(target, target_rules) for target in of_pods}
    for (where, _), target in scraped.items():
        if where not in taken:
            claims.setdefault(target.id, set()).add(target)
    return claims, rejected


names = st.sampled_from(["a", "b", "a--b"])
addresses = st.sampled_from([f"10.0.0.{number}" for number in range(1, 5)] + ["0.0.0.0"])
pod_names = st.sampled_from(["", "p", "q", "b--p"])
ages = st.sampled_from(["2026-11-22T10:00:00Z", "2026-11-23T10:00:00Z"])
ports = st.sampled_from([(tcp(80),), (tcp(81),), (tcp(80, "x"), tcp(81, "y")), ()])
texts = st.sampled_from(
    [
        {},
        annotated(),
        annotated(port="x"),
        annotated(path="/p"),
        annotated(scheme="ftp"),
        annotated(path="/p", path2="/p?a=1", port2="80,81"),
        annotated(ip__family="ipv6"),
    ]
)
families = st.sampled_from([("IPv4",), ("IPv4",), ("IPv4", "IPv6"), ("IPv6", "IPv4")])
rule_sets = st.sampled_from([RULES, TargetRules(pod_ip_family="ipv6")])
namespaces = st.sampled_from(["shop", "other"])
endpoints = st.builds(SliceEndpoint, addresses, pod=pod_names, ready=st.booleans(), serving=st.booleans())
services = st.builds(
    lambda name, namespace, created, given, publishes, several: make_kube_service(
        name, namespace, created=created, annotations=given, publishes_unready=publishes, families=several
    ),
    names,
    namespaces,
    ages,
    texts,
    st.booleans(),
    families,
)


def a_slice(
    name: str, service: str, namespace: str, some: list[SliceEndpoint], given: tuple[ContainerPort, ...]
) -> EndpointSlice:
    """Return a slice, whose name ends with 6 if it is one of IPv6."""
    if not name.endswith("6"):
        return make_slice(name, *some, service=service, namespace=namespace, ports=given)
    six = [replace(one, address=one.address.replace("10.0.0.", "2001:db8::")) for one in some]
    return make_slice(name, *six, service=service, namespace=namespace, ports=given, family="IPv6")


slices = st.builds(
    a_slice,
    st.sampled_from(["s1", "s2", "s6"]),
    names,
    namespaces,
    st.lists(endpoints, max_size=4),
    ports,
)


def both(ip: str) -> tuple[str, str]:
    """Return the addresses of a dual-stack Pod."""
    return ip, ip.replace("10.0.0.", "2001:db8::")


pods = st.builds(
    lambda name, namespace, ip, port, path: make_pod(
        name, namespace, ip=ip, ips=both(ip), annotations=annotated(port=port, path=path)
    ),
    st.sampled_from(["p", "q"]),
    namespaces,
    addresses,
    st.sampled_from(["80", "81"]),
    st.sampled_from(["/metrics", "/p"]),
)
events = st.lists(st.tuples(st.one_of(services, slices, pods), st.booleans()), max_size=25)


def check_against_a_fresh_computation(events: list[tuple[Thing, bool]], target_rules: TargetRules) -> Scene:
    """Fail unless claims, rejections and counts are in the end those of the objects that are left."""
    scene = Scene(rules=target_rules)
    left: dict[ObjectKey, Thing] = {}
    for item, is_there in events:
        if is_there:
            left[item.key] = item
            scene.cluster.put(item)
        elif item.key in left:
            scene.cluster.remove(left.pop(item.key))
        scene.write()
    claims, rejected = fresh(left.values(), target_rules)
    assert {one: set(some) for one, some in scene.desired.claims.items()} == claims
    of_services = {
        key: one.reason for key, one in scene.desired.rejections.items() if key.kind is Kind.ENDPOINT
    }
    assert of_services == rejected
    again = Scene(rules=target_rules)
    again.put(*sorted(left.values(), key=lambda one: one.key, reverse=True))
    assert again.desired.claims.keys() == claims.keys()
    joins = [one.desired.join for one in (scene, again)]
    assert joins[0] is not None
    assert joins[1] is not None
    assert +joins[0].yielded == +joins[1].yielded
    return scene


def check_standings(scene: Scene) -> None:
    """Fail if anything that is still there, and asks for its ID, was given up."""
    for service_id in scene.observed.ids():
        if service_id not in scene.desired.claims:
            record = scene.observed.get(service_id)
            assert isinstance(record, AsDesired)
            assert scene.desired.standing(service_id, record.target.key.kind, record.target.key) in {
                Standing.DEPARTED,
                Standing.STALE,
                Standing.REJECTED,
            }


@settings(max_examples=100, deadline=None)
@given(events, rule_sets)
def test_events_in_any_order_end_as_a_fresh_computation(
    events: list[tuple[Thing, bool]], target_rules: TargetRules
) -> None:
    """Whatever comes and goes counts no longer than it is there."""
    check_standings(check_against_a_fresh_computation(events, target_rules))


@pytest.mark.long
@settings(max_examples=2000, deadline=None)
@given(events, rule_sets)
def test_thousands_of_orders_of_events_end_as_a_fresh_computation(
    events: list[tuple[Thing, bool]], target_rules: TargetRules
) -> None:
    """The long search for an order of events that leaves something behind."""
    check_standings(check_against_a_fresh_computation(events, target_rules))


# Endpoints as a watch shows them: one that stays is the same object in each state of its slice. Some share a Pod, some do not
# count, and one is invalid.
pool = [
    SliceEndpoint(
        f"10.0.0.{number // 2 + 1}", f"p-{number // 3}", ready=number % 5 > 0, serving=number % 7 > 0
    )
    for number in range(40)
]
pool.append(SliceEndpoint("0.0.0.0"))


@st.composite
def edited_slices(draw: st.DrawFn) -> list[tuple[Thing, bool]]:
    """Return the states of two slices of a Service, of many endpoints each, of which few come and go at a time."""
    first = st.sampled_from(pool[:-1])
    states = {name: draw(st.lists(first, min_size=10, max_size=20, unique=True)) for name in ("s1", "s2")}
    given: dict[str, tuple[ContainerPort, ...]] = dict.fromkeys(states, (tcp(80),))
    events: list[tuple[Thing, bool]] = [(make_kube_service("a"), True)]
    for name in draw(st.lists(st.sampled_from([*states, "a", "p-1"]), max_size=25)):
        if name not in states:
            changed = services.map(lambda one: replace(one, namespace="shop", name="a"))
            pod = make_pod(name, ip="10.0.0.2", annotations=annotated(port="80"))
            events.append((draw(changed) if name == "a" else pod, draw(st.booleans())))
            continue
        # Mostly at the same places, so that an endpoint comes twice and one of the two leaves.
        at, width = draw(st.integers(0, 4)), draw(st.integers(0, 3))
        states[name][at : at + width] = draw(st.lists(st.sampled_from(pool[:12]), max_size=2))
        if draw(st.integers(0, 9)) == 0:
            states[name].append(pool[-1])
        if draw(st.integers(0, 9)) == 0:
            given[name] = draw(ports)
            states[name] = [replace(one) for one in states[name]]
        there = make_slice(name, *states[name], service="a", ports=given[name])
        events.append((there, draw(st.integers(0, 9)) > 0))
    return events


@settings(max_examples=150, deadline=None)
@given(edited_slices(), rule_sets)
def test_slices_of_which_few_endpoints_change_end_as_a_fresh_computation(
    events: list[tuple[Thing, bool]], target_rules: TargetRules
) -> None:
    """An update by difference is never another one than a join of the same slices from the beginning."""
    check_against_a_fresh_computation(events, target_rules)


odd_pods = st.builds(
    lambda name, namespace, ip, given, ports: make_pod(
        name, namespace, ip=ip, ips=both(ip), annotations=given, ports=ports
    ),
    st.sampled_from(["p", "q", "b--p"]),
    namespaces,
    addresses,
    texts,
    ports,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(services, slices, pods, odd_pods), max_size=12), rule_sets)
def test_every_object_ends_as_targets_or_as_one_reason_and_no_id_collides_silently(
    items: list[Thing], target_rules: TargetRules
) -> None:
    """A Pod has targets or a reason; of a Service each endpoint does, or something else is scraped in its place."""
    scene = Scene(rules=target_rules)
    left = {item.key: item for item in items}
    scene.put(*left.values())
    desired, join = scene.desired, scene.desired.join
    assert join is not None
    asking = {(one.id, one.key) for some in desired.claims.values() for one in some}
    for item in left.values():
        resolved = resolve_pod(item, target_rules) if isinstance(item, Pod) else ()
        if isinstance(resolved, Rejection):
            assert desired.rejections[item.key].reason == resolved.reason
        else:
            assert {(one.id, one.key) for one in resolved} <= asking
    for service_id, offers in join.offers.items():
        for key in {one.key for one in offers}:
            is_asked = (service_id, key) in asking
            assert is_asked != (join.winner_over(service_id, key) is not None)
            ends = {end(one) for one in offers if one.key == key}
            assert len(ends) == 1 or key in desired.rejections
    rules = Rules(Identity(cluster="lab"), RandomShards(()))
    for service_id, claims in desired.claims.items():
        action = decide(desired.ask(service_id, None), None, rules)
        assert isinstance(action, Register)
        assert len(action.losers) == len({one.key for one in claims}) - 1
