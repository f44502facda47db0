"""Pairs of overlays: each builds, and with `network-policy` exactly the ports are open that its Pods use."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from deploy.test_overlays import OVERLAYS
from support.files import DEPLOY

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on PATH")

# Each of these says where Consul is, so one at most is chosen (docs/overlays.md).
PLACES_OF_CONSUL = frozenset({"catalog", "http-sd", "two-replicas"})
# `namespaced` takes the proxy out, which these change.
OF_THE_PROXY = frozenset({"pod-disruption-budget", "priority-class", "proxy-pods"})
POLICY = "network-policy"
REGISTRAR, PROXY = "k8s-consul-registrar", "k8s-consul-registrar-svc"
DNS = {("TCP", 53), ("UDP", 53)}
API_SERVER = {("TCP", 443), ("TCP", 6443)}
KUBELETS = {("TCP", 10250)}
CONSUL_API = {("TCP", 8500), ("TCP", 8501)}
PROXY_PORTS = {("TCP", 31112), ("TCP", 8080)}  # the NodePort, and the Pod that it leads to
AGENT_IN = {("TCP", 8301), ("UDP", 8301)}
AGENT_OUT = {("TCP", 8300), *AGENT_IN}
ANY = {("any", 0)}
Ports = set[tuple[str, int]]


class Open(NamedTuple):
    """The ports that a Pod may be reached at, and those it may reach."""

    incoming: Ports
    outgoing: Ports


def goes_together(pair: frozenset[str]) -> bool:
    """Return True unless the documentation rules this pair out."""
    return len(pair & PLACES_OF_CONSUL) < 2 and not ("namespaced" in pair and pair & OF_THE_PROXY)


PAIRS = [pair for pair in itertools.combinations(OVERLAYS, 2) if goes_together(frozenset(pair))]


# The policy before and after each other overlay, and each pair of others beside it.
SETS = [
    (POLICY,),
    *(
        pytest.param((*pair, POLICY), marks=pytest.mark.long, id=" ".join(pair))
        for pair in PAIRS
        if POLICY not in pair
    ),
    *(one for pair in PAIRS if POLICY in pair for one in (pair, pair[::-1])),
]


def build(folder: Path, overlays: tuple[str, ...]) -> list[dict[str, Any]]:
    """Build `deploy/` with these overlays; return the objects."""
    kustomization = {
        "resources": [os.path.relpath(DEPLOY, folder)],
        "components": [os.path.relpath(DEPLOY / "overlays" / name, folder) for name in overlays],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    done = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[:2000]
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def open_ports(pod: Mapping[str, Any], objects: list[dict[str, Any]]) -> Open:
    """Return what all policies that select a Pod let through together."""
    selecting = [
        each["spec"]
        for each in objects
        if each["kind"] == "NetworkPolicy" and selects(each["spec"]["podSelector"], pod["metadata"]["labels"])
    ]
    rules = {way: [rule for one in selecting for rule in one.get(way, ())] for way in ("ingress", "egress")}
    return Open(ports_of(rules["ingress"]), ports_of(rules["egress"]))


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return True if a selector matches these labels."""
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "DoesNotExist"
        if expression["key"] in labels:
            return False
    return bool(selector["matchLabels"].items() <= labels.items())


def ports_of(rules: list[dict[str, Any]]) -> Ports:
    """Return the ports of rules; one without ports opens any."""
    found: Ports = set()
    for rule in rules:
        ports = {(port.get("protocol", "TCP"), port["port"]) for port in rule.get("ports", ())}
        found |= ports or ANY
    return found


def used_ports(deployment: str, pod: Mapping[str, Any]) -> Open:
    """Return what the containers of a Pod declare and what their settings make them reach."""
    containers = {one["name"]: one for one in pod["spec"]["containers"]}
    declared = {
        (port.get("protocol", "TCP"), port["containerPort"])
        for one in containers.values()
        for port in one["ports"]
    }
    given = {one["name"]: one["value"] for one in containers[deployment]["env"] if "value" in one}
    if deployment == PROXY:
        pods = ANY if given.get("PROXY_PODS") == "true" else set()
        return Open(declared, API_SERVER | KUBELETS | pods)
    address = given.get("CONSUL_ADDRESS", "127.0.0.1")
    consul = set() if address.startswith("127.0.0.1") else CONSUL_API
    has_agent = "consul-agent" in containers
    proxy = PROXY_PORTS if given.get("POD_ADDRESS") == "proxy" else set()
    outgoing = DNS | API_SERVER | consul | proxy | (AGENT_OUT if has_agent else set())
    return Open(declared | (AGENT_IN if has_agent else set()), outgoing)


@pytest.mark.parametrize("overlays", SETS, ids=" ".join)
def test_ports_are_open_exactly_where_pods_use_them(overlays: tuple[str, ...], tmp_path: Path) -> None:
    """With the policy any pair of overlays can do what it is for, and nothing more, whatever their order.

    An overlay whose Pods use other ports gives them a label, by which a policy of their own selects them.
    """
    objects = build(tmp_path, overlays)
    pods = {
        each["metadata"]["name"]: each["spec"]["template"] for each in objects if each["kind"] == "Deployment"
    }
    assert REGISTRAR in pods
    for name, pod in pods.items():
        assert open_ports(pod, objects) == used_ports(name, pod), name


def test_pairs_that_do_not_go_together_are_documented() -> None:
    """The page of the variations says which overlays exclude each other."""
    page = (Path(DEPLOY.parent) / "docs" / "overlays.md").read_text()
    assert "Of `catalog`, `http-sd` and `two-replicas`, choose one at most." in page
    assert "`namespaced` has no proxy, so `pod-disruption-budget`, `priority-class` and `proxy-pods`" in page
