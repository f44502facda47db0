"""Labels of targets that annotations may set, and buckets of names."""

from collections import Counter

import pytest

from k8s_consul_registrar.errors import Reason, SettingsError
from k8s_consul_registrar.model import Kind, Rejection
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.targets.meta import parse_target_label
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.service_names import parse_name, parse_template
from support.builders import annotated, make_node, make_pod

LIMIT = parse_target_label("__sample_limit__")


def meta_of(rules: TargetRules, **annotations: str) -> dict[str, str]:
    """Return the meta of the target of a Pod with these annotations; a name's `__` is written `-`."""
    given = {name.replace("__", "-"): value for name, value in annotations.items()}
    resolved = resolve(make_pod(annotations=annotated(port="80", **given)), rules)
    assert isinstance(resolved, tuple), resolved
    return dict(resolved[0].meta)


def test_annotation_sets_a_label_of_the_list_only() -> None:
    """The annotation's name is the label's without its underscores; without the list nothing is read."""
    given = {"label__sample_limit": "500", "label__team": "shop"}
    assert meta_of(TargetRules(target_labels=(LIMIT,)), **given)["target___sample_limit__"] == "500"
    assert "target_team" not in meta_of(TargetRules(target_labels=(LIMIT,)), **given)
    assert not [key for key in meta_of(TargetRules(), **given) if key.startswith("target_")]
    assert "target___sample_limit__" not in meta_of(TargetRules(target_labels=(LIMIT,)))


@pytest.mark.parametrize(
    ("value", "reason"), [("x" * 513, Reason.META_TOO_LONG), ("a\nb", Reason.INVALID_META)]
)
def test_value_that_no_label_should_have_rejects_the_pod(value: str, reason: Reason) -> None:
    """As of every other meta."""
    pod = make_pod(annotations=annotated(port="80", **{"label-sample_limit": value}))
    rejected = resolve(pod, TargetRules(target_labels=(LIMIT,)))
    assert isinstance(rejected, Rejection)
    assert rejected.reason == reason


@pytest.mark.parametrize(
    "text",
    ["__address__", "__scheme__", "__metrics_path__", "__name__", "job", "instance", "__param_module", "__tenant_id__",
     "__meta_consul_service", "__tmp_x", "1a", "a-b", "", "_", "___x", "a" * 61, "\u00e9"],
)  # fmt: skip
def test_label_that_decides_what_is_scraped_is_refused(text: str) -> None:
    """An author of Pods must not send a collector, with its credentials, to another address."""
    with pytest.raises(ValueError, match=r"label|decides"):
        parse_target_label(text)


def test_setting_names_every_mistake() -> None:
    """Two labels of one annotation, and one that is refused, are exit 2."""
    with pytest.raises(SettingsError, match="label-limit"):
        read_registrar({"TARGET_LABELS": "limit,__limit__"})
    with pytest.raises(SettingsError, match="decides what is scraped"):
        read_registrar({"TARGET_LABELS": "__sample_limit__,__address__"})
    with pytest.raises(SettingsError, match="META_KEYS: cannot use target_team"):
        read_registrar({"TARGET_LABELS": "team", "META_KEYS": "cluster=target_team"})
    naming = read_registrar({"TARGET_LABELS": "__sample_limit__, team"}).naming
    assert [one.annotation for one in naming.target_labels] == ["label-sample_limit", "label-team"]


def test_bucket_spreads_names_evenly_and_by_the_id_alone() -> None:
    """Eight buckets of 800 Pods are about equal; ports of a Pod share one; a ninth moves about a ninth."""
    rules = TargetRules(pod_name=parse_name("pods-{bucket:8}", Kind.POD))
    wider = TargetRules(pod_name=parse_name("pods-{bucket:9}", Kind.POD))

    def name_of(number: int, rules: TargetRules) -> str:
        resolved = resolve(make_pod(f"web-{number}", annotations=annotated(port="80,81")), rules)
        assert isinstance(resolved, tuple)
        (name,) = {one.name for one in resolved}
        return name

    before = [name_of(number, rules) for number in range(800)]
    assert set(before) == {f"pods-{number}" for number in range(8)}
    assert all(60 < count < 140 for count in Counter(before).values())
    after = [name_of(number, wider) for number in range(800)]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"pods-8"}
    assert 50 < len(moved) < 140


def test_bucket_of_a_node_is_of_its_own_id() -> None:
    """Nodes have buckets as well."""
    resolved = resolve(make_node(), TargetRules(node_name=parse_name("nodes-{bucket:4}", Kind.NODE)))
    assert isinstance(resolved, tuple)
    assert resolved[0].name in {f"nodes-{number}" for number in range(4)}


@pytest.mark.parametrize(
    "text",
    ["{bucket}", "{bucket:}", "{bucket:0}", "{bucket:65}", "{bucket:-1}", "{bucket:a}", "{bucket:1.5}"],
)
def test_bucket_needs_a_number_of_them(text: str) -> None:
    """A mistake is named at the start."""
    with pytest.raises(ValueError, match=r"number of buckets|is none of"):
        parse_template(f"x{text}")
