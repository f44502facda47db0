"""The operator's choices about targets: names, tags, labels, prefixes, addresses and ports."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.model import Kind, Node, ObjectKey, Pod, Rejection, Target, Undecodable
from k8s_consul_registrar.targets.meta import OWN_KEYS, parse_labels
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.scrape_config import MOST_PORTS
from k8s_consul_registrar.targets.service_names import parse_name, parse_tag
from support.builders import annotated, make_node, make_pod, tcp

GROUPED = TargetRules(
    cluster="lab",
    pod_name=parse_name("{cluster}-pods", Kind.POD),
    node_name=parse_name("{cluster}-nodes", Kind.NODE),
    tags=(parse_tag("kind={kind}"), parse_tag("ns={namespace}"), parse_tag("app={label:app}")),
)


def targets(item: Pod | Node, rules: TargetRules) -> tuple[Target, ...]:
    """Return the targets of an item."""
    resolved = resolve(item, rules)
    assert isinstance(resolved, tuple), resolved
    return resolved


def rejection_of(item: Pod | Node, rules: TargetRules) -> Rejection:
    """Return the rejection of an item."""
    resolved = resolve(item, rules)
    assert isinstance(resolved, Rejection), resolved
    return resolved


def test_many_targets_share_a_name_and_no_id() -> None:
    """A grouped name holds every Pod, and the IDs stay apart."""
    made = [target for pod in ("a", "b") for target in targets(make_pod(pod), GROUPED)]
    assert {target.name for target in made} == {"lab-pods"}
    assert [target.id for target in made] == ["pod--shop--a", "pod--shop--b"]
    assert targets(make_node(), GROUPED)[0].name == "lab-nodes"


def test_tags_of_either_kind() -> None:
    """Pods and Nodes get the tags that say something of them."""
    assert targets(make_pod(labels={"app": "web"}), GROUPED)[0].tags == ("app=web", "kind=pod", "ns=shop")
    assert targets(make_node(), GROUPED)[0].tags == ("kind=node",)


def test_pods_own_node_is_in_reach_of_its_name() -> None:
    """A Pod's node_ip is that of the Node it runs on, as the API server spells it canonically."""
    rules = TargetRules(pod_name=parse_name("x-{node}-{node_ip}", Kind.POD))
    assert targets(make_pod(host_ip="2001:DB8::0:5"), rules)[0].name == "x-node-a-2001:db8::5"
    assert rejection_of(make_pod(host_ip=""), rules).reason == Reason.EMPTY_NAME


@pytest.mark.parametrize(
    ("template", "labels", "reason"),
    [
        ("x-{label:app}", {}, Reason.EMPTY_NAME),
        ("x-{label:app}", {"app": ""}, Reason.EMPTY_NAME),
        ("x-{label:app}", {"app": "a b"}, Reason.INVALID_NAME),
        ("x-{label:app}", {"app": "a" * 600}, Reason.NAME_TOO_LONG),
    ],
)
def test_names_that_cannot_be(template: str, labels: dict[str, str], reason: Reason) -> None:
    """A Pod whose name comes out empty, odd or over-long is rejected by reason, its own service left alone."""
    rejection = rejection_of(make_pod(labels=labels), TargetRules(pod_name=parse_name(template, Kind.POD)))
    assert (rejection.reason, rejection.id) == (reason, "pod--shop--web-1")
    assert rejection.detail.isprintable()


def test_tag_that_cannot_be() -> None:
    """A tag over the limit rejects its Pod by reason."""
    assert rejection_of(make_pod(labels={"app": "a" * 600}), GROUPED).reason == Reason.INVALID_TAG


def test_id_prefix() -> None:
    """The prefix stands before every ID, those of rejections among them, and changes no name."""
    rules = TargetRules(id_prefix="blue-")
    (pod,) = targets(make_pod("a"), rules)
    assert (pod.id, pod.name) == ("blue-pod--shop--a", "pod--shop--a")
    (node,) = targets(make_node(), rules)
    assert (node.id, node.name) == ("blue-node--192.0.2.10", "node--192.0.2.10")
    assert rejection_of(make_pod("a", ip=""), rules).id == "blue-pod--shop--a"
    unreadable = resolve(Undecodable(Kind.POD, ObjectKey(Kind.POD, "shop", "odd"), "x"), rules)
    assert isinstance(unreadable, Rejection)
    assert unreadable.id == "blue-pod--shop--odd"


def test_labels_as_meta() -> None:
    """Chosen labels become label_<name>, and those a Pod lacks nothing."""
    rules = TargetRules(labels=parse_labels(["app", "app.kubernetes.io/name", "none"]))
    meta = dict(
        targets(make_pod(labels={"app": "web", "app.kubernetes.io/name": "n", "x": "y"}), rules)[0].meta
    )
    assert {key: value for key, value in meta.items() if key.startswith("label_")} == {
        "label_app": "web",
        "label_app_kubernetes_io_name": "n",
    }


def test_label_cannot_forge_what_is_ours() -> None:
    """Labels named like our keys end beside them, never in their place."""
    rules = TargetRules(labels=parse_labels(sorted(OWN_KEYS)))
    forged = dict.fromkeys(OWN_KEYS, "forged")
    plain = dict(targets(make_pod(), TargetRules())[0].meta)
    meta = dict(targets(make_pod(labels=forged), rules)[0].meta)
    assert {key: value for key, value in meta.items() if value != "forged"} == plain
    assert meta["label_managed_by"] == "forged"
    assert not {"cluster", "managed_by"} & meta.keys()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("x" * 513, Reason.META_TOO_LONG),
        ("é" * 257, Reason.META_TOO_LONG),
        ("a\x00b", Reason.INVALID_META),
        ("a\nb", Reason.INVALID_META),
    ],
)
def test_label_values_over_the_limits(value: str, reason: Reason) -> None:
    """A label value that Consul does not take rejects the Pod by reason."""
    rules = TargetRules(labels=parse_labels(["app"]))
    assert rejection_of(make_pod(labels={"app": value}), rules).reason == reason


def test_annotation_prefix() -> None:
    """Another prefix is heeded in all annotations, and the usual one is not."""
    rules = TargetRules(annotation_prefix="example.com/")
    annotations = {
        f"example.com/{key}": value for key, value in (("scrape", "true"), ("port", "7"), ("path", "/m"))
    }
    (target,) = targets(make_pod(annotations={**annotations, "example.com/param-a": "1"}), rules)
    assert (target.port, dict(target.meta)["metrics_path"], dict(target.meta)["param_a"]) == (7, "/m", "1")
    assert targets(make_pod(), rules) == ()


def test_outside_address_of_a_node() -> None:
    """Prometheus gets the address it reaches; ID and path keep the one by which the proxy knows the Node."""
    rules = TargetRules(node_address_types=("ExternalIP", "InternalIP"))
    both = (("InternalIP", "192.0.2.1"), ("ExternalIP", "203.0.113.9"))
    (target,) = targets(make_node("n", *both), rules)
    assert (target.id, target.address) == ("node--192.0.2.1", "203.0.113.9")
    assert dict(target.meta)["metrics_path"].startswith("/api/v1/nodes/192.0.2.1:10250/")
    assert targets(make_node("n", both[0]), rules)[0].address == "192.0.2.1"
    rejection = rejection_of(make_node("n", both[0]), TargetRules(node_address_types=("ExternalIP",)))
    assert (rejection.reason, rejection.id) == (Reason.NO_ADDRESS, "node--192.0.2.1")


def test_zone_of_a_node() -> None:
    """A Node's zone is taken from its well-known label."""
    node = make_node(labels={"topology.kubernetes.io/zone": "eu-1a"})
    assert dict(targets(node, TargetRules())[0].meta)["zone"] == "eu-1a"


@pytest.mark.parametrize(
    ("annotation", "found"),
    [
        ("8080,9090", [("pod--shop--web-1", 8080), ("pod--shop--web-1--9090", 9090)]),
        (" 9090 , 8080 ", [("pod--shop--web-1", 9090), ("pod--shop--web-1--8080", 8080)]),
        ("metrics,admin", [("pod--shop--web-1", 1), ("pod--shop--web-1--2", 2)]),
        ("8080,8080,metrics,1", [("pod--shop--web-1", 8080), ("pod--shop--web-1--1", 1)]),
        ("8080,08080", [("pod--shop--web-1", 8080)]),
    ],
)
def test_several_ports(annotation: str, found: list[tuple[str, int]]) -> None:
    """The first port has the plain ID, the further ones theirs with the port in it, repeats none."""
    pod = make_pod(annotations=annotated(port=annotation), ports=(tcp(1, "metrics"), tcp(2, "admin"), tcp(3)))
    made = targets(pod, TargetRules())
    assert [(target.id, target.port) for target in made] == found
    assert len({(target.name, target.address, target.meta) for target in made}) == 1


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ("8080,nope", Reason.UNKNOWN_PORT_NAME),
        ("8080,0", Reason.INVALID_PORT),
        ("8080,", Reason.UNKNOWN_PORT_NAME),
        (",", Reason.UNKNOWN_PORT_NAME),
        ("8080;9090", Reason.UNKNOWN_PORT_NAME),
        (",".join(str(number) for number in range(1, MOST_PORTS + 2)), Reason.TOO_MANY_PORTS),
    ],
)
def test_one_bad_port_rejects_the_pod(annotation: str, reason: Reason) -> None:
    """An entry that cannot be honoured, or more of them than there may be, rejects the Pod by reason."""
    pod = make_pod(annotations=annotated(port=annotation), ports=(tcp(3),))
    rejection = rejection_of(pod, TargetRules())
    assert (rejection.reason, rejection.id) == (reason, "pod--shop--web-1")


_TEXT = st.text(max_size=20) | st.sampled_from(["web", "8080,9090", "1,2,1", "metrics,1"])


@given(
    st.builds(
        make_pod,
        host_ip=_TEXT,
        node=_TEXT,
        labels=st.dictionaries(st.sampled_from(["app", "a/b", "cluster"]), _TEXT),
        annotations=st.builds(lambda port: annotated(port=port), _TEXT),
        ports=st.lists(st.builds(tcp, st.integers(1, 65535), _TEXT)).map(tuple),
    ),
    st.sampled_from(["x-{label:app}", "{cluster}{node}", "{cluster}", "x{node_ip}{shard_path}"]),
)
def test_odd_pods_keep_names_and_ids_in_order(pod: Pod, template: str) -> None:
    """Whatever labels and ports a Pod has, its IDs are its own and its names ones that can be looked up."""
    rules = TargetRules(
        cluster="lab",
        id_prefix="b-",
        pod_name=parse_name(template, Kind.POD),
        tags=(parse_tag("{label:a/b}"), parse_tag("app={label:app}")),
        labels=parse_labels(["app", "a/b", "cluster"]),
    )
    resolved = resolve(pod, rules)
    if isinstance(resolved, Rejection):
        assert resolved.reason in set(Reason)
        assert resolved.detail.isprintable()
        return
    made = resolved or ()
    assert len({target.id for target in made}) == len({target.port for target in made}) == len(made)
    for target in made:
        assert target.id.startswith("b-pod--shop--web-1")
        assert target.name.replace("{shard_path}", "s").isascii()
        assert list(target.tags) == sorted(set(target.tags))
        assert {key for key, _ in target.meta if not key.startswith("label_")} <= OWN_KEYS
