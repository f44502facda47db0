"""The command lint: manifests decided as the daemon decides what runs."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from k8s_consul_registrar.cli import main
from k8s_consul_registrar.commands.lint import LintFinding, LintReport, lint
from k8s_consul_registrar.targets.resolve import TargetRules

RULES = TargetRules()

POD = """
apiVersion: v1
kind: Pod
metadata:
  name: cart
  annotations: {prometheus.io/scrape: "true"}
spec:
  containers: [{name: app, ports: [{containerPort: 9102, name: metrics}]}]
"""
PORTLESS = POD.replace("[{containerPort: 9102, name: metrics}]", "[]")
TEMPLATE = """
metadata:
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: "99999"
spec:
  containers: [{name: app}]
"""


def linted(tmp_path: Path, text: str | bytes, name: str = "manifest.yaml") -> LintReport:
    """Return the report on one file."""
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return lint([str(file)], RULES)


def reasons(report: LintReport) -> list[tuple[str, str, int]]:
    """Return level, reason and line of each finding."""
    return [(one.level, one.reason, one.line) for one in report.findings]


def indented(text: str, depth: int) -> str:
    """Return a text as a value below a key."""
    return text.replace("\n", "\n" + " " * depth)


def workload(kind: str, path: tuple[str, ...]) -> str:
    """Return a workload with the template at its place."""
    text = f"apiVersion: apps/v1\nkind: {kind}\nmetadata: {{name: cart, namespace: shop}}"
    for depth, key in enumerate(path):
        text += f"\n{'  ' * depth}{key}:"
    return text + indented(TEMPLATE, 2 * len(path))


def test_pod_that_runs_well_is_a_target(tmp_path: Path) -> None:
    """Nothing is found, and the exit code is 0."""
    report = linted(tmp_path, POD)
    assert (report.findings, report.targets, report.exit_code) == ((), 1, 0)


def test_rejected_pod_is_found_at_the_line_of_its_annotation(tmp_path: Path) -> None:
    """With the daemon's reason; the exit code is 3."""
    report = linted(tmp_path, f"{POD}---{PORTLESS}")
    assert reasons(report) == [("error", "no_port", 14)]
    assert (report.targets, report.exit_code) == (1, 3)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", ("spec", "template")),
        ("StatefulSet", ("spec", "template")),
        ("DaemonSet", ("spec", "template")),
        ("ReplicaSet", ("spec", "template")),
        ("ReplicationController", ("spec", "template")),
        ("Job", ("spec", "template")),
        ("CronJob", ("spec", "jobTemplate", "spec", "template")),
        ("PodTemplate", ("template",)),
    ],
)
def test_template_of_a_workload_is_decided(tmp_path: Path, kind: str, path: tuple[str, ...]) -> None:
    """Every kind that makes Pods, wherever it keeps their template."""
    (finding,) = linted(tmp_path, workload(kind, path)).findings
    assert (finding.object, finding.reason) == (f"{kind} shop/cart", "invalid_port")


def test_annotation_on_the_workload_itself_is_a_warning(tmp_path: Path) -> None:
    """It scrapes nothing, which is the commonest mistake."""
    text = workload("Deployment", ("spec", "template")).replace(
        "namespace: shop}", 'namespace: shop, annotations: {prometheus.io/scrape: "true"}}'
    )
    report = linted(tmp_path, text.replace('"99999"', '"9102"'))
    assert [(one.level, one.reason) for one in report.findings] == [("warning", "misplaced")]
    assert "spec.template.metadata.annotations" in report.findings[0].detail
    assert report.exit_code == 0


def test_scrape_that_is_no_text_or_no_true_is_found(tmp_path: Path) -> None:
    """A bare `true` is refused by the API server; "yes" is no target."""
    bare = linted(tmp_path, POD.replace('"true"', "true"))
    assert reasons(bare) == [("error", "undecodable", 6)]
    other = linted(tmp_path, POD.replace('"true"', '"yes"'))
    assert reasons(other) == [("warning", "not_a_target", 6)]
    assert other.unannotated == 1


def test_items_of_a_list_are_objects(tmp_path: Path) -> None:
    """As `kubectl get -o yaml` prints them, in JSON too."""
    items = [json.loads(json.dumps({"kind": "Pod", "metadata": {"name": name}})) for name in ("a", "b")]
    items[0]["metadata"]["annotations"] = {"prometheus.io/scrape": "true"}
    report = linted(tmp_path, json.dumps({"kind": "PodList", "items": items}), "list.json")
    assert [(one.object, one.reason) for one in report.findings] == [("Pod a", "no_port")]
    assert report.unannotated == 1


def test_pod_with_a_status_is_decided_as_it_is(tmp_path: Path) -> None:
    """A live Pod without an IP is rejected as the daemon rejects it, one that ended is no target."""
    assert reasons(linted(tmp_path, f"{POD}status: {{phase: Running}}")) == [("error", "no_ip", 6)]
    assert linted(tmp_path, f"{POD}status: {{phase: Succeeded}}").unannotated == 1


@pytest.mark.parametrize(
    "text",
    [
        b"\x00\x01\xff",
        b"kind: [",
        b"- just\n- a list",
        b"{{ if .Values.x }}\nkind: Pod\n{{ end }}",
        b"kind: Pod\nmetadata: &a {x: *a}",
        b"a: &a [x, x]\n"
        + b"".join(b"%c: &%c [*%c, *%c, *%c, *%c]\n" % (c + 1, c + 1, c, c, c, c) for c in range(97, 117)),
        b"[" * 300_000,
        b"- " * 300_000,
        b"{a: " * 300_000,
        b"? [a]\n: b",
        b"kind: Pod\nmetadata: {creationTimestamp: 2024-99-99}",
    ],
)
def test_garbage_is_an_error_of_the_file(tmp_path: Path, text: bytes) -> None:
    """Never a traceback, never a minute of work; the exit code is 1."""
    report = linted(tmp_path, text)
    assert [one.reason for one in report.findings] == ["unreadable"]
    assert report.exit_code == 1


@pytest.mark.parametrize(
    "many", [b"a: [" + b"*a, " * (1 << 18) + b"x]\n", b"x: " + b"y" * (10 << 20) + b"\n"]
)
def test_megabytes_of_aliases_end_soon(tmp_path: Path, many: bytes) -> None:
    """A short text that means a billion values is no Pod, and no reason to run out of memory."""
    bomb = b"a: &a [x, x]\n" + b"".join(
        b"%c: &%c [*%c, *%c, *%c]\n" % (c, c, c - 1, c - 1, c - 1) for c in range(98, 118)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = linted(tmp_path, b"kind: Pod\nmetadata: {name: a}\n" + bomb + many)
    assert (reasons(report), report.exit_code) == ([("error", "unreadable", 1)], 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10


def test_output_of_helm_is_linted(tmp_path: Path) -> None:
    """Comments that name the source, empty documents and hooks, many kinds in one stream."""
    text = "# Source: shop/templates/none.yaml\n---\n# Source: shop/templates/pod.yaml" + PORTLESS
    text += f"---\n# Source: shop/templates/deployment.yaml\n{workload('Deployment', ('spec', 'template'))}\n"
    text += "---\n# Source: shop/templates/tests/test.yaml\napiVersion: batch/v1\nkind: Job\nmetadata: {name: t, annotations: {helm.sh/hook: test}}\n"
    report = linted(tmp_path, text)
    assert [(one.object, one.reason) for one in report.findings] == [
        ("Pod cart", "no_port"),
        ("Deployment shop/cart", "invalid_port"),
    ]


def test_other_kinds_and_empty_documents_are_passed_over(tmp_path: Path) -> None:
    """A chart has more than Pods in it."""
    report = linted(tmp_path, "---\n---\n# nothing\n---\nkind: ConfigMap\ndata: {a: b}\n")
    assert report == LintReport((), 0, 0)


def test_missing_file_is_said_and_the_rest_is_linted(tmp_path: Path) -> None:
    """A folder stands for the manifests in it."""
    (tmp_path / "chart").mkdir()
    (tmp_path / "chart" / "pod.yml").write_text(PORTLESS)
    report = lint([str(tmp_path / "none.yaml"), str(tmp_path)], RULES)
    assert [one.reason for one in report.findings] == ["unreadable", "no_port"]
    assert report.exit_code == 1


def test_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text for people, JSON for programs, workflow commands for GitHub; settings are heeded."""
    file = tmp_path / "a,b.yaml"
    file.write_text(PORTLESS.replace("prometheus.io/", "scrape.example.com/"))
    arguments = ["lint", str(file), "--annotation-prefix", "scrape.example.com/"]
    assert main(arguments, {}) == 3
    assert f"{file}:6: error: Pod cart: no_port: " in capsys.readouterr().out
    assert main([*arguments, "--output", "json"], {}) == 3
    (finding,) = json.loads(capsys.readouterr().out)
    assert LintFinding(**finding).reason == "no_port"
    assert main([*arguments, "--output", "github"], {}) == 3
    assert capsys.readouterr().out.startswith(
        f"::error file={tmp_path}/a%2Cb.yaml,line=6,title=no_port::Pod cart"
    )
    assert main(["lint", str(file)], {}) == 0


def test_missing_cluster_name_is_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of a manifest depends on it; other warnings about settings stay."""
    file = tmp_path / "pod.yaml"
    file.write_text(POD)
    assert main(["lint", str(file)], {"QUOTA_REMOVE": "true"}) == 0
    said = capsys.readouterr()
    assert "CLUSTER_NAME" not in said.out + said.err
    assert "QUOTA_REMOVE has no effect" in said.out + said.err


def test_list_of_a_large_cluster_is_within_the_bound_of_values(tmp_path: Path) -> None:
    """Two thousand Pods with their labels, as one list."""
    labels = {f"label-{number}": "value" for number in range(40)}
    annotations = {"prometheus.io/scrape": "true", "prometheus.io/port": "9102"}
    pods = [
        {"kind": "Pod", "metadata": {"name": f"pod-{number}", "labels": labels, "annotations": annotations}}
        for number in range(2000)
    ]
    report = linted(tmp_path, json.dumps({"kind": "PodList", "items": pods}), "list.json")
    assert (report.findings, report.targets) == ((), 2000)


# Services

SERVICE = """
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: "{port}"
spec:
  selector: {{app: web}}
  ports:
    - {{name: http, port: 80, targetPort: 8080}}
    - {{name: metrics, port: 81, targetPort: metrics}}
    - {{name: dns, port: 53, protocol: UDP}}
"""


def linted_service(folder: Path, text: str) -> LintReport:
    """Lint a manifest with Services read."""
    (folder / "service.yaml").write_text(text)
    return lint([str(folder / "service.yaml")], RULES, reads_services=True)


@pytest.mark.parametrize(
    ("port", "outcome"),
    [
        ("metrics", 1),
        ("http,metrics", 2),
        ("8080", 1),
        ("", 1),
        ("dns", "unknown_port_name"),
        ("none", "unknown_port_name"),
        ("99999", "invalid_port"),
    ],
)
def test_service_is_decided_as_if_it_had_an_endpoint(tmp_path: Path, port: str, outcome: int | str) -> None:
    """By the ports that its endpoints have: numbers are target ports, names are the Service's."""
    report = linted_service(tmp_path, SERVICE.format(port=port))
    if isinstance(outcome, int):
        assert (report.findings, report.targets, report.exit_code) == ((), outcome, 0)
    else:
        assert reasons(report) == [("error", outcome, 8)]
        assert report.findings[0].object == "Service shop/web"
        assert "EndpointSlice" not in report.findings[0].detail
        assert report.exit_code == 3


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("{type: ExternalName, externalName: db.example}", "no_address"),
        ("{clusterIP: None}", "no_port"),
        ("{ports: [{port: 80, name: a}, {port: 81, name: b}]}", "ambiguous_port"),
        ("{ports: nonsense}", "no_port"),
        ("[]", "no_port"),
        ("{ports: [{port: 80}], ipFamilies: [IPv6]}", None),
        ("{ports: [{port: 80}], type: 3}", "undecodable"),
    ],
)
def test_service_of_any_spec_ends_as_a_target_or_a_reason(
    tmp_path: Path, spec: str, reason: str | None
) -> None:
    """Without a selector, with other families, and with what no API server takes."""
    head = 'kind: Service\nmetadata: {name: web, annotations: {prometheus.io/scrape: "true"}}\n'
    report = linted_service(tmp_path, f"{head}spec: {spec}\n")
    assert [one.reason for one in report.findings] == ([] if reason is None else [reason])
    assert report.targets == (reason is None)


@pytest.mark.parametrize(
    "rules",
    [
        {"pod_ip_family": "ipv6"},
        {"pod_ip_family": "ipv4"},
        {"node_ip_family": "ipv6", "pods_through_proxy": True},
        {"node_ip_family": "ipv4", "pods_through_proxy": True},
    ],
)
def test_address_family_that_a_manifest_cannot_tell_rejects_nothing(
    tmp_path: Path, rules: dict[str, Any]
) -> None:
    """Only the status of a Pod, and the spec of a Service, say which there are."""
    asking = POD.replace('scrape: "true"', 'scrape: "true", prometheus.io/ip-family: ipv6')
    service = SERVICE.format(port="http").replace("selector: {app: web}", "externalIPs: []")
    (tmp_path / "all.yaml").write_text(f"{POD}---{asking}---{service}")
    report = lint([str(tmp_path)], TargetRules(**rules), reads_services=True)
    assert (report.findings, report.targets) == ((), 3)


def test_service_without_the_annotated_family_is_rejected(tmp_path: Path) -> None:
    """Its spec says so, unlike that of a Service that the API server has yet to complete."""
    text = SERVICE.format(port="http").replace(
        'port: "http"', "ip-family: ipv6\n    prometheus.io/port: http"
    )
    assert linted_service(tmp_path, text).targets == 1
    only = text.replace("spec:", "spec:\n  ipFamilies: [IPv4]")
    assert [one.reason for one in linted_service(tmp_path, only).findings] == ["no_ip_family"]


def test_service_that_selects_pods_is_a_warning_where_only_pods_themselves_are_scraped(
    tmp_path: Path,
) -> None:
    """Its manifest does not say if they are annotated."""
    (tmp_path / "service.yaml").write_text(SERVICE.format(port="http"))
    for rules in (TargetRules(pods_through_proxy=True), TargetRules(pods_at_host=True)):
        report = lint([str(tmp_path)], rules, reads_services=True)
        assert reasons(report) == [("warning", "not_proxied", 8)]
        assert (report.targets, report.unannotated, report.exit_code) == (0, 0, 0)


def test_services_of_lists_and_rendered_charts_are_decided(tmp_path: Path) -> None:
    """As `kubectl get -o yaml` and `helm template` print them, beside Pods and other kinds."""
    (tmp_path / "pod.yaml").write_text(PORTLESS)
    indented = SERVICE.format(port="none").replace("\n", "\n    ")
    chart = (
        "---\n# Source: chart/templates/service.yaml" + SERVICE.format(port="x") + "---\nkind: ConfigMap\n"
    )
    (tmp_path / "list.yaml").write_text(f"kind: List\nitems:\n  -{indented[4:]}\n")
    (tmp_path / "rendered.yaml").write_text(chart)
    report = lint([str(tmp_path)], RULES, reads_services=True)
    assert [(Path(one.file).name, one.reason) for one in report.findings] == [
        ("list.yaml", "unknown_port_name"),
        ("pod.yaml", "no_port"),
        ("rendered.yaml", "unknown_port_name"),
    ]


def test_service_that_is_not_watched_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only DISCOVER with services reads Services, so that nothing of them is rejected otherwise."""
    file = tmp_path / "service.yaml"
    file.write_text(SERVICE.format(port="99999"))
    assert main(["lint", str(file)], {}) == 0
    assert "warning: Service shop/web: not_watched" in capsys.readouterr().out
    assert main(["lint", str(file)], {"DISCOVER": "pods,nodes,services"}) == 3
    assert "error: Service shop/web: invalid_port" in capsys.readouterr().out
    file.write_text("apiVersion: serving.knative.dev/v1" + SERVICE.format(port="99999")[15:])
    assert main(["lint", str(file)], {"DISCOVER": "pods,nodes,services"}) == 0
