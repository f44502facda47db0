"""Queries for targets, and the labels of kubernetes_sd and of annotations."""

import json
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.admin.target_groups import (
    MOST_SHARDS,
    BadQuery,
    Formats,
    Group,
    GroupEncoder,
    LabelNames,
    parse_sd_query,
    parse_wait,
    texts,
)
from k8s_consul_registrar.admin.view import TargetRow
from k8s_consul_registrar.model import Kind, ObjectKey
from support.seen import endpoint_target, many_targets, node_target, pod_target

KUBERNETES = "__meta_kubernetes_"


def labels_of(
    target: TargetRow, encoder: GroupEncoder | None = None, names: LabelNames = LabelNames.KUBERNETES
) -> dict[str, str]:
    """Return the labels of a target's group."""
    found: dict[str, str] = json.loads((encoder or GroupEncoder()).encode(target, names).text)["labels"]
    return found


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([("shards", "1")], "parameters are"),
        ([("labels", "both"), ("labels", "both")], "more than once"),
        ([("labels", "Consul")], "one of consul"),
        ([("labels", "")], "one of consul"),
        ([("shard", "0")], "need each other"),
        ([("of", "3")], "need each other"),
        ([("shard", "3"), ("of", "3")], "less than of"),
        ([("shard", "-1"), ("of", "3")], "less than of"),
        ([("shard", "1.0"), ("of", "3")], "less than of"),
        ([("shard", "\u0663"), ("of", "4")], "less than of"),
        ([("shard", "0"), ("of", "0")], "number of shards"),
        ([("shard", "0"), ("of", str(MOST_SHARDS + 1))], "number of shards"),
        ([("shard", "0"), ("shard", "1"), ("of", "3")], "more than once"),
    ],
)
def test_query_that_is_wrong_is_refused_with_words(pairs: list[tuple[str, str]], words: str) -> None:
    """Each mistake is named; none hands out every target."""
    with pytest.raises(BadQuery, match=words):
        parse_sd_query(pairs)


@pytest.mark.parametrize(
    ("values", "seconds"),
    [((), 0.0), (("25s",), 25.0), (("25",), 25.0), (("0.5s",), 0.5), (("0",), 0.0), (("60s",), 60.0)],
)
def test_wait_is_a_number_of_seconds(values: tuple[str, ...], seconds: float) -> None:
    """With or without its unit."""
    assert parse_wait(values) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "-1", "61", "1m", "nan", "inf", "1e1", " 5", "5 ", "\u0665", "99999999"]
)
def test_wait_that_is_no_time_or_too_long_is_refused(text: str) -> None:
    """A request cannot wait without end."""
    with pytest.raises(BadQuery, match="at most 60"):
        parse_wait([text])
    with pytest.raises(BadQuery, match="more than once"):
        parse_wait(["1s", "1s"])


def test_shards_divide_the_targets_and_move_few_when_one_is_added() -> None:
    """Each target is in one shard; a fourth one takes about a quarter, and moves nothing between the others."""
    targets = [GroupEncoder().encode(pod_target(f"web-{number}")) for number in range(600)]

    def shard_of(target: Group, of: int) -> int:
        """Return the only shard of a target."""
        (found,) = [
            number
            for number in range(of)
            if parse_sd_query([("shard", str(number)), ("of", str(of))]).matches(target)
        ]
        return found

    before, after = [shard_of(one, 3) for one in targets], [shard_of(one, 4) for one in targets]
    assert all(150 < count < 250 for count in Counter(before).values())
    assert all(new in (old, 3) for old, new in zip(before, after, strict=True))
    assert 100 < after.count(3) < 200


def test_pod_has_the_names_of_kubernetes_sd() -> None:
    """An existing job's usual rules find what they read: annotations, labels, phase, names and the port."""
    target = pod_target("web-1", meta={"label_app": "web", "param_module": "x", "zone": "a"}, ready=True)
    labels = labels_of(target)
    assert {name: value for name, value in labels.items() if not name.startswith(KUBERNETES)} == {
        "__metrics_path__": "/metrics",
        "__scheme__": "http",
        "__param_module": "x",
    }
    assert {name.removeprefix(KUBERNETES): labels[name] for name in labels if name.startswith(KUBERNETES)} == {
        "namespace": "shop",
        "pod_name": "web-1",
        "pod_node_name": "node-1",
        "node_name": "node-1",
        "node_label_topology_kubernetes_io_zone": "a",
        "pod_ip": "198.51.100.10",
        "pod_container_port_number": "9102",
        "pod_phase": "Running",
        "pod_ready": "true",
        "pod_label_app": "web",
        "pod_labelpresent_app": "true",
        **{
            f"pod_annotation{kind}_prometheus_io_{name}": value if not kind else "true"
            for kind in ("", "present")
            for name, value in (
                ("scrape", "true"), ("port", "9102"), ("path", "/metrics"), ("scheme", "http"),
                ("param_module", "x"),
            )
        },
    }  # fmt: skip


def test_node_has_the_names_and_the_instance_of_kubernetes_sd() -> None:
    """With the names of kubernetes_sd alone a Node's instance is its name, as there."""
    labels = labels_of(node_target(7))
    assert (labels[f"{KUBERNETES}node_name"], labels["instance"]) == ("node-7", "node-7")
    assert not any("_pod_" in name for name in labels)
    both = labels_of(node_target(7), names=LabelNames.BOTH)
    assert "instance" not in both
    assert {f"{KUBERNETES}node_name", "__meta_consul_service_id"} <= both.keys()
    assert not any(name.startswith(KUBERNETES) for name in labels_of(node_target(7), names=LabelNames.CONSUL))


def test_endpoint_has_the_names_and_annotations_of_its_service() -> None:
    """As the role `endpoints` gives them, so that the rules of the job `kubernetes-service-endpoints` go on."""
    labels = labels_of(endpoint_target("web-1"))
    assert labels[f"{KUBERNETES}service_name"] == "web"
    assert labels[f"{KUBERNETES}pod_name"] == "web-1"
    for name, value in (("scrape", "true"), ("path", "/metrics"), ("scheme", "http"), ("port", "9102")):
        assert labels[f"{KUBERNETES}service_annotation_prometheus_io_{name}"] == value
        assert labels[f"{KUBERNETES}service_annotationpresent_prometheus_io_{name}"] == "true"
    assert not any("pod_annotation" in name for name in labels)


def test_pod_scraped_elsewhere_has_its_nodes_address_and_the_operators_prefix() -> None:
    """Its own address and its container's port are not known; annotations have the configured prefix."""
    encoder = GroupEncoder(annotation_prefix="scrape.example/", pods_elsewhere=True)
    labels = labels_of(pod_target("web-1"), encoder)
    assert labels[f"{KUBERNETES}pod_host_ip"] == "198.51.100.10"
    assert labels.keys().isdisjoint({f"{KUBERNETES}pod_ip", f"{KUBERNETES}pod_container_port_number"})
    assert labels[f"{KUBERNETES}pod_annotation_scrape_example_scrape"] == "true"


@pytest.mark.parametrize("names", LabelNames)
def test_only_labels_of_the_list_are_set_by_annotations(names: LabelNames) -> None:
    """Meta in Consul beyond the list, of an earlier list or another writer, is no label."""
    meta = {"target___sample_limit__": "500", "target___address__": "198.51.100.66:80"}
    labels = labels_of(
        pod_target("web-1", meta=meta), GroupEncoder(target_labels=frozenset({"__sample_limit__"})), names
    )
    assert labels["__sample_limit__"] == "500"
    assert "__address__" not in labels


def test_further_meta_has_the_names_of_kubernetes_sd() -> None:
    """As with `attach_metadata` of namespaces and nodes, each label with one that says that it is there."""
    inherited = {"namespace_label_team": "web", "node_label_pool": "spot"}
    own = {"annotation_owner": "a", "container": "app", "port_name": "web", "pod_uid": "u", "ready": "true"}
    found = labels_of(pod_target("web-1", meta=inherited | own))
    expected = {
        "namespace_label_team": "web",
        "namespace_labelpresent_team": "true",
        "node_label_pool": "spot",
        "node_labelpresent_pool": "true",
        "pod_annotation_owner": "a",
        "pod_annotationpresent_owner": "true",
        "pod_container_name": "app",
        "pod_container_port_name": "web",
        "pod_uid": "u",
        "pod_ready": "true",
    }
    assert {KUBERNETES + key: value for key, value in expected.items()}.items() <= found.items()
    of_consul = labels_of(pod_target("web-1", meta=inherited), names=LabelNames.CONSUL)
    assert of_consul["__meta_consul_service_metadata_namespace_label_team"] == "web"


_ODD = st.text(st.sampled_from('ab"%\\:,{}é\ud800'), max_size=6)


@given(st.lists(st.dictionaries(_ODD, _ODD, max_size=4), max_size=20))
def test_group_has_its_own_labels_whatever_it_shares_with_others(metas: list[dict[str, str]]) -> None:
    """Whatever the names and values, quotation marks and signs of formats among them, and whatever came before."""
    encoder = GroupEncoder()
    for number, meta in enumerate(metas):
        target = pod_target(f"web-{number % 3}", meta=meta)
        group = encoder.encode(target)
        assert json.loads(group.text) == {
            "targets": ["198.51.100.10:9102"],
            "labels": encoder.labels(target),
        }
        assert group.text.count(b"\n") == 1


def test_groups_share_most_of_their_texts() -> None:
    """A group has a fifth of its text for itself, and the rest with many others."""
    encoder = GroupEncoder()
    groups = [encoder.encode(target) for target in many_targets(5000).values()]
    assert sum(len(one.own) for one in groups) < sum(len(one.text) for one in groups) / 4
    assert len({id(one.shared) for one in groups}) < 100


def test_target_that_is_encoded_again_and_again_leaves_nothing_behind() -> None:
    """A registrar encodes targets for months."""
    encoder, target = GroupEncoder(), pod_target("web-1")
    tracemalloc.start()
    try:
        for _ in range(5000):  # until Python's lists of free objects are full
            encoder.encode(target)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(2000):
            encoder.encode(target)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000


def divided(formats: Formats, labels: dict[str, str]) -> object:
    """Return a group with these labels as a collector decodes it."""
    return json.loads(Group("a", ObjectKey(Kind.POD, "", "a"), "", *formats.divide("a:1", labels)).text)


@pytest.mark.parametrize("count", [1, 40, 41, 42, 43, 200])
def test_group_has_all_of_its_labels_however_many_differ(count: int) -> None:
    """More values than a format has places for, and none that a byte in another value could end."""
    formats = Formats()
    odd = "".join(map(chr, range(0x180)))
    for value in ("", odd, f"\ud800{odd}"):
        labels = {f"l{at}": value + str(at) for at in range(count)}
        assert divided(formats, labels) == {"targets": ["a:1"], "labels": labels}


def test_groups_of_several_formats_are_one_list() -> None:
    """Nothing is lost where groups of several formats alternate."""
    encoder = GroupEncoder()
    groups = [encoder.encode(target) for target in many_targets(1000).values()]
    found = json.loads(b"[" + b",".join(texts(groups)) + b"]")
    ids = {one["labels"]["__meta_consul_service_id"]: one for one in found}
    assert len(found) == 1000
    assert ids == {one.id: json.loads(one.text) for one in groups}


def test_formats_of_ever_new_names_are_forgotten() -> None:
    """Names that Pods choose do not make the memory grow."""
    formats = Formats()
    for number in range(5000):
        formats.divide("a:1", {f"l{number}": "x"})
    for number in range(5000):
        labels = {f"l{at}": str(number >> at & 1) for at in range(13)}
        assert divided(formats, labels) == {"targets": ["a:1"], "labels": labels}
    assert len(formats._known) <= 256
    assert sum(len(known) for _, known in formats._known.values()) < 1000
