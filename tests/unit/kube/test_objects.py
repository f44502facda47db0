"""`kube.objects`: pages, Pods and Nodes from the API server's JSON, well formed and not."""

import json
import string
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k8s_consul_registrar.errors import ClusterRefused
from k8s_consul_registrar.kube.lists import Page, split_page
from k8s_consul_registrar.kube.objects import decode_event, decode_object
from k8s_consul_registrar.kube.service_objects import ENDPOINTS_KEPT, LONGEST_KEPT
from k8s_consul_registrar.model import (
    ContainerPort,
    EndpointSlice,
    Kind,
    KubeService,
    Namespace,
    Node,
    NodeAddress,
    ObjectKey,
    Pod,
    SliceEndpoint,
    Undecodable,
)
from k8s_consul_registrar.sandbox import objects
from support.files import recorded


def decode_page(body: bytes, kind: Kind) -> Page:
    """Decode one answer to a list request as a whole."""
    return split_page(body, kind).decode()


def pod(**changes: Any) -> dict[str, Any]:
    """Return a small valid Pod, with top-level fields replaced."""
    return {
        "metadata": {
            "name": "cart-1",
            "namespace": "shop",
            "uid": "u1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"nodeName": "n1", "containers": [{"name": "app", "ports": [{"containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "hostIP": "192.0.2.1"},
        **changes,
    }


def page(items: object, kind: str = "PodList") -> bytes:
    """Return a list body of these items."""
    return json.dumps({"kind": kind, "metadata": {"resourceVersion": "7"}, "items": items}).encode()


def read(value: object) -> Pod:
    """Decode a Pod that must be readable."""
    decoded = decode_object(json.dumps(value).encode(), Kind.POD)
    assert isinstance(decoded, Pod)
    return decoded


def test_recorded_pod_has_every_field_we_use() -> None:
    """A Pod as a real API server sends it comes out whole."""
    items = {item.key: item for item in decode_page(recorded("k8s-pods-list").body, Kind.POD).items}
    cart = items[ObjectKey(Kind.POD, "shop", "cart-7d9f8c6b5-abcde")]
    assert isinstance(cart, Pod)
    sent = next(
        item
        for item in json.loads(recorded("k8s-pods-list").body)["items"]
        if item["metadata"]["name"] == "cart-7d9f8c6b5-abcde"
    )
    assert cart.uid == sent["metadata"]["uid"]
    assert cart.created == sent["metadata"]["creationTimestamp"]
    assert cart.annotations == sent["metadata"]["annotations"]
    assert cart.labels == sent["metadata"]["labels"]
    assert cart.node == sent["spec"]["nodeName"]
    assert cart.ip == sent["status"]["podIP"]
    assert cart.host_ip == sent["status"]["hostIP"]
    assert cart.phase == "Running"
    assert cart.ready
    assert [port.number for port in cart.ports] == [
        port["containerPort"] for container in sent["spec"]["containers"] for port in container["ports"]
    ]


def test_recorded_pods_all_decode() -> None:
    """No item of any recorded Pod list is undecodable, and readiness follows the condition."""
    for name in ("k8s-pods-list", "k8s-pods-list-rv0", "k8s-pods-list-selectors"):
        items = decode_page(recorded(name).body, Kind.POD).items
        assert items
        assert all(isinstance(item, Pod) for item in items)
    ready = {
        pod.name: pod.ready
        for pod in decode_page(recorded("k8s-pods-list").body, Kind.POD).items
        if isinstance(pod, Pod)
    }
    assert not ready["notready-1"]


def test_recorded_pages_carry_version_and_continue_token() -> None:
    """The first page names the next, the second has the rest of the same snapshot."""
    first = decode_page(recorded("k8s-pods-list-page1").body, Kind.POD)
    second = decode_page(recorded("k8s-pods-list-page2").body, Kind.POD)
    assert first.continue_token.startswith("eyJ2")
    assert first.resource_version == second.resource_version == "333"
    assert len(first.items) == 4
    assert not {item.key for item in first.items} & {item.key for item in second.items}


def test_recorded_nodes_keep_their_addresses_in_order() -> None:
    """Nodes come with every address, none where they have none."""
    nodes = {
        node.name: node
        for node in decode_page(recorded("k8s-nodes-list").body, Kind.NODE).items
        if isinstance(node, Node)
    }
    assert nodes["node-dual"].addresses == (
        NodeAddress("InternalIP", "192.0.2.11"),
        NodeAddress("InternalIP", "2001:db8:1::11"),
    )
    assert nodes["node-noaddr"].addresses == ()
    assert nodes["node-ext"].kubelet_port == 10250
    assert nodes["real-node"].labels["kubernetes.io/os"] == "linux"


def test_ports_are_those_of_containers_and_native_sidecars() -> None:
    """An init container counts only if it restarts always; the protocol is TCP where none is named."""
    value = pod(
        spec={
            "containers": [
                {"ports": [{"containerPort": 80, "name": "web"}, {"containerPort": 53, "protocol": "UDP"}]}
            ],
            "initContainers": [
                {"ports": [{"containerPort": 1}]},
                {"ports": [{"containerPort": 9090}], "restartPolicy": "Always"},
            ],
        }
    )
    assert read(value).ports == (
        ContainerPort("web", 80, "TCP"),
        ContainerPort("", 53, "UDP"),
        ContainerPort("", 9090, "TCP"),
    )


def test_kubelet_port_of_its_own_is_kept_and_zero_is_the_default() -> None:
    """Go sends an unset port as 0."""
    for sent, expected in ((10260, 10260), (0, 10250)):
        body = {"metadata": {"name": "n"}, "status": {"daemonEndpoints": {"kubeletEndpoint": {"Port": sent}}}}
        node = decode_object(json.dumps(body).encode(), Kind.NODE)
        assert isinstance(node, Node)
        assert node.kubelet_port == expected


@pytest.mark.parametrize(
    "value",
    [
        pod(spec={"containers": None, "initContainers": None}),
        pod(spec={"containers": [{"ports": None, "restartPolicy": None}]}),
        pod(spec=None),
        pod(status=None),
        {
            "metadata": {
                "name": "a",
                "namespace": "b",
                "labels": None,
                "annotations": None,
                "creationTimestamp": None,
            }
        },
        pod(status={"conditions": None}),
    ],
)
def test_nulls_of_go_are_absences(value: dict[str, Any]) -> None:
    """Slices, maps and whole parts may be null or missing."""
    assert read(value).name in {"a", "cart-1"}


def test_node_without_status_decodes() -> None:
    """A Node that no kubelet has written to yet is still a Node."""
    for status in (
        {},
        {"status": None},
        {"status": {"addresses": None, "daemonEndpoints": None, "conditions": None}},
    ):
        node = decode_object(json.dumps({"metadata": {"name": "n"}, **status}).encode(), Kind.NODE)
        assert node == Node(name="n", uid="", created="")


@pytest.mark.parametrize(
    "value",
    [
        pod(spec={"containers": {"not": "a list"}}),
        pod(spec={"containers": [{"ports": [{"containerPort": "http"}]}]}),
        pod(spec={"containers": [{"ports": [{"containerPort": 70000}]}]}),
        pod(status={"podIP": 5}),
        pod(metadata={"name": "cart-1", "namespace": "shop", "annotations": {"a": 1}}),
        pod(metadata={"name": "cart-1", "namespace": "shop", "labels": []}),
    ],
)
def test_unreadable_item_keeps_its_place_and_name(value: dict[str, Any]) -> None:
    """One odd item is reported by key and the rest of the page stays."""
    first, odd, last = decode_page(page([pod(), value, pod()]), Kind.POD).items
    assert isinstance(first, Pod)
    assert isinstance(last, Pod)
    assert isinstance(odd, Undecodable)
    assert odd.key == ObjectKey(Kind.POD, "shop", "cart-1")
    assert "$." in odd.problem


@pytest.mark.parametrize(
    "value",
    [
        5,
        None,
        [],
        "pod",
        {},
        {"metadata": None},
        {"metadata": {"name": ""}},
        {"metadata": {"name": 5, "namespace": "a"}},
        {"metadata": {"name": "a"}},
    ],
)
def test_item_without_a_name_has_no_key(value: object) -> None:
    """Whatever cannot even be named is reported without a key."""
    (odd,) = decode_page(page([value]), Kind.POD).items
    assert isinstance(odd, Undecodable)
    assert odd.key is None


def test_unreadable_node_is_known_by_name() -> None:
    """A Node's key has no namespace."""
    body = {"metadata": {"name": "n", "labels": 5}}
    odd = decode_object(json.dumps(body).encode(), Kind.NODE)
    assert isinstance(odd, Undecodable)
    assert odd.key == ObjectKey(Kind.NODE, "", "n")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>sign in</html>",
        b"{}",
        b"[]",
        b"null",
        page([], kind="NodeList"),
        b'{"kind":"Status","metadata":{},"items":[]}',
        b'{"kind":"PodList","metadata":{"resourceVersion":"7"}}',
        b'{"kind":"PodList","metadata":{"resourceVersion":""},"items":[]}',
        b'{"kind":"PodList","metadata":{"resourceVersion":"7"},"items":{}}',
        page([pod()])[:-40],
        b'{"kind":"PodList","metadata":{"resourceVersion":"7"},"items":[' + b"[" * 100_000,
        b'{"kind":"\xff"}',
    ],
)
def test_body_that_is_no_list_of_the_kind_is_refused(body: bytes) -> None:
    """Above all a body without items is never taken for an empty cluster."""
    with pytest.raises(ClusterRefused):
        decode_page(body, Kind.POD)


def test_null_items_are_an_empty_list() -> None:
    """Go sends an empty slice as null."""
    assert decode_page(page(None), Kind.POD).items == ()


def test_bad_utf8_in_one_item_does_not_end_the_page() -> None:
    """Bytes that are no text are that item's trouble, and its key's if they are in the name."""
    body = page([pod(), pod(metadata={"name": "cart-2", "namespace": "shop", "uid": "XX"})]).replace(
        b"XX", b"\xff\xfe"
    )
    first, odd = decode_page(body, Kind.POD).items
    assert isinstance(first, Pod)
    assert isinstance(odd, Undecodable)
    assert odd.key == ObjectKey(Kind.POD, "shop", "cart-2")


def test_huge_annotation_and_control_characters_are_only_text() -> None:
    """Texts of a Pod's author are kept as they are; they are not judged here."""
    notes = {"prometheus.io/path": "/x\n\x00\u202e", "big": "y" * 1_000_000}
    decoded = read(pod(metadata={"name": "cart-1", "namespace": "shop", "annotations": notes}))
    assert decoded.annotations == notes


def test_names_that_repeat_share_memory() -> None:
    """Ten thousand Pods of one namespace hold its name once."""
    first, second = (read(pod()) for _ in range(2))
    assert first.namespace is second.namespace
    assert first.node is second.node
    assert first.ports[0].protocol is second.ports[0].protocol


TEXT = st.text(string.printable + "\x00é\U0001f600", max_size=8)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "name",
    "namespace",
    "uid",
    "creationTimestamp",
    "labels",
    "annotations",
    "nodeName",
    "hostNetwork",
    "containers",
    "initContainers",
    "ports",
    "containerPort",
    "protocol",
    "restartPolicy",
    "phase",
    "podIP",
    "hostIP",
    "conditions",
    "type",
    "status",
    "metadata",
    "spec",
]
ODD_OBJECTS = st.recursive(
    ANYTHING,
    lambda inner: st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6) | st.lists(inner, max_size=2),
    max_leaves=20,
)


ODD_PODS = st.fixed_dictionaries(
    {"metadata": st.just(pod()["metadata"]) | ODD_OBJECTS, "spec": ODD_OBJECTS, "status": ODD_OBJECTS}
)


def check_beside_neighbours(value: dict[str, Any]) -> None:
    """Fail unless the neighbours of a Pod on a page are read, and the Pod is a value."""
    items = decode_page(page([pod(), value, pod()]), Kind.POD).items
    assert isinstance(items[0], Pod)
    assert isinstance(items[2], Pod)
    if isinstance(items[1], Pod):
        assert items[1].name == value["metadata"]["name"]
        assert all(1 <= port.number <= 65535 for port in items[1].ports)


@settings(max_examples=100, deadline=None)
@given(ODD_PODS)
def test_odd_pods_decode_or_are_reported(value: dict[str, Any]) -> None:
    """Whatever stands in a Pod, the page goes on."""
    check_beside_neighbours(value)


@pytest.mark.long
@settings(max_examples=2000, deadline=None)
@given(ODD_PODS)
def test_thousands_of_odd_pods_decode_or_are_reported(value: dict[str, Any]) -> None:
    """The long search for a Pod that ends a page."""
    check_beside_neighbours(value)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_undecodable(raw: bytes) -> None:
    """Bytes that are no object never raise."""
    for kind in Kind:
        assert isinstance(decode_object(raw, kind), Undecodable)


@pytest.mark.parametrize(
    ("metadata", "deleted"),
    [
        ({}, False),
        ({"deletionTimestamp": None}, False),
        ({"deletionTimestamp": "2026-01-02T00:00:00Z"}, True),
    ],
)
def test_pod_with_a_deletion_timestamp_is_deleted(metadata: dict[str, Any], deleted: bool) -> None:
    """The API server sets `deletionTimestamp` long before it removes the Pod."""
    sent = pod()
    assert read({**sent, "metadata": {**sent["metadata"], **metadata}}).deleted is deleted


def read_kind(kind: Kind, value: object) -> object:
    """Decode an object of a kind."""
    return decode_object(json.dumps(value).encode(), kind)


def test_service_has_its_families_and_publishes_unready_addresses() -> None:
    """The fields of a Service that decide how its endpoints are scraped come out."""
    service = objects.service(
        "web", namespace="shop", families=("IPv6", "IPv4"), publishes_unready=True, annotations={"a": "b"}
    )
    assert read_kind(Kind.SERVICE, service) == KubeService(
        "shop", "web", "", "", families=("IPv6", "IPv4"), publishes_unready=True, annotations={"a": "b"}
    )
    external = read_kind(Kind.SERVICE, objects.service("web", namespace="shop", external_name="db.example"))
    assert isinstance(external, KubeService)
    assert external.type == "ExternalName"


def test_namespace_has_its_labels() -> None:
    """It is in no namespace itself, and one without labels or with odd ones is read as far as possible."""
    given = {"kubernetes.io/metadata.name": "shop", "team": "web"}
    assert read_kind(Kind.NAMESPACE, objects.namespace("shop", {"team": "web"})) == Namespace("shop", given)
    assert read_kind(Kind.NAMESPACE, {"metadata": {"name": "shop"}}) == Namespace("shop")
    odd = read_kind(Kind.NAMESPACE, {"metadata": {"name": "shop", "labels": {"team": 7}}})
    assert isinstance(odd, Undecodable)
    assert odd.key == Namespace("shop").key


def test_slice_has_its_service_ports_and_endpoints() -> None:
    """An EndpointSlice names its Service by a label, its Pods by reference, and each port by number."""
    part = objects.endpoint_slice(
        "web-abc",
        "web",
        [objects.endpoint("10.0.0.1", pod="web-1", node="n1", zone="z1", is_ready=False)],
        namespace="shop",
        ports={"http": 80},
    )
    part["endpoints"][0]["targetRef"]["uid"] = "a-uid"
    assert read_kind(Kind.ENDPOINT, part) == EndpointSlice(
        "shop",
        "web-abc",
        "web",
        "IPv4",
        (ContainerPort("http", 80, "TCP"),),
        (SliceEndpoint("10.0.0.1", "web-1", "n1", "z1", ready=False, serving=True, pod_uid="a-uid"),),
    )


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (None, (True, True)),
        ({}, (True, True)),
        ({"ready": None, "serving": None}, (True, True)),
        ({"ready": False}, (False, False)),
        ({"ready": False, "serving": True, "terminating": True}, (False, True)),
    ],
)
def test_endpoint_conditions_that_are_missing_mean_ready(
    conditions: dict[str, Any] | None, expected: tuple[bool, bool]
) -> None:
    """A missing `ready` is true, and a missing `serving` is what `ready` is."""
    part = objects.endpoint_slice("web-abc", "web", [{"addresses": ["10.0.0.1"], "conditions": conditions}])
    made = read_kind(Kind.ENDPOINT, part)
    assert isinstance(made, EndpointSlice)
    assert [(one.ready, one.serving) for one in made.endpoints] == [expected]


def test_slice_with_null_for_empty_lists_is_empty() -> None:
    """Go writes absent lists as null; a port without a number stands for all ports and is left out."""
    part = {
        **objects.endpoint_slice("web-abc", "web"),
        "endpoints": None,
        "ports": [{"name": "all", "port": None}],
    }
    made = read_kind(Kind.ENDPOINT, part)
    assert isinstance(made, EndpointSlice)
    assert (made.endpoints, made.ports) == ((), ())


@pytest.mark.parametrize("odd", [{"addresses": [7]}, "text", {"addresses": ["10.0.0.1"], "nodeName": {}}])
def test_slice_with_an_endpoint_that_cannot_be_read_has_no_name(odd: Any) -> None:
    """In an event as in a list, where it takes nothing else of the page with it."""
    part = objects.endpoint_slice("web-abc", "web", [objects.endpoint("10.0.0.1")], namespace="shop")
    part["endpoints"].append(odd)
    part["metadata"]["resourceVersion"] = "7"
    event = decode_event(msgspec.json.encode({"type": "MODIFIED", "object": part}), Kind.ENDPOINT)
    assert event is not None
    assert isinstance(event[1], Undecodable)
    assert (event[1].key, event[2]) == (None, "7")
    whole = objects.endpoint_slice("web-def", "web", namespace="shop")
    body = {"kind": "EndpointSliceList", "metadata": {"resourceVersion": "7"}, "items": [part, whole]}
    first, second = split_page(msgspec.json.encode(body), Kind.ENDPOINT).decode().items
    assert isinstance(first, Undecodable)
    assert first.key is None
    assert isinstance(second, EndpointSlice)


def test_endpoint_that_was_seen_is_the_same_object_and_any_change_another() -> None:
    """An endpoint remembered by its bytes is never taken for another, and very long ones are not kept."""

    def endpoints(*some: dict[str, Any]) -> tuple[SliceEndpoint, ...]:
        part = read_kind(Kind.ENDPOINT, objects.endpoint_slice("web-abc", "web", some, namespace="shop"))
        assert isinstance(part, EndpointSlice)
        return part.endpoints

    one, two = objects.endpoint("10.0.0.1", pod="a"), objects.endpoint("10.0.0.2", pod="b")
    first, second = endpoints(one, two), endpoints(two, one)
    assert (second[0] is first[1], second[1] is first[0]) == (True, True)
    changes = (
        {"zone": "z"},
        {"nodeName": "n"},
        {"addresses": ["10.0.0.3"]},
        {"conditions": {"ready": False}},
    )
    assert len({*first, *(endpoints(one | change)[0] for change in changes)}) == 2 + len(changes)
    long = one | {"hints": {"forZones": [{"name": "z" * LONGEST_KEPT}]}}
    assert endpoints(long)[0] is not endpoints(long)[0]


def test_endpoints_that_were_seen_are_kept_up_to_a_bound() -> None:
    """The slice that was not heard of for the longest time is forgotten first."""

    def first(name: str) -> SliceEndpoint:
        part = read_kind(Kind.ENDPOINT, objects.endpoint_slice(name, "web", many, namespace="shop"))
        assert isinstance(part, EndpointSlice)
        return part.endpoints[0]

    many = [objects.endpoint(f"10.0.{number // 250}.{number % 250}") for number in range(1000)]
    oldest, latest = first("oldest"), first("latest")
    assert first("oldest") is oldest
    for number in range(ENDPOINTS_KEPT // len(many) - 1):
        first(f"other-{number}")
    assert first("oldest") is oldest
    assert first("latest") is not latest


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=6))
def test_slice_read_after_others_of_its_name_is_as_one_read_first(states: list[list[int]]) -> None:
    """Whatever was remembered of earlier states, every endpoint is the one that its own bytes say."""
    for state in states:
        some = [objects.endpoint(f"10.0.0.{number}", pod=f"p{number}") for number in state]
        part = objects.endpoint_slice("web-abc", "web", some, namespace="shop")
        if sum(state) % 4 == 0:
            odd = {**part, "endpoints": [*some[:2], {"addresses": [7]}]}
            assert isinstance(read_kind(Kind.ENDPOINT, odd), Undecodable)
        made = read_kind(Kind.ENDPOINT, part)
        assert isinstance(made, EndpointSlice)
        expected = [SliceEndpoint(f"10.0.0.{number}", pod=f"p{number}") for number in state]
        assert list(made.endpoints) == expected


def test_slice_that_cannot_be_read_has_no_name() -> None:
    """It may hold any endpoint, so that until the next list absence proves nothing."""
    part = {**objects.endpoint_slice("web-abc", "web"), "ports": [{"port": 99999}]}
    made = read_kind(Kind.ENDPOINT, part)
    assert isinstance(made, Undecodable)
    assert made.key is None
