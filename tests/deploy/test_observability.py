"""Alerts, dashboard and the page on metrics against the metrics that exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.admin.metrics import new_registry
from k8s_consul_registrar.admin.view import TargetState
from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.kube.events import EventOutcome
from k8s_consul_registrar.kube.source_state import CAUSES
from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.proxy.metrics import ProxyCollector
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.proxy.stats import ProxyStats
from k8s_consul_registrar.registrar.decide import Kept
from k8s_consul_registrar.registrar.metrics import Figures, RegistrarCollector, RegistrarMetrics
from k8s_consul_registrar.registrar.orphans import Stays
from k8s_consul_registrar.rotating import LoadStatus
from support.files import ROOT
from support.real_servers import REAL, prometheus_tools
from support.waiting import PATIENCE

DEPLOY = ROOT / "deploy"
ALERTS = DEPLOY / "alerts.yaml"
RULE_TESTS = ROOT / "tests" / "data" / "alerts-test.yaml"
DASHBOARDS = (DEPLOY / "grafana-registrar.json", DEPLOY / "grafana-proxy.json")
RUNBOOKS = "https://docs.example.internal/runbooks.html#"
PAGE = ROOT / "docs" / "metrics.md"
OURS = re.compile(r"\bk8s_consul_registrar_\w+")
STATUS = LoadStatus("CONSUL_CACERT")  # a file in use, so that its metric has a sample
# Seconds: the rule tests take half a minute of a core, and a busy machine has little of one to spare.
PROMTOOL = 20 * PATIENCE
PROCESS = {"process_cpu_seconds_total", "process_resident_memory_bytes"}


class Family(NamedTuple):
    """A metric: its name as samples have it (a histogram's without suffixes), type and labels."""

    name: str
    type: str
    labels: frozenset[str]


def families() -> dict[str, Family]:
    """Return every metric of both modes, as they show them at their start."""
    registry: CollectorRegistry = new_registry("registrar")
    RegistrarMetrics(registry)
    counted = Figures(
        {("pod", "pending"): 0},
        {"no_ip": 0},
        {("pod", "ended"): 0},
        {"pod": 0},
        {"pod": 0.0},
        {"pod": 0},
        {"interval_raised": 0},
    )
    registry.register(RegistrarCollector(lambda: counted))
    stats = ProxyStats(dict.fromkeys(Outcome, 0), 0, 0, 0, 0, 0, 0, 0, 0, 0, nodes_known=True, workers=2)
    found: dict[str, Family] = {}
    for one in (*registry.collect(), *ProxyCollector(lambda: stats, lambda: {"node": 0.0}).collect()):
        name = f"{one.name}_total" if one.type == "counter" else one.name
        labels = frozenset(label for sample in one.samples for label in sample.labels) - {"le"}
        if OURS.match(name):
            found[name] = Family(name, one.type, labels)
    return found


def samples() -> set[str]:
    """Return the names that an expression may use: a histogram's with its suffixes."""
    suffixes = ("_bucket", "_sum", "_count")
    return {
        name + suffix
        for name, family in families().items()
        for suffix in (suffixes if family.type == "histogram" else ("",))
    }


def rules() -> dict[str, dict[str, Any]]:
    """Return every alert by name."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def dashboard_expressions() -> list[str]:
    """Return every query of the dashboards."""
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_kind_that_is_not_looked_at_is_not_shown_as_lost() -> None:
    """With Pods alone there is no figure about Nodes being followed, so that no alert takes it for a fault."""
    registry = CollectorRegistry()
    metrics = RegistrarMetrics(registry)
    for _ in range(2):
        metrics.follows(Kind.NODE, None)
        metrics.follows(Kind.POD, is_followed=True)
    assert registry.get_sample_value("k8s_consul_registrar_source_followed", {"kind": "node"}) is None
    assert registry.get_sample_value("k8s_consul_registrar_source_followed", {"kind": "pod"}) == 1
    metrics.follows(Kind.NODE, is_followed=False)
    assert registry.get_sample_value("k8s_consul_registrar_source_followed", {"kind": "node"}) == 0


def test_page_lists_every_metric_as_it_is() -> None:
    """Name, type and labels of each row are the code's, every metric has one row, and each says what to do."""
    rows = re.findall(
        r"^\| `(k8s_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", PAGE.read_text(), re.MULTILINE
    )
    shown = {
        name: Family(name, kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, _, _ in rows
    }
    assert len(rows) == len(shown)
    assert shown == families()
    assert all(meaning.strip() and remedy.strip() for _, _, _, meaning, remedy in rows)


def test_page_lists_every_value_of_a_label() -> None:
    """Outcomes, states and causes are listed with their meaning, reasons of rejections on the page about them."""
    pages = PAGE.read_text() + (ROOT / "docs" / "annotations.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \| [^|]+ \|$", pages, re.MULTILINE))
    kinds = (Outcome, EventOutcome, Reason, Kept, Stays, TargetState)
    assert listed == {one.value for kind in kinds for one in kind} | set(CAUSES)


def test_alerts_and_dashboard_use_metrics_that_exist() -> None:
    """Every metric named is one the code shows, with labels it has."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    expressions = [*(rule["expr"] for group in groups for rule in group["rules"]), *dashboard_expressions()]
    assert len(expressions) > 30
    for expression in expressions:
        assert set(OURS.findall(expression)) <= samples(), expression
        others = set(re.findall(r"\bprocess_\w+", expression))
        assert others <= PROCESS, expression
        for name, matchers in re.findall(r"(k8s_consul_registrar_\w+)\{([^}]*)\}", expression):
            family = next(one for one in families().values() if name.startswith(one.name))
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) - {
                "cluster",
                "job",
                "instance",
                "le",
            }
            assert labels <= family.labels, expression


def test_dashboard_shows_every_metric() -> None:
    """The dashboards show all our metrics, and each query is about the chosen cluster."""
    assert [one for one in dashboard_expressions() if 'cluster=~"$cluster"' not in one] == []
    shown = {name for expression in dashboard_expressions() for name in OURS.findall(expression)}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} == families().keys()


def test_panel_that_is_empty_while_all_is_well_says_so() -> None:
    """Where every query leaves zeros out, Grafana shows "none" in place of "No data"."""
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]
    for panel in panels:
        queries = [target["expr"] for target in panel.get("targets", ())]
        is_empty = bool(queries) and all(query.endswith("> 0") for query in queries)
        shown = panel["fieldConfig"]["defaults"].get("noValue") if queries else None
        assert shown == ("none" if is_empty else None), panel["title"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_s_panels_do_not_overlap(path: Path) -> None:
    """Each panel has an ID and a place of its own on a grid of 24 columns."""
    board = json.loads(path.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert taken.isdisjoint(cells), panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_every_alert_tells_what_to_do() -> None:
    """Each has a severity, a summary and a description, waits before it fires, and its runbook is a section."""
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbooks.md").read_text(), re.MULTILINE)
    assert {*sections} - {"Objectives"} == rules().keys()
    for name, rule in rules().items():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, name
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == RUNBOOKS + name.lower()
        assert rule["for"], name


def test_every_alert_is_tried_both_ways() -> None:
    """The rule tests make each alert fire once, and keep it quiet once."""
    tried = [
        test for group in yaml.safe_load(RULE_TESTS.read_text())["tests"] for test in group["alert_rule_test"]
    ]
    fires = sorted(test["alertname"] for test in tried if test.get("exp_alerts"))
    quiet = sorted(test["alertname"] for test in tried if not test.get("exp_alerts"))
    assert fires == quiet == sorted(rules())


def test_operator_s_rules_are_the_same() -> None:
    """The PrometheusRule of the overlay holds the groups of `alerts.yaml`; `make docs` copies them."""
    rule = yaml.safe_load((DEPLOY / "overlays" / "prometheus-rule" / "prometheus-rule.yaml").read_text())
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text())


@REAL
@pytest.mark.timeout(int(3 * PROMTOOL))
class TestRealPromtool:
    """The verdicts of promtool."""

    @pytest.fixture(params=["consul_sd", pytest.param("http_sd", marks=pytest.mark.long)])
    def promtool(self, request: pytest.FixtureRequest) -> Path:
        """Return the promtool of each Prometheus there is: 2.24 and 2.42."""
        return prometheus_tools(request.param).promtool

    def run(self, *command: str | Path) -> None:
        """Run promtool and fail with what it says."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROMTOOL, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.long
    def test_rules(self, promtool: Path) -> None:
        """The rules are sound and each alert fires when it should and only then."""
        self.run(promtool, "check", "rules", ALERTS)
        self.run(promtool, "test", "rules", RULE_TESTS)

    @pytest.mark.long
    def test_rule_changed_on_purpose_is_caught(self, promtool: Path, tmp_path: Path) -> None:
        """The rule tests can fail: with one threshold turned round they do."""
        (tmp_path / "deploy").mkdir()
        (tmp_path / "tests" / "data").mkdir(parents=True)
        changed = ALERTS.read_text().replace(
            "k8s_consul_registrar_consul_up == 0", "k8s_consul_registrar_consul_up == 1"
        )
        (tmp_path / "deploy" / "alerts.yaml").write_text(changed)
        copy = shutil.copy(RULE_TESTS, tmp_path / "tests" / "data")
        with pytest.raises(AssertionError, match="RegistrarConsulUnusable"):
            self.run(promtool, "test", "rules", copy)

    def test_dashboard_s_queries_parse(self, promtool: Path, tmp_path: Path) -> None:
        """Each query is PromQL once Grafana's variables are filled in."""
        rules = []
        for number, expression in enumerate(dashboard_expressions()):
            filled = expression.replace("$__rate_interval", "5m")
            for variable in ("$cluster", "$job", "$instance"):
                filled = filled.replace(variable, ".*")
            assert "$" not in filled
            rules.append({"record": f"panel:{number}", "expr": filled})
        file = tmp_path / "panels.yaml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
        self.run(promtool, "check", "rules", file)
