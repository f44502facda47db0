"""The Helm chart: sound by itself, the same objects as kustomize's, and safe to upgrade."""

import base64
import copy
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest
import yaml

from deploy.test_overlays import CUSTOM_RESOURCES, OVERLAYS, Objects, build
from k8s_consul_registrar import __version__
from k8s_consul_registrar.settings.reading import read_proxy, read_registrar
from support.files import ROOT, differences
from support.kubernetes_objects import assert_valid, nulls, pods_of
from support.pod_security import violations

helm_python = pytest.importorskip("helm_python", reason="Helm is not installed: make chart-tools")

CHART = ROOT / "charts" / "k8s-consul-registrar"
RELEASE = "k8s-consul-registrar"
VALUES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").iterdir())
# Values that no overlay is the same as: `agent` is deploy/ without an overlay.
ALONE = {"agent", "default", "everything"}
READERS = {"registrar": read_registrar, "proxy": read_proxy}
# Fields that the API server refuses to change.
FIXED = ("selector", "roleRef", "accessModes", "volumeName", "storageClassName", "clusterIP", "value")

each_values = pytest.mark.parametrize("name", VALUES)

SECRETS = {
    "kind": "APIResourceList",
    "groupVersion": "v1",
    "resources": [
        {
            "name": "secrets",
            "singularName": "",
            "namespaced": True,
            "kind": "Secret",
            "verbs": ["get", "list"],
        }
    ],
}
VERSIONS = {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
VERSION = {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
NOT_FOUND = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
GROUPS = {"kind": "APIGroupList", "apiVersion": "v1", "groups": []}


class SecretApi(BaseHTTPRequestHandler):
    """The few answers of an API server that Helm's `lookup` needs; `secrets` are those of the namespace `default`."""

    secrets: ClassVar[dict[str, dict[str, Any]]] = {}

    def do_GET(self) -> None:
        """Answer one request."""
        path = urlsplit(self.path).path
        discovery = {"/api": VERSIONS, "/api/v1": SECRETS, "/apis": GROUPS, "/version": VERSION}
        found = discovery.get(path) or self.secrets.get(
            path.removeprefix("/api/v1/namespaces/default/secrets/")
        )
        body = json.dumps(found or NOT_FOUND).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def values_of(name: str) -> dict[str, Any]:
    """Return the values of a file in `ci/`."""
    found: dict[str, Any] = yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())
    return found


def rendered(values: dict[str, Any], *, release: str = RELEASE, namespace: str = "default") -> Objects:
    """Render the chart; return objects by kind, namespace and name."""
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=release, namespace=namespace)
    found = [
        one
        for path, text in files.items()
        if path.endswith(".yaml")
        for one in yaml.safe_load_all(text)
        if one
    ]
    objects = {(o["kind"], o["metadata"].get("namespace", ""), o["metadata"]["name"]): o for o in found}
    assert len(objects) == len(found)
    return objects


def notes(values: dict[str, Any]) -> str:
    """Return what an installation says at its end."""
    with helm_python.Chart.load(CHART) as chart:
        return str(chart.render(values, name=RELEASE, namespace="default")[f"{RELEASE}/templates/NOTES.txt"])


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return values with another one at a path."""
    new = copy.deepcopy(values)
    *parents, last = path.split(".")
    inner = new
    for part in parents:
        inner = inner.setdefault(part, {})
    inner[last] = value
    return new


def variables(objects: Objects, deployment: str) -> dict[str, str]:
    """Return the variables of the container that is ours."""
    (found,) = [
        one
        for (kind, _, name), each in objects.items()
        if (kind, name) == ("Deployment", deployment)
        for one in each["spec"]["template"]["spec"]["containers"]
        if one["command"] == ["k8s-consul-registrar"]
    ]
    return {one["name"]: one["value"] for one in found["env"]}


def comparable(objects: Objects) -> Objects:
    """Return objects as both tools would write them: without Helm's labels, lists that are maps sorted."""
    return {key: _plain(each) for key, each in objects.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        plain = {
            key: _plain(inner)
            for key, inner in value.items()
            if inner is not None and not re.match(r"app\.kubernetes\.io/|helm\.sh/", key)
        }
        return {key: inner for key, inner in plain.items() if not (key == "labels" and not inner)}
    if isinstance(value, list):
        items = [_plain(item) for item in value]
        has_names = all(isinstance(item, dict) and "name" in item for item in items)
        return sorted(items, key=lambda item: str(item["name"])) if has_names else items
    return value


@each_values
def test_values_pass_a_strict_lint(name: str) -> None:
    """Helm has no complaint, not even a warning."""
    report = helm_python.lint(CHART, values_of(name), strict=True)
    assert report["total_charts_linted"] == 1
    assert [each for each in report["messages"] if each["severity"] > 1] == []
    assert not report["errors"]


@each_values
def test_rendering_is_valid_and_restricted(name: str) -> None:
    """Every object passes the API's schemas and has no null, and every Pod the restricted profile."""
    objects = rendered(values_of(name))
    assert nulls([*objects.values()]) == []
    for each in objects.values():
        if each["kind"] not in CUSTOM_RESOURCES:
            assert_valid(each)
    assert [violations(pod) for pod in pods_of(objects)] == [[]] * len(pods_of(objects))


@each_values
def test_variables_are_settings_that_go_together(name: str) -> None:
    """Each mode reads the variables it is given without a mistake."""
    objects = rendered(values_of(name))
    for kind, _, deployment in objects:
        if kind == "Deployment":
            given = {k: v for k, v in variables(objects, deployment).items() if k != "GOES_WITH"}
            assert READERS[given["MODE"]](given).common.warnings == ()


def test_each_overlay_has_values() -> None:
    """A new overlay gets a file of values here, and a row in the chart's README."""
    assert set(VALUES) - ALONE == set(OVERLAYS)
    table = (CHART / "README.md").read_text()
    assert [overlay for overlay in OVERLAYS if f"| `{overlay}` |" not in table] == []


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on PATH")
@pytest.mark.parametrize("name", ["agent", *OVERLAYS])
def test_chart_and_kustomize_make_the_same_objects(name: str) -> None:
    """Object by object, and field by field."""
    expected = comparable(build(*([] if name == "agent" else [name])))
    actual = comparable(rendered(values_of(name)))
    assert actual.keys() == expected.keys()
    for key, each in expected.items():
        assert list(differences(each, actual[key])) == [], key


@each_values
def test_upgrade_changes_no_field_that_is_fixed(name: str) -> None:
    """Every value that an upgrade may bring leaves what the API server refuses to change."""
    values = values_of(name)
    before = rendered(values)
    for path, value in (
        ("image.tag", "9.9.9"),
        ("clusterName", "another"),
        ("registrar.podLabels", {"extra": "label"}),
        ("proxy.replicas", 3),
        ("registrar.settings.SYNC_PERIOD", 7),
    ):
        after = rendered(changed(values, path, value))
        assert after.keys() == before.keys()
        for key, each in before.items():
            assert _fixed(after[key]) == _fixed(each), (path, key)


def _fixed(each: dict[str, Any]) -> dict[str, Any]:
    spec = each.get("spec", {})
    return {field: spec.get(field, each.get(field)) for field in FIXED} | {"kind": each["kind"]}


@pytest.mark.parametrize(
    ("setting", "value"), [("NAMESPACE_LABELS_AS_META", ["team"]), ("NAMESPACE_LABEL_SELECTOR", "team")]
)
def test_setting_that_needs_namespaces_grants_them(setting: str, value: object) -> None:
    """The right to follow Namespaces comes with the setting, and not without."""
    values = values_of("namespace-labels")
    values["registrar"]["settings"].pop("NAMESPACE_LABELS_AS_META")

    def follows() -> bool:
        roles = [each for (kind, *_), each in rendered(values).items() if kind == "ClusterRole"]
        rules = [rule for each in roles for rule in each["rules"] if rule["resources"] == ["namespaces"]]
        return any(rule["verbs"] == ["list", "watch"] for rule in rules)

    assert not follows()
    values["registrar"]["settings"][setting] = value
    assert follows()


def test_proxy_dials_the_address_families_that_the_registrar_registers() -> None:
    """Unless it has settings of its own."""
    values = values_of("proxy-pods")
    values["registrar"]["settings"] |= {"NODE_IP_FAMILY": "ipv6", "POD_IP_FAMILY": "ipv6"}

    def families() -> tuple[str, str]:
        settings = read_proxy(variables(rendered(values), "k8s-consul-registrar-svc"))
        assert settings.pods is not None
        return settings.common.node_ip_family, settings.pods.ip_family

    assert families() == ("ipv6", "ipv6")
    values["proxy"].setdefault("settings", {})["NODE_IP_FAMILY"] = "ipv4"
    assert families() == ("ipv4", "ipv6")


def test_proxy_asks_for_a_generated_token_by_default() -> None:
    """The Secret has 48 random characters, the proxy mounts it, and the notes say where it is."""
    values = values_of("default")
    first, second = rendered(values), rendered(values)
    secret = first["Secret", "default", "k8s-consul-registrar-proxy-token"]
    token = base64.b64decode(secret["data"]["token"]).decode()
    assert re.fullmatch(r"[A-Za-z0-9]{48}", token)
    assert second["Secret", "default", "k8s-consul-registrar-proxy-token"]["data"] != secret["data"]
    assert read_proxy(variables(first, "k8s-consul-registrar-svc")).inbound.is_authenticated
    assert "get secret k8s-consul-registrar-proxy-token" in notes(values)
    assert "WARNING" not in notes(values)
    assert "WARNING: the proxy asks for no token" in notes(
        changed(values, "proxy.token.generate", value=False)
    )


def test_upgrade_keeps_the_generated_tokens() -> None:
    """With a cluster at hand the chart takes each token over from its Secret, and makes one only where there is none."""
    values = changed(values_of("http-sd"), "registrar.httpSd.token", {"generate": True})
    values = changed(values, "proxy.token", {"generate": True})
    names = [f"{RELEASE}-{of}-token" for of in ("proxy", "http-sd")]

    def tokens(config: Any) -> list[str]:
        with helm_python.Chart.load(CHART) as chart:
            files = config.render(chart, values, name=RELEASE, namespace="default", is_upgrade=True)
        manifests = [text for path, text in files.items() if path.endswith(".yaml")]
        found = [one for text in manifests for one in yaml.safe_load_all(text) if one]
        secrets = {one["metadata"]["name"]: one for one in found if one["kind"] == "Secret"}
        SecretApi.secrets = secrets
        return [secrets[name]["data"]["token"] for name in names]

    with ThreadingHTTPServer(("127.0.0.1", 0), SecretApi) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        cluster = {"name": "c", "cluster": {"server": address}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        users = [{"name": "u", "user": {}}]
        kubeconfig = {"clusters": [cluster], "contexts": [context], "users": users, "current-context": "x"}
        SecretApi.secrets = {}
        try:
            with helm_python.Config(kubeconfig_content=yaml.safe_dump(kubeconfig)) as config:
                first = tokens(config)
                assert tokens(config) == first
                del SecretApi.secrets[names[0]]
                again = tokens(config)
        finally:
            server.shutdown()
    assert again[0] != first[0]
    assert again[1] == first[1]


def test_http_sd_asks_for_a_generated_token_by_default() -> None:
    """Names and addresses of all targets are not open to every client of a NodePort either."""
    values = changed(values_of("http-sd"), "registrar.httpSd.token", {"generate": True})
    objects = rendered(values)
    assert ("Secret", "default", "k8s-consul-registrar-http-sd-token") in objects
    settings = read_registrar(variables(objects, RELEASE))
    assert settings.http_sd is not None
    assert settings.http_sd.bearer_token_file == "/etc/k8s-consul-registrar/http-sd/token"


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("registrar.settings.SYNC_PERIODS", 60, "SYNC_PERIODS"),
        ("registrar.settings.SYNC_PERIOD", "soon", "SYNC_PERIOD"),
        ("registrar.settings.CONSUL_HTTP_TOKEN", "secret", "CONSUL_HTTP_TOKEN"),
        ("proxy.settings.CLUSTER_NAME", "c1", "CLUSTER_NAME"),
        ("consul.backend", "agents", "backend"),
        ("proxy.replica", 2, "replica"),
        ("image.digest", "latest", "digest"),
    ],
)
def test_schema_refuses_what_is_misspelt_or_misplaced(path: str, value: Any, complaint: str) -> None:
    """Before anything reaches the cluster; a secret is refused among the settings."""
    with pytest.raises(helm_python.HelmValuesError, match=complaint):
        rendered(changed(values_of("default"), path, value))


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("clusterName", "", "clusterName is required"),
        ("consul.address", "", "consul.address is required"),
        ("consul.agent", {"enabled": True}, "retryJoin is required"),
        ("consul.agent", {"enabled": True, "retryJoin": ["consul"]}, "nodeId is required"),
        ("consul", {"backend": "none", "agent": {"enabled": True}}, "does not go with consul.backend=none"),
        ("networkPolicy", {"enabled": True}, "networkPolicy.nodes is required"),
        ("networkPolicy", {"enabled": True, "nodes": ["192.0.2.0/24"]}, "networkPolicy.consul is required"),
    ],
)
def test_value_that_is_missing_is_named(path: str, value: Any, complaint: str) -> None:
    """The message says what to give."""
    with pytest.raises(helm_python.HelmRenderError, match=complaint):
        rendered(changed(values_of("default"), path, value))


def test_names_follow_the_release() -> None:
    """Two releases in two namespaces share no object but for none."""
    one = rendered(values_of("default"), release="blue", namespace="a")
    other = rendered(values_of("default"), release="green", namespace="b")
    assert one.keys().isdisjoint(other.keys())
    assert {name.removeprefix("blue-k8s-consul-registrar")[:1] for _, _, name in one} == {"", "-"}
    assert {namespace for kind, namespace, _ in one if not kind.startswith("Cluster")} == {"a"}


def test_chart_is_of_this_version() -> None:
    """The chart runs the program it comes with."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == __version__


def test_package_holds_what_an_installation_needs(tmp_path: Path) -> None:
    """The archive has the schema and the alerts, and not the values of the tests."""
    archive = helm_python.package(CHART, destination=tmp_path)
    with helm_python.Chart.load(archive) as chart:
        names = {file["name"] for file in chart.files}
        assert chart.schema is not None
    assert "files/alerts.yaml" in names
    assert not [name for name in names if name.startswith("ci/")]
