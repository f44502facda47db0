"""The variations of `deploy/`, each built by kustomize as its user would, and all that go together at once."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s_consul_registrar.settings.reading import SETTINGS
from support.files import DEPLOY
from support.kubernetes_objects import assert_valid, nulls, pods_of
from support.pod_security import violations

OVERLAYS = sorted(path.name for path in (DEPLOY / "overlays").iterdir())
CUSTOM_RESOURCES = {"PodMonitor", "PrometheusRule"}  # kinds the Kubernetes schemas do not hold
# Settings that overlays name and that are still to come; the change that adds one takes it out of here.
PENDING: frozenset[str] = frozenset()
COMBINED = (
    "catalog",
    "emit-events",
    "grouped-names",
    "namespace-labels",
    "network-policy",
    "pod-disruption-budget",
    "pod-monitor",
    "priority-class",
    "prometheus-rule",
    "services",
)
Objects = dict[tuple[str, str, str], dict[str, Any]]

# One process builds each set of overlays once.
pytestmark = pytest.mark.xdist_group("overlays")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on PATH")
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def build(*overlays: str) -> Objects:
    """Build `deploy/` with these overlays among its components; return objects by kind, namespace and name."""
    found = list(yaml.load_all(_built(overlays), Loader=yaml.CSafeLoader))
    objects = {(o["kind"], o["metadata"].get("namespace", ""), o["metadata"]["name"]): o for o in found}
    assert len(objects) == len(found)
    return objects


@cache
def _built(overlays: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(DEPLOY, Path(folder, "deploy"))
        if overlays:
            with (copy / "kustomization.yaml").open("a") as file:
                file.write("components:\n" + "".join(f"  - overlays/{name}\n" for name in overlays))
        done = subprocess.run(
            ["kubectl", "kustomize", copy], capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr[:2000]
    return done.stdout


def registrar(objects: Objects) -> dict[str, Any]:
    """Return the registrar's Pod."""
    spec: dict[str, Any] = objects["Deployment", "default", "k8s-consul-registrar"]["spec"]["template"][
        "spec"
    ]
    return spec


def environment(objects: Objects) -> dict[str, str]:
    """Return the registrar's variables."""
    (container,) = [one for one in registrar(objects)["containers"] if one["name"] == "k8s-consul-registrar"]
    return {one["name"]: one["value"] for one in container["env"]}


def assert_whole(objects: Objects, home: str = "default") -> None:
    """Fail when an object breaks the API's schemas or the restricted profile, has a null, or names what is not there."""
    assert nulls([*objects.values()]) == []
    assert [violations(pod) for pod in pods_of(objects)] == [[]] * len(pods_of(objects))
    for (kind, _, name), each in objects.items():
        if kind not in CUSTOM_RESOURCES:
            assert_valid(each)
        if kind in {"RoleBinding", "ClusterRoleBinding"}:
            role = each["roleRef"]
            scope = each["metadata"].get("namespace", "") if role["kind"] == "Role" else ""
            assert (role["kind"], scope, role["name"]) in objects, name
            for subject in each["subjects"]:
                assert ("ServiceAccount", subject["namespace"], subject["name"]) in objects, name
        if kind == "Deployment":
            assert_pod_whole(each["spec"]["template"]["spec"], objects, home)
    selectors = [each["spec"]["selector"] for (kind, _, _), each in objects.items() if kind == "Service"]
    labels = [
        each["spec"]["selector"]["matchLabels"]
        for (kind, _, _), each in objects.items()
        if kind == "Deployment"
    ]
    assert all(selector in labels for selector in selectors)


def assert_pod_whole(pod: dict[str, Any], objects: Objects, home: str) -> None:
    """Fail when a Pod mounts what it does not declare, or names a claim or an account that is not there."""
    assert ("ServiceAccount", home, pod["serviceAccountName"]) in objects
    volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
    mounted = {mount["name"] for one in pod["containers"] for mount in one.get("volumeMounts", ())}
    assert mounted == volumes.keys()
    for volume in volumes.values():
        if claim := volume.get("persistentVolumeClaim"):
            assert ("PersistentVolumeClaim", home, claim["claimName"]) in objects


@needs_kubectl
@each_overlay
def test_each_overlay_builds_into_something_whole(overlay: str) -> None:
    """Kustomize builds it, the objects pass the schemas strictly, and nothing hangs in the air."""
    assert_whole(build(overlay))


@needs_kubectl
def test_overlays_go_together() -> None:
    """Those that do not exclude each other combine, and the result is whole."""
    objects = build(*COMBINED)
    assert_whole(objects)
    assert {"CONSUL_BACKEND", "POD_SERVICE_NAME"} <= environment(objects).keys()
    kinds = {kind for kind, _, _ in objects}
    assert {"NetworkPolicy", "PodDisruptionBudget", *CUSTOM_RESOURCES} <= kinds


@needs_kubectl
def test_variables_are_settings() -> None:
    """Every variable an overlay sets is a setting, but for those listed as pending, all of which are still so."""
    named = {name for overlay in OVERLAYS for name in environment(build(overlay))}
    known = {option.env for option in SETTINGS} | {"MODE"}
    assert named - known == PENDING


ROLLING = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
RECREATE = {"type": "Recreate"}


@needs_kubectl
@pytest.mark.parametrize(
    ("overlay", "strategy"), [("catalog", RECREATE), ("http-sd", ROLLING), ("two-replicas", ROLLING)]
)
def test_overlay_without_an_agent_overlaps_only_where_one_pod_writes(
    overlay: str, strategy: dict[str, Any]
) -> None:
    """No agent, volume claim or group; Pods overlap where none writes Consul, or an election says which."""
    objects = build(overlay)
    pod = registrar(objects)
    assert [one["name"] for one in pod["containers"]] == ["k8s-consul-registrar"]
    assert "PersistentVolumeClaim" not in {kind for kind, _, _ in objects}
    assert "fsGroup" not in pod["securityContext"]
    assert objects["Deployment", "default", "k8s-consul-registrar"]["spec"]["strategy"] == strategy


def test_upgrade_page_leads_to_two_replicas_by_way_of_catalog() -> None:
    """The pages and the overlay itself name `catalog` as the step between."""
    page = (DEPLOY.parent / "docs" / "upgrade.md").read_text()
    section = page.partition("## From one replica with an agent to two replicas")[2].partition("\n#")[0]
    assert 0 < section.index("Apply `catalog`") < section.index("Replace `catalog` by `two-replicas`")
    assert (
        "apply `catalog` first" in (DEPLOY / "overlays" / "two-replicas" / "kustomization.yaml").read_text()
    )
    deployment = (DEPLOY.parent / "docs" / "deployment.md").read_text()
    assert "upgrade.md#from-one-replica-with-an-agent-to-two-replicas" in deployment


@needs_kubectl
def test_namespaced_asks_for_no_right_on_the_cluster() -> None:
    """No ClusterRole is left; each namespace of NAMESPACES has a Role that lists and watches Pods alone."""
    objects = build("namespaced")
    assert not [kind for kind, _, _ in objects if kind.startswith("ClusterRole")]
    chosen = environment(objects)["NAMESPACES"].split(",")
    roles = {namespace: each["rules"] for (kind, namespace, _), each in objects.items() if kind == "Role"}
    uid = [
        {"apiGroups": [""], "resources": ["namespaces"], "resourceNames": ["kube-system"], "verbs": ["get"]}
    ]
    assert roles.pop("kube-system") == uid
    pods = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]
    assert roles == dict.fromkeys(chosen, pods)
    bound = {namespace for kind, namespace, _ in objects if kind == "RoleBinding"}
    assert bound == {*chosen, "kube-system"}


@needs_kubectl
def test_budget_never_blocks_a_drain() -> None:
    """One proxy may go at a time, and there are two."""
    objects = build("pod-disruption-budget")
    budget = objects["PodDisruptionBudget", "default", "k8s-consul-registrar-svc"]["spec"]
    proxy = objects["Deployment", "default", "k8s-consul-registrar-svc"]["spec"]
    assert budget["selector"] == proxy["selector"]
    assert (budget["maxUnavailable"], proxy["replicas"]) == (1, 2)


@needs_kubectl
def test_monitor_finds_both_modes() -> None:
    """Its selector matches both Pods, and its port is one they declare."""
    objects = build("pod-monitor")
    monitor = objects["PodMonitor", "default", "k8s-consul-registrar"]["spec"]
    (expression,) = monitor["selector"]["matchExpressions"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    for (kind, _, _), each in objects.items():
        if kind == "Deployment":
            assert each["spec"]["template"]["metadata"]["labels"][expression["key"]] in expression["values"]
            ports = [
                p["name"] for one in each["spec"]["template"]["spec"]["containers"] for p in one["ports"]
            ]
            assert endpoint["port"] in ports


@needs_kubectl
def test_sd_port_is_one_number() -> None:
    """Service, container and setting agree on it, and it is not the proxy's NodePort."""
    objects = build("http-sd")
    (port,) = objects["Service", "default", "k8s-consul-registrar-http-sd"]["spec"]["ports"]
    given = environment(objects)
    assert str(port["targetPort"]) == given["HTTP_SD_PORT"]
    assert {port["targetPort"]} <= {
        each["containerPort"] for each in registrar(objects)["containers"][0]["ports"]
    }
    assert port["nodePort"] != 31112
    assert "CONSUL_ADDRESS" not in given


def test_placeholder_is_marked_change() -> None:
    """Every placeholder of an overlay says CHANGE on its line."""
    placeholder = re.compile(
        r"^(?!\s*#).*(your-|example\.|cidr: |namespace: (?!default|kube-system))", re.MULTILINE
    )
    for path in (DEPLOY / "overlays").rglob("*.yaml"):
        for line in path.read_text().splitlines():
            if placeholder.match(line) and "runbook_url:" not in line:  # the head of its file says so
                assert "# CHANGE" in line, f"{path.name}: {line}"


def test_every_line_to_fill_in_is_in_the_table() -> None:
    """Each overlay and component with a line marked CHANGE has a row, and so has each overlay to go back from."""
    page = (DEPLOY.parent / "docs" / "overlays.md").read_text()
    fill_in = page.partition("## Lines to fill in")[2].partition("\n#")[0]
    going_back = page.partition("## Going back from an overlay")[2].partition("\n#")[0]
    for folder in (*(DEPLOY / "overlays").iterdir(), *(DEPLOY / "components").iterdir()):
        is_marked = any("# CHANGE" in path.read_text() for path in folder.iterdir())
        assert is_marked == (f"{folder.name}`" in fill_in), folder.name
        assert folder.parent.name == "components" or f"`{folder.name}`" in going_back, folder.name


def test_purge_job_is_valid_and_restricted() -> None:
    """Its Pod passes the restricted profile and runs as the registrar's account."""
    (job,) = yaml.safe_load_all((DEPLOY / "purge-job.yaml").read_text())
    assert_valid(job)
    pod = job["spec"]["template"]["spec"]
    assert violations(pod) == []
    assert pod["serviceAccountName"] == "k8s-consul-registrar-sa"


@each_overlay
def test_each_overlay_is_described(overlay: str) -> None:
    """It begins with what it is for, and the page of the variations lists it."""
    assert (DEPLOY / "overlays" / overlay / "kustomization.yaml").read_text().startswith("# ")
    page = (DEPLOY.parent / "docs" / "overlays.md").read_text()
    assert re.search(rf"^\| `{overlay}` \|", page, re.MULTILINE)


@needs_kubectl
def test_namespace_is_named_once() -> None:
    """The component moves every object and every binding of `default`, and no Role of a chosen namespace."""
    objects = build("namespaced", "two-replicas", "network-policy", "../components/namespace")
    found = {(kind, namespace) for kind, namespace, _ in objects}
    elsewhere = {("Role", name) for name in ("shop", "payments", "kube-system")}
    elsewhere |= {("RoleBinding", name) for _, name in elsewhere}
    assert {namespace for _, namespace in found - elsewhere} == {"monitoring"}
    subjects = [one for each in objects.values() for one in each.get("subjects", ())]
    assert {one["namespace"] for one in subjects} == {"monitoring"}
    assert "ConfigMap" not in {kind for kind, _ in found}
    assert_whole(objects, "monitoring")


def test_port_number_is_declared_once() -> None:
    """`kubectl apply` merges ports by their number: of two entries one is lost over an older Deployment."""
    for path in DEPLOY.rglob("*.yaml"):
        for each in yaml.safe_load_all(path.read_text()):
            if each and each.get("kind") == "Deployment":
                for one in each["spec"].get("template", {}).get("spec", {}).get("containers", ()):
                    numbers = [port["containerPort"] for port in one.get("ports", ())]
                    assert len(numbers) == len(set(numbers)), path


def test_manifests_have_no_null_that_is_applied() -> None:
    """`kubectl apply` would say "configured" each time; only patches of overlays take a field out with null."""
    for path in DEPLOY.glob("*.yaml"):
        assert nulls(list(yaml.safe_load_all(path.read_text()))) == [], path


@pytest.mark.parametrize(
    ("where", "change", "violation"),
    [
        ("pod", {"hostNetwork": True}, "hostNetwork"),
        ("pod", {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "volume v"),
        ("pod", {"securityContext": {}}, "runs as root"),
        ("container", {"securityContext": {}}, "allowPrivilegeEscalation"),
        (
            "container",
            {"securityContext": {"capabilities": {"drop": ["ALL"], "add": ["NET_RAW"]}}},
            "capabilities",
        ),
        ("container", {"ports": [{"containerPort": 1, "hostPort": 1}]}, "hostPort"),
    ],
)
def test_restricted_profile_is_checked(where: str, change: dict[str, Any], violation: str) -> None:
    """The check can fail: the proxy's Pod passes, and not with one thing changed."""
    deployment, _ = yaml.safe_load_all((DEPLOY / "deployment-svc.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    assert violations(pod) == []
    (pod if where == "pod" else pod["containers"][0]).update(change)
    assert any(violation in found for found in violations(pod))
