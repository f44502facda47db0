"""The settings of names, shards and selection: read once, every mistake told by name."""

import pytest

from k8s_consul_registrar.cli import main
from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.model import Kind, Selector, Source
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.targets.meta import LabelMeta
from k8s_consul_registrar.targets.resolve import TargetRules
from k8s_consul_registrar.targets.service_names import HashShards, RandomShards
from k8s_consul_registrar.wiring.registrar import Wiring


def read(**environment: str) -> RegistrarSettings:
    """Return the settings of a registrar of cluster `lab`."""
    return read_registrar({"CLUSTER_NAME": "lab", **environment})


def problems(**environment: str) -> tuple[str, ...]:
    """Return what is wrong with these settings."""
    with pytest.raises(SettingsError) as raised:
        read(**environment)
    return raised.value.problems


def test_defaults_are_those_of_the_original_program() -> None:
    """Without any of them names, prefixes and sources are as they always were."""
    settings = read()
    assert Wiring(settings).targets == TargetRules(cluster="lab")
    assert settings.selection.sources == (Source(Kind.NODE), Source(Kind.POD))
    assert settings.selection.selectors == {}
    assert not settings.naming.meta_keys.renamed
    assert Wiring(settings).shards == RandomShards()
    assert Wiring(settings).identity.covers_cluster
    assert settings.common.warnings == ()


def test_every_setting_reaches_its_place() -> None:
    """Each variable ends in the value that heeds it."""
    settings = read(
        POD_SERVICE_NAME="{cluster}-pods",
        NODE_SERVICE_NAME="{cluster}-nodes",
        SERVICE_TAGS="cluster={cluster}, , shard_path={shard_path}",
        SERVICE_ID_PREFIX="blue-",
        POD_LABELS_AS_META="app,app.kubernetes.io/version",
        META_KEYS="cluster=cluster_name, metrics_path=path",
        SHARD_PATHS="s1, s22",
        SHARD_STRATEGY="HASH",
        ANNOTATION_PREFIX="scrape.example.com/",
        NODE_ADDRESS_TYPES="ExternalIP, InternalIP",
        POD_LABEL_SELECTOR="app in (a, b)",
        NODE_LABEL_SELECTOR="!gpu",
        INSTANCE="blue",
    )
    rules = Wiring(settings).targets
    assert [str(place) for place in rules.pod_name.fields] == ["{cluster}"]
    assert [template.literal for template in rules.tags] == ["cluster=", "shard_path="]
    assert (rules.id_prefix, rules.annotation_prefix) == ("blue-", "scrape.example.com/")
    assert rules.labels == (
        LabelMeta("app", "label_app"),
        LabelMeta("app.kubernetes.io/version", "label_app_kubernetes_io_version"),
    )
    assert rules.node_address_types == ("ExternalIP", "InternalIP")
    assert rules.longest_shard == 3
    assert settings.naming.meta_keys.text == "cluster=cluster_name,metrics_path=path"
    assert Wiring(settings).shards == HashShards(("s1", "s22"))
    assert settings.selection.selectors == {
        Kind.POD: Selector("app in (a, b)"),
        Kind.NODE: Selector("!gpu"),
    }


@pytest.mark.parametrize(
    ("environment", "sources"),
    [
        ({"DISCOVER": "nodes"}, (Source(Kind.NODE),)),
        ({"DISCOVER": "pods, nodes"}, (Source(Kind.NODE), Source(Kind.POD))),
        ({"NAMESPACES": "b, a,b"}, (Source(Kind.POD, "b"), Source(Kind.POD, "a"))),
        ({"NAMESPACES": "a", "DISCOVER": "nodes,pods"}, (Source(Kind.NODE), Source(Kind.POD, "a"))),
    ],
)
def test_sources(environment: dict[str, str], sources: tuple[Source, ...]) -> None:
    """Each namespace is a source of its own, and with namespaces the default is Pods alone."""
    assert read(**environment).selection.sources == sources


@pytest.mark.parametrize(
    "environment",
    [
        {"INSTANCE": "blue"},
        {"NAMESPACES": "a"},
        {"DISCOVER": "pods"},
        {"POD_LABEL_SELECTOR": "a"},
        {"NODE_LABEL_SELECTOR": "a"},
    ],
)
def test_identity_of_a_part_does_not_cover_the_cluster(environment: dict[str, str]) -> None:
    """Whatever narrows what is looked at takes away the right to clear up after the original program."""
    assert not Wiring(read(**environment)).identity.covers_cluster


def test_excluded_namespaces_are_left_out_of_every_kind_that_has_namespaces() -> None:
    """Pods, Services and slices alike, with the labels that their kind has."""
    settings = read(EXCLUDE_NAMESPACES="b, a", POD_LABEL_SELECTOR="app", DISCOVER="pods,nodes,services")
    fields = "metadata.namespace!=a,metadata.namespace!=b"
    assert settings.selection.selectors == {
        Kind.POD: Selector("app", fields),
        Kind.SERVICE: Selector("", fields),
        Kind.ENDPOINT: Selector("", fields),
    }
    assert not Wiring(settings).identity.covers_cluster


def test_excluded_namespaces_beside_chosen_ones_have_no_effect() -> None:
    """That is said; to name one in both is a mistake."""
    settings = read(NAMESPACES="a,b", EXCLUDE_NAMESPACES="c")
    assert settings.selection.selectors == {}
    assert "EXCLUDE_NAMESPACES has no effect: NAMESPACES leaves" in settings.common.warnings[0]
    (problem,) = problems(NAMESPACES="a,b", EXCLUDE_NAMESPACES="b,c")
    assert problem == "EXCLUDE_NAMESPACES: names b, which NAMESPACES names too"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("POD_SERVICE_NAME", "pods-{oops}", "{oops} is none of"),
        ("POD_SERVICE_NAME", "{pod}", "must begin with"),
        ("POD_SERVICE_NAME", "pods-{shard_path}", "SHARD_PATHS names none"),
        ("NODE_SERVICE_NAME", "node-{pod}", "{pod} is none of"),
        ("NODE_SERVICE_NAME", "n" * 513, "over 512"),
        ("SERVICE_TAGS", "ok,{bad", "without its counterpart"),
        ("SERVICE_ID_PREFIX", "a/b", "must be letters"),
        ("SERVICE_ID_PREFIX", "pod--x", "begins as an ID"),
        ("SERVICE_ID_PREFIX", "node--", "begins as an ID"),
        ("POD_LABELS_AS_META", "a.b,a-b", "would both be label_a_b"),
        ("POD_LABELS_AS_META", "a b", "is no label"),
        ("NAMESPACE_LABELS_AS_META", "a b", "is no label"),
        ("NODE_LABELS_AS_META", "a.b,a-b", "would both be node_label_a_b"),
        ("POD_LABELS_AS_META", "x" * 100 + ".example.com/" + "y" * 60, "over the 128"),
        ("META_KEYS", "cluster=node", "which is one of the registrar's own keys"),
        ("META_KEYS", "managed_by=owner", "cannot be renamed"),
        ("SHARD_STRATEGY", "sticky", "is none of random, hash"),
        ("SHARD_PATHS", "\udc80", "not printable"),
        ("DISCOVER", "pods,jobs", "'jobs' is none of pods, nodes, services"),
        ("DISCOVER", ",", "names no kind"),
        ("NAMESPACES", "a,B", "'B' is no namespace"),
        ("NAMESPACES", "x" * 64, "is no namespace"),
        ("NAMESPACES", ",", "names no namespace"),
        ("EXCLUDE_NAMESPACES", "a,B", "'B' is no namespace"),
        ("POD_LABEL_SELECTOR", "a\x00b", "not printable"),
        ("ANNOTATION_PREFIX", "prometheus.io", "a slash"),
        ("ANNOTATION_PREFIX", "Prometheus.io/", "a slash"),
        ("ANNOTATION_PREFIX", "a/b/", "a slash"),
        ("ANNOTATION_PREFIX", ".io/", "a slash"),
        ("NODE_ADDRESS_TYPES", "Hostname", "'Hostname' is none of InternalIP, ExternalIP"),
        ("NODE_ADDRESS_TYPES", ",", "names none of"),
    ],
)
def test_mistakes_are_told_by_name(name: str, value: str, said: str) -> None:
    """An unusable value is one problem under its variable's name."""
    (problem,) = problems(**{name: value})
    assert problem.startswith(f"{name}: ")
    assert said in problem


def test_shard_paths_that_fit_no_name() -> None:
    """A shard path that is no part of a name is a problem only where a name has it."""
    assert read(SHARD_PATHS="a/b").naming.shard_paths == ("a/b",)
    (problem,) = problems(SHARD_PATHS="a/b,c", POD_SERVICE_NAME="pods-{shard_path}")
    assert "'a/b' of SHARD_PATHS" in problem


@pytest.mark.parametrize(
    ("environment", "warning"),
    [
        ({"POD_LABEL_SELECTOR": "a"}, "without INSTANCE"),
        (
            {"POD_LABEL_SELECTOR": "a", "DISCOVER": "nodes", "INSTANCE": "x"},
            "POD_LABEL_SELECTOR has no effect",
        ),
        (
            {"NODE_LABEL_SELECTOR": "a", "NAMESPACES": "a", "INSTANCE": "x"},
            "NODE_LABEL_SELECTOR has no effect",
        ),
        ({"NAMESPACES": "a", "DISCOVER": "nodes"}, "NAMESPACES has no effect"),
    ],
)
def test_warnings(environment: dict[str, str], warning: str) -> None:
    """A setting without effect, or with one that surprises, causes a warning."""
    (said,) = read(**environment).common.warnings
    assert warning in said


def test_all_mistakes_at_once_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with 2 and names every variable at fault."""
    wrong = {
        "POD_SERVICE_NAME": "{oops}",
        "NODE_SERVICE_NAME": "a{",
        "SERVICE_TAGS": "{x},{y}",
        "META_KEYS": "cluster=pod",
        "DISCOVER": "everything",
    }
    assert main(["registrar"], wrong) == 2
    said = capsys.readouterr().err
    assert all(f"{name}: " in said for name in wrong)
    assert said.count("SERVICE_TAGS: ") == 2
