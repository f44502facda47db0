"""Promises of `deploy/` and the Dockerfile: they fit over the original's objects, and ask for few rights."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from k8s_consul_registrar.model import MANAGED_BY
from k8s_consul_registrar.settings.reading import settings_of
from support.files import ROOT

DEPLOY = ROOT / "deploy"
MANIFESTS = ("rbac.yaml", "deployment.yaml", "deployment-svc.yaml")
Objects = dict[tuple[str, str], dict[str, Any]]


def documents(name: str) -> list[dict[str, Any]]:
    """Return the objects of one manifest."""
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


@pytest.fixture(scope="module")
def objects() -> Objects:
    """Return every object by kind and name."""
    found = [each for name in MANIFESTS for each in documents(name)]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def pod_of(deployment: dict[str, Any]) -> dict[str, Any]:
    """Return the Pod's spec of a Deployment."""
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def containers(objects: Objects) -> dict[str, dict[str, Any]]:
    """Return every container by name."""
    pods = [pod_of(each) for (kind, _), each in objects.items() if kind == "Deployment"]
    return {each["name"]: each for pod in pods for each in pod["containers"]}


@pytest.fixture
def agent(objects: Objects) -> dict[str, Any]:
    """Return the Consul agent's container."""
    return containers(objects)["consul-agent"]


def test_every_manifest_fits_the_schemas() -> None:
    """Each object passes the API's schemas, strictly; a misspelt field would not."""
    version = kubernetes_validate.latest_version()
    for name in MANIFESTS:
        for each in documents(name):
            kubernetes_validate.validate(each, version, strict=True)
    wrong = documents("deployment.yaml")[1]
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_original_s_objects_keep_their_names(objects: Objects) -> None:
    """Every object of the original program is there by its name, in its namespace."""
    originals = {
        ("ServiceAccount", "k8s-consul-registrar-sa"),
        ("ClusterRole", "k8s-consul-registrar-cr"),
        ("ClusterRoleBinding", "k8s-consul-registrar-crb"),
        ("Deployment", "k8s-consul-registrar"),
        ("Deployment", "k8s-consul-registrar-svc"),
        ("Service", "k8s-consul-registrar-proxy-service"),
    }
    assert originals <= objects.keys()
    namespaced = [each for (kind, _), each in objects.items() if not kind.startswith("ClusterRole")]
    assert {each["metadata"].get("namespace") for each in namespaced} == {"default"}


@pytest.mark.parametrize("name", ["k8s-consul-registrar", "k8s-consul-registrar-svc"])
def test_selectors_and_container_names_are_the_original_s(objects: Objects, name: str) -> None:
    """A Deployment's selector cannot change, and `kubectl apply` merges containers by their names."""
    deployment = objects["Deployment", name]
    assert deployment["spec"]["selector"] == {"matchLabels": {"app": name}}
    assert deployment["spec"]["template"]["metadata"]["labels"] == {"app": name}
    assert name in [each["name"] for each in pod_of(deployment)["containers"]]


def test_role_bound_is_the_original_s(objects: Objects) -> None:
    """A binding's role cannot change; the registrar's account is the original's."""
    binding = objects["ClusterRoleBinding", "k8s-consul-registrar-crb"]
    assert binding["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "ClusterRole",
        "name": "k8s-consul-registrar-cr",
    }
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "k8s-consul-registrar-sa", "namespace": "default"}
    ]
    registrar = pod_of(objects["Deployment", "k8s-consul-registrar"])
    assert registrar["serviceAccountName"] == "k8s-consul-registrar-sa"


def test_proxy_has_an_account_of_its_own(objects: Objects) -> None:
    """The proxy's Pod, its account, its binding and its role belong together, apart from the registrar's."""
    proxy = pod_of(objects["Deployment", "k8s-consul-registrar-svc"])
    assert proxy["serviceAccountName"] == "k8s-consul-registrar-proxy-sa"
    assert ("ServiceAccount", "k8s-consul-registrar-proxy-sa") in objects
    binding = objects["ClusterRoleBinding", "k8s-consul-registrar-proxy-crb"]
    assert [each["name"] for each in binding["subjects"]] == ["k8s-consul-registrar-proxy-sa"]
    assert binding["roleRef"]["name"] == "k8s-consul-registrar-proxy-cr"


def test_each_role_allows_what_its_mode_uses_and_no_more(objects: Objects) -> None:
    """The whole of both roles, so that any right added shows here."""
    assert objects["ClusterRole", "k8s-consul-registrar-cr"]["rules"] == [
        {"apiGroups": [""], "resources": ["pods", "nodes"], "verbs": ["list", "watch"]},
        {"apiGroups": [""], "resources": ["namespaces"], "resourceNames": ["kube-system"], "verbs": ["get"]},
    ]
    assert objects["ClusterRole", "k8s-consul-registrar-proxy-cr"]["rules"] == [
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch"]},
        {"apiGroups": [""], "resources": ["nodes/metrics"], "verbs": ["get"]},
    ]


def test_node_port_leads_only_to_the_proxy_s_port(objects: Objects) -> None:
    """NodePort 31112 reaches 8080; the admin port is in no Service."""
    service = objects["Service", "k8s-consul-registrar-proxy-service"]["spec"]
    assert (service["type"], service["selector"]) == ("NodePort", {"app": "k8s-consul-registrar-svc"})
    assert service["ports"] == [
        {"name": "http-proxy", "protocol": "TCP", "port": 8080, "targetPort": 8080, "nodePort": 31112}
    ]
    assert [kind for kind, _ in objects].count("Service") == 1


def test_every_container_is_confined(objects: Objects) -> None:
    """No root, nothing written outside volumes, no capability, the runtime's seccomp profile, bounded."""
    for (kind, _), each in objects.items():
        if kind == "Deployment":
            pod = pod_of(each)["securityContext"]
            assert (pod["runAsNonRoot"], pod["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
    for name, each in containers(objects).items():
        confined = each["securityContext"]
        assert confined["runAsUser"] > 0, name
        assert confined["allowPrivilegeEscalation"] is False, name
        assert confined["readOnlyRootFilesystem"] is True, name
        assert confined["capabilities"] == {"drop": ["ALL"]}, name
        assert (
            each["resources"]["requests"].keys() == each["resources"]["limits"].keys() == {"cpu", "memory"}
        ), name


def test_probes_ask_the_admin_port(objects: Objects) -> None:
    """Both modes are asked for readiness and liveness where their settings have them listen."""
    for name in ("k8s-consul-registrar", "k8s-consul-registrar-svc"):
        each = containers(objects)[name]
        (admin,) = [port["containerPort"] for port in each["ports"] if port["name"] == "admin"]
        assert {"name": "ADMIN_PORT", "value": str(admin)} in each["env"]
        assert each["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "admin"}
        assert each["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "admin"}


def test_each_deployment_runs_its_mode(objects: Objects) -> None:
    """The command is ours in both, MODE tells them apart, and every variable is one that mode reads."""
    for name, mode in {"k8s-consul-registrar": "registrar", "k8s-consul-registrar-svc": "proxy"}.items():
        each = containers(objects)[name]
        assert each["command"] == ["k8s-consul-registrar"]
        given = {variable["name"]: variable["value"] for variable in each["env"]}
        assert given.pop("MODE") == mode
        assert given.keys() <= {option.env for option in settings_of(mode)}


def test_service_links_cannot_set_our_variables(objects: Objects) -> None:
    """Without this a Service named `admin` in the namespace would set ADMIN_PORT to a URL."""
    for name in ("k8s-consul-registrar", "k8s-consul-registrar-svc"):
        assert pod_of(objects["Deployment", name])["enableServiceLinks"] is False


def test_only_the_registrar_s_container_holds_its_token(objects: Objects) -> None:
    """The agent beside it gets no API credentials, and the registrar finds them where clients look."""
    pod = pod_of(objects["Deployment", "k8s-consul-registrar"])
    assert pod["automountServiceAccountToken"] is False
    mounts = {
        each["name"]: {m["name"]: m["mountPath"] for m in each["volumeMounts"]} for each in pod["containers"]
    }
    assert mounts == {
        "consul-agent": {"consul-data": "/consul/data"},
        "k8s-consul-registrar": {"api-access": "/var/run/secrets/kubernetes.io/serviceaccount"},
    }


def test_proxy_gets_time_to_drain(objects: Objects) -> None:
    """The kubelet waits longer than the proxy's defaults of DRAIN_DELAY and SHUTDOWN_GRACE together."""
    defaults = {option.env: option.default for option in settings_of("proxy")}
    needed = float(defaults["DRAIN_DELAY"]) + float(defaults["SHUTDOWN_GRACE"])
    assert pod_of(objects["Deployment", "k8s-consul-registrar-svc"])["terminationGracePeriodSeconds"] > needed


def sized(page: str, row: str) -> dict[str, dict[str, str]]:
    """Return the requests and limits of a row of a page on sizing."""
    text = (ROOT / "docs" / page).read_text()
    pattern = rf"^\| {row} \| (\d+) Mi \S+ (\d+) Mi \| (\d+m) \|$"
    (found,) = re.findall(pattern, text, re.MULTILINE)
    request, limit, cpu = found
    return {
        "requests": {"cpu": cpu, "memory": f"{request}Mi"},
        "limits": {"cpu": "1", "memory": f"{limit}Mi"},
    }


@pytest.mark.parametrize(
    ("container", "value", "rows"),
    [
        ("k8s-consul-registrar", "registrar", ("up to 10,000", "10,000 以内")),
        ("k8s-consul-registrar-svc", "proxy", ("up to 5,000", "5,000 以内")),
    ],
)
def test_resources_are_those_of_the_page_on_sizing(
    objects: Objects, container: str, value: str, rows: tuple[str, str]
) -> None:
    """Manifests, values of the chart and the pages in both languages agree."""
    expected = sized("sizing.md", rows[0])
    assert sized("sizing.zh-CN.md", rows[1]) == expected
    assert containers(objects)[container]["resources"] == expected
    values = yaml.safe_load((ROOT / "charts" / "k8s-consul-registrar" / "values.yaml").read_text())
    assert values[value]["resources"] == expected


def test_prometheus_keeps_what_the_registrar_marks() -> None:
    """The example's first rule keeps by the mark the registrar writes."""
    (scrape,) = documents("prometheus.yml")[0]["scrape_configs"]
    assert scrape["relabel_configs"][0] == {
        "source_labels": ["__meta_consul_service_metadata_managed_by"],
        "regex": MANAGED_BY,
        "action": "keep",
    }


def test_agent_stays_itself_wherever_it_runs(objects: Objects, agent: dict[str, Any]) -> None:
    """Name, ID and data outlive the Pod, only one agent runs at a time, and stopping is not leaving."""
    flags = agent["args"]
    assert "-hcl=leave_on_terminate = false" in flags
    assert [flag for flag in flags if flag.startswith("-node=")]
    assert [
        flag for flag in flags if re.fullmatch(r"-node-id=[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", flag)
    ]
    assert "-data-dir=/consul/data" in flags
    deployment = objects["Deployment", "k8s-consul-registrar"]
    (data,) = [each for each in pod_of(deployment)["volumes"] if each["name"] == "consul-data"]
    claim = data["persistentVolumeClaim"]["claimName"]
    assert ("PersistentVolumeClaim", claim) in objects
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}


def test_agent_serves_only_its_own_pod(objects: Objects, agent: dict[str, Any]) -> None:
    """Its API is on the Pod's loopback, where the registrar looks for it, and no probe needs it elsewhere."""
    assert "-client=127.0.0.1" in agent["args"]
    registrar = containers(objects)["k8s-consul-registrar"]
    assert {"name": "CONSUL_ADDRESS", "value": "127.0.0.1:8500"} in registrar["env"]
    assert 8500 not in [port["containerPort"] for port in agent["ports"]]
    assert {*agent["readinessProbe"], *agent["livenessProbe"]}.isdisjoint({"tcpSocket", "httpGet", "grpc"})


def test_placeholder_is_marked_change() -> None:
    """Every placeholder's line says CHANGE."""
    placeholder = re.compile(r"^(?!\s*#).*(your-|example|-node-id=|shard-1)", re.MULTILINE)
    for name in MANIFESTS:
        for found in placeholder.finditer((DEPLOY / name).read_text()):
            line = found.string[found.start() :].split("\n", 1)[0]
            assert "# CHANGE" in line, f"{name}: {line}"


@pytest.mark.parametrize("page", ["deployment.md", "deployment.zh-CN.md"])
def test_every_line_to_fill_in_is_in_the_table(page: str) -> None:
    """The pages list the variable, flag or field of each line marked CHANGE, in a row of its manifest."""
    table = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| `")]
    marked = re.compile(
        r'^(?!#)(?: *- name: (\w+)\n)?[^#\n]*?(?:(image):|"(-[\w-]+)=|server:|value:).*# CHANGE', re.MULTILINE
    )
    for path in (*DEPLOY.glob("*.yaml"), *DEPLOY.glob("*.yml")):
        found = list(marked.finditer(path.read_text()))
        assert len(found) == len(re.findall(r"^[^#\n]+# CHANGE", path.read_text(), re.MULTILINE)), path.name
        rows = "".join(row for row in table if f"`{path.name}`" in row)
        assert bool(rows) == bool(found), path.name
        for one in found:
            name = next(filter(None, reversed(one.groups())), "")
            assert f"`{name}`" in rows or not name, f"{path.name}: {name}"


def test_claim_says_what_its_volume_needs() -> None:
    """The manifest names the condition that a hostPath volume does not meet, and the page with the remedy."""
    head = (DEPLOY / "deployment.yaml").read_text().partition("kind: PersistentVolumeClaim")[0]
    assert "must honour fsGroup" in head
    assert "## The agent's volume" in (ROOT / "docs" / "overlays.md").read_text()


def test_kustomization_names_every_manifest() -> None:
    """`kubectl apply -k` brings what applying the files one by one brings."""
    assert documents("kustomization.yaml")[0]["resources"] == list(MANIFESTS)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on PATH")
def test_kustomize_builds_the_same_objects(objects: Objects) -> None:
    """Kustomize reads them all."""
    done = subprocess.run(
        ["kubectl", "kustomize", DEPLOY], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    built = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    assert built == objects


def test_dockerfile_is_clean() -> None:
    """Hadolint finds nothing, and the image runs as a numbered user that is not root."""
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    user = re.findall(r"^USER (\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1]
    assert int(user) > 0


def test_image_is_built_only_from_locked_dependencies() -> None:
    """Every requirements file the image installs is installed by hash and locks every line by one."""
    text = (ROOT / "Dockerfile").read_text()
    installs = re.findall(r"install (.*)-r (\S+)", text)
    assert {name for _, name in installs} == {"requirements/build.txt", "requirements/runtime.txt"}
    assert all("--require-hashes" in options for options, _ in installs)
    for _, name in installs:
        requirements = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
        assert all(
            "--hash=sha256:" in line for line in requirements if line.strip() and not line.startswith("#")
        )


def test_build_context_holds_what_the_dockerfile_copies() -> None:
    """The ignore file lets through exactly what COPY names, and all of it exists or is to be written."""
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    }
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert next(line for line in ignore if not line.startswith("#")) == "*"
    assert [source for source in copied if not (ROOT / source).exists()] == []
