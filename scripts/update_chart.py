"""Write what the Helm chart derives: its schema, its table of values, its alerts; `--check` only compares."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from k8s_consul_registrar.settings.consul import BACKENDS
from k8s_consul_registrar.settings.reading import settings_of
from k8s_consul_registrar.settings.reference import properties

# Helm before 3.18 knows no later draft.
DRAFT = "http://json-schema.org/draft-07/schema#"
ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "k8s-consul-registrar"
ALERTS = ROOT / "deploy" / "alerts.yaml"
RULE = ROOT / "deploy" / "overlays" / "prometheus-rule" / "prometheus-rule.yaml"
RULE_HEAD = """\
# Written by `make docs` from deploy/alerts.yaml.
# CHANGE: https://docs.example.internal in each runbook_url, to the place where you publish the site of `make docs`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: k8s-consul-registrar
  namespace: default
spec:
"""
COMMENT = re.compile(r"\s*# -- (.+)")
MARKED = re.compile(r"(<!-- values -->\n).*?(<!-- end of values -->\n)", re.DOTALL)
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
NODE_PORT = {"anyOf": [PORT, {"enum": ["", None]}]}
# What the type of a default does not say, by the path of the value or by its last part.
SPECIAL: dict[str, dict[str, Any]] = {
    "clusterName": {"type": "string", "pattern": r"^[A-Za-z0-9._-]{0,50}$"},
    "consul.backend": {"enum": list(BACKENDS)},
    "consul.agent.nodeId": {"type": "string", "pattern": "^([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?$"},
    "registrar.emitEvents": {"enum": ["none", "problems", "all"]},
    "image.digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "nodePort": NODE_PORT,
    "port": PORT,
    "priorityClass.value": {"type": "integer", "maximum": 1_000_000_000},
    "proxy.service.nodePort": PORT,
    "replicas": {"type": "integer", "minimum": 0},
    "resources": {"type": "object"},
    "type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
}
TYPES = {bool: "boolean", int: "integer", str: "string", dict: "object"}


def schema_of(value: Any, path: str, comments: dict[str, str]) -> dict[str, Any]:
    """Return the schema of the value at a path, from its default and from `SPECIAL`."""
    described = {"description": comments[path].replace("`", "")} if path in comments else {}
    last = path.rpartition(".")[2]
    if last == "settings":
        mode = path.partition(".")[0]
        return {
            "type": "object",
            **described,
            "additionalProperties": False,
            "properties": for_helm(properties(settings_of(mode))),
        }
    if found := SPECIAL.get(path, SPECIAL.get(last)):
        return {**found, **described}
    if isinstance(value, dict) and value:
        inner = {key: schema_of(each, f"{path}.{key}".lstrip("."), comments) for key, each in value.items()}
        return {"type": "object", **described, "additionalProperties": False, "properties": inner}
    if isinstance(value, list):
        is_text = last in {"retryJoin", "extraArgs", "namespaces", "nodes", "consul"}
        return {"type": "array", **described, "items": {"type": "string" if is_text else "object"}}
    return {"type": TYPES[type(value)], **described}


def for_helm(schema: Any) -> Any:
    """Return a schema without the patterns that Go's regular expressions do not know."""
    if isinstance(schema, dict):
        return {
            key: for_helm(value)
            for key, value in schema.items()
            if not (key == "pattern" and "(?" in value.replace("(?:", ""))
        }
    return [for_helm(one) for one in schema] if isinstance(schema, list) else schema


def comments_of(text: str) -> dict[str, str]:
    """Return the comment before each value, by its path; exits if a value has none."""
    lines = text.splitlines()
    found: dict[str, str] = {}

    def walk(node: yaml.MappingNode, path: str) -> None:
        for key, value in node.value:
            name = f"{path}.{key.value}".lstrip(".")
            if comment := COMMENT.fullmatch(lines[key.start_mark.line - 1]):
                found[name] = comment[1]
            elif isinstance(value, yaml.MappingNode) and value.value:
                walk(value, name)
            else:
                sys.exit(f"values.yaml: {name} has no comment that begins with # --")

    walk(yaml.compose(text), "")
    return found


def table(values: Any, comments: dict[str, str]) -> str:
    """Return the table of all values with their defaults."""
    lines = ["| value | default | meaning |", "|---|---|---|"]
    for path, comment in comments.items():
        value = values
        for part in path.split("."):
            value = value[part]
        meaning = comment.replace("|", "\\|")
        lines.append(f"| `{path}` | `{json.dumps(value)}` | {meaning} |")
    return "\n".join(lines) + "\n"


def written() -> dict[Path, str]:
    """Return the text of each file as it should be."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    values, comments = yaml.safe_load(text), comments_of(text)
    schema = {"$schema": DRAFT, "title": "Values of k8s-consul-registrar", **schema_of(values, "", comments)}
    schema["properties"]["global"] = {"type": "object"}
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    new_table = table(values, comments)
    alerts = ALERTS.read_text(encoding="utf-8")
    groups = alerts[alerts.index("groups:") :]
    return {
        CHART / "values.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        CHART / "README.md": MARKED.sub(lambda marks: f"{marks[1]}{new_table}{marks[2]}", readme),
        CHART / "files" / "alerts.yaml": alerts,
        RULE: RULE_HEAD + "".join(f"  {line}\n" if line else "\n" for line in groups.splitlines()),
    }


def main() -> int:
    """Return 1 if a file was to be checked and is not up to date."""
    is_check = "--check" in sys.argv
    stale = [
        path
        for path, text in written().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if not is_check:
            path.write_text(written()[path], encoding="utf-8")
        print(f"{'not up to date' if is_check else 'updated'}: {path.relative_to(ROOT)}")
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
