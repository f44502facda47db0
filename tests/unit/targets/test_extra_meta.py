"""Further meta of Pods: annotations, workloads, and what a Pod says of the port that is scraped."""

from typing import Any

import msgspec
import pytest

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.kube.objects import decode_object
from k8s_consul_registrar.model import ContainerPort, Kind, Pod, Target
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.targets.meta import (
    ANNOTATION_PREFIX,
    EXTRA_KEYS,
    MOST_META_PAIRS,
    parse_labels,
)
from k8s_consul_registrar.targets.resolve import TargetRules, resolve_node, resolve_pod, workload_of
from support.builders import annotated, make_node, make_pod

ALL = TargetRules(extra_meta=EXTRA_KEYS, annotations=parse_labels(["example.com/owner"], ANNOTATION_PREFIX))
PORTS = (ContainerPort("web", 8080, "TCP", 0, "app"), ContainerPort("metrics", 9102, "TCP", 0, "exporter"))


def targets_of(pod: Pod, rules: TargetRules = ALL) -> tuple[Target, ...]:
    """Return the targets of a Pod."""
    resolved = resolve_pod(pod, rules)
    assert isinstance(resolved, tuple), resolved
    return resolved


def meta_of(pod: Pod, rules: TargetRules = ALL) -> dict[str, str]:
    """Return the meta of the one target of a Pod."""
    (target,) = targets_of(pod, rules)
    assert list(target.meta) == sorted(target.meta)
    return dict(target.meta)


@pytest.mark.parametrize("is_proxied", [False, True])
def test_each_port_has_its_own_name_and_container(is_proxied: bool) -> None:
    """Through the proxy too; a port that no container declares has neither."""
    rules = TargetRules(extra_meta=("port_name", "container"), pods_through_proxy=is_proxied)
    pod = make_pod(ports=PORTS, host_ip="192.0.2.10", annotations=annotated(port="8080,metrics,7000"))
    found = [dict(one.meta) for one in targets_of(pod, rules)]
    assert [(one.get("port_name"), one.get("container")) for one in found] == [
        ("web", "app"),
        ("metrics", "exporter"),
        (None, None),
    ]


def test_pod_says_its_uid_readiness_annotations_and_workload() -> None:
    """Properties that it lacks are left out, and nothing is there by default."""
    annotations = {**annotated(port="metrics"), "example.com/owner": "team shop"}
    pod = make_pod(ports=PORTS, ready=True, owner_kind="StatefulSet", owner="db", annotations=annotations)
    extra = {
        "port_name": "metrics",
        "container": "exporter",
        "pod_uid": "uid-shop-web-1",
        "workload": "db",
        "workload_kind": "StatefulSet",
        "ready": "true",
        "annotation_example_com_owner": "team shop",
    }
    plain = meta_of(pod, TargetRules())
    assert meta_of(pod) == plain | extra
    assert not plain.keys() & extra.keys()
    assert meta_of(make_pod())["ready"] == "false"
    assert "workload" not in meta_of(make_pod())


def test_node_says_only_whether_it_is_ready() -> None:
    """The rest of EXTRA_META is about Pods."""
    for is_ready, said in ((True, "true"), (False, "false")):
        extra, plain = (resolve_node(make_node(ready=is_ready), rules) for rules in (ALL, TargetRules()))
        assert isinstance(extra, tuple)
        assert isinstance(plain, tuple)
        assert set(extra[0].meta) - set(plain[0].meta) == {("ready", said)}


@pytest.mark.parametrize(
    ("owner", "labels", "workload"),
    [
        (("", ""), {}, ("", "")),
        (("DaemonSet", "agent"), {}, ("DaemonSet", "agent")),
        (("ReplicaSet", "web-5d4f"), {"pod-template-hash": "5d4f"}, ("Deployment", "web")),
        (("ReplicaSet", "a-b-5d4f"), {"pod-template-hash": "5d4f"}, ("Deployment", "a-b")),
        (("ReplicaSet", "by-hand"), {}, ("ReplicaSet", "by-hand")),
        (("ReplicaSet", "by-"), {}, ("ReplicaSet", "by-")),
        (("ReplicaSet", "web-5d4f"), {"pod-template-hash": "7777"}, ("ReplicaSet", "web-5d4f")),
        (("ReplicaSet", "-5d4f"), {"pod-template-hash": "5d4f"}, ("ReplicaSet", "-5d4f")),
        (("Job", "web-5d4f"), {"pod-template-hash": "5d4f"}, ("Job", "web-5d4f")),
    ],
)
def test_workload_of_a_replica_set_is_its_deployment(
    owner: tuple[str, str], labels: dict[str, str], workload: tuple[str, str]
) -> None:
    """Only where the hash in the name is that of the Pod's template; a ReplicaSet can be made by hand."""
    assert workload_of(make_pod(owner_kind=owner[0], owner=owner[1], labels=labels)) == workload


def test_owner_is_the_reference_that_controls() -> None:
    """The others are left out, with whatever they lack."""
    references: list[dict[str, Any]] = [
        {"kind": "ConfigMap", "name": "x"},
        {"kind": "ReplicaSet", "name": "web-1", "controller": True},
    ]
    metadata = {"name": "web-1-a", "namespace": "shop", "ownerReferences": references}
    ports = [{"name": "web", "containerPort": 80, "hostPort": 8080}]
    pod = {"metadata": metadata, "spec": {"containers": [{"name": "app", "ports": ports}]}}
    decoded = decode_object(_json(pod), Kind.POD)
    assert isinstance(decoded, Pod)
    assert (decoded.owner_kind, decoded.owner) == ("ReplicaSet", "web-1")
    assert decoded.ports == (ContainerPort("web", 80, "TCP", 8080, "app"),)
    metadata["ownerReferences"] = references[:1]
    decoded = decode_object(_json(pod), Kind.POD)
    assert isinstance(decoded, Pod)
    assert (decoded.owner_kind, decoded.owner) == ("", "")


def _json(value: dict[str, Any]) -> bytes:
    return msgspec.json.encode(value)


def test_meta_that_consul_does_not_take_is_dropped_from_the_end_and_noted() -> None:
    """The Pod is a target all the same."""
    rules = TargetRules(
        extra_meta=("ready",),
        annotations=parse_labels([f"a{number:02}" for number in range(60)], ANNOTATION_PREFIX),
    )
    values = {f"a{number:02}": "v" for number in range(60)}
    (target,) = targets_of(make_pod(annotations=annotated(port="80") | values), rules)
    kept = [key for key, _ in target.meta if key.startswith("annotation_")]
    assert len(target.meta) == MOST_META_PAIRS
    assert kept == [f"annotation_a{number:02}" for number in range(len(kept))]
    assert dict(target.meta)["ready"] == "false"
    assert target.notes == ("meta_dropped",)
    for value in ("v" * 513, "a\nb", "é" * 257):
        (target,) = targets_of(make_pod(annotations=annotated(port="80", x=value) | {"a00": value}), rules)
        assert "annotation_a00" not in dict(target.meta)
        assert target.notes == ("meta_dropped",)


def test_settings_name_each_mistake() -> None:
    """A word that is none, and a key that META_KEYS gives to another."""
    for settings, problem in (
        ({"EXTRA_META": "uid"}, "'uid' is none of port_name"),
        ({"POD_ANNOTATIONS_AS_META": "a b"}, "is no label"),
        (
            {"EXTRA_META": "workload", "META_KEYS": "cluster=workload"},
            "cannot use workload, which EXTRA_META",
        ),
        (
            {"POD_ANNOTATIONS_AS_META": "a", "META_KEYS": "cluster=annotation_a"},
            "cannot use annotation_a, which POD_ANNOTATIONS_AS_META",
        ),
    ):
        with pytest.raises(SettingsError, match=problem):
            read_registrar(settings)
    assert read_registrar({"META_KEYS": "cluster=workload"}).naming.meta_keys.renamed == (
        ("cluster", "workload"),
    )
