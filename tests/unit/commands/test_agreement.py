"""`explain`, `lint` and the daemon decide one way about 500 odd objects."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from k8s_consul_registrar.admin.explain import ExplainedObject, Explainer
from k8s_consul_registrar.admin.target_groups import GroupEncoder
from k8s_consul_registrar.commands.lint import ERROR, lint
from k8s_consul_registrar.kube.objects import decode_object
from k8s_consul_registrar.model import Kind, ObjectKey, Source
from k8s_consul_registrar.registrar.observed import AsDesired
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.targets.endpoints import endpoints_key
from k8s_consul_registrar.wiring.registrar import Wiring
from support.controller_lab import ControllerLab
from support.memory import NODES, PODS, SERVICES, SLICES
from unit.targets.test_golden import PATHS, Dice, odd_node, odd_pod

COUNTS = {"pods": 380, "nodes": 40, "services": 80}
WIRING = Wiring(read_registrar({"CLUSTER_NAME": "lab", "DISCOVER": "pods,nodes,services"}))
# What the golden Pods do not have: each is odd in a way of its own.
MORE = {
    "port2": ("81", "web", "0", ""),
    "path2": PATHS,
    "scheme2": ("https", "ftp"),
    "scrape-interval": ("30s", "1m30s", "5", "0s", "soon"),
    "scrape-timeout": ("10s", "2m", "-1s"),
    "scrape-slow": ("true", "yes"),
    "ip-family": ("ipv4", "ipv6", "ipv5"),
}

Values = dict[str, Any]


def pod(number: int, dice: Dice) -> Values:
    """Return the manifest of a running Pod, some with more annotations or a name as long as names can be."""
    body = odd_pod(number, dice)
    for name, values in MORE.items():
        if dice.maybe(0.12):
            body["metadata"]["annotations"][f"prometheus.io/{name}"] = dice.one(values)
    if dice.maybe(0.1):
        body["metadata"]["name"] = f"odd-{number}-".ljust(253, "x")
    if dice.maybe(0.03):
        body["spec"]["containers"] = None
    return {"apiVersion": "v1", "kind": "Pod", **body}


def node(number: int, dice: Dice) -> Values:
    """Return the manifest of a Node."""
    return {"apiVersion": "v1", "kind": "Node", **odd_node(number, dice)}


def service(number: int, dice: Dice) -> Values:
    """Return the manifest of a Service, annotated like the golden Pods."""
    ports = [
        {"name": f"p{at}", "port": dice.one((80, 81, 9102)), "protocol": dice.one(("TCP", "TCP", "UDP"))}
        for at in range(dice.below(4))
    ]
    metadata = odd_pod(number, dice)["metadata"]
    metadata |= {"name": f"svc-{number}", "namespace": "shop"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"ports": ports, "ipFamilies": ["IPv4"]},
    }


def endpoints_of(service: Values, number: int) -> Values:
    """Return a slice with one endpoint of a Service."""
    name = service["metadata"]["name"]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-1",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "ports": service["spec"]["ports"],
        "endpoints": [{"addresses": [f"203.0.113.{number}"], "conditions": {"ready": True}}],
    }


def by_lint(folder: Path, body: Values) -> tuple[str, int]:
    """Return the reason for which lint rejects a manifest, empty if it does not, and its number of targets."""
    file = folder / "manifest.json"
    file.write_text(json.dumps(body))
    report = lint([str(file)], WIRING.targets, reads_services=True)
    reasons = [one.reason for one in report.findings if one.level == ERROR]
    assert len(reasons) <= 1, reasons
    return (reasons[0] if reasons else ""), report.targets


class Daemon:
    """A registrar that has written what it wants of these objects."""

    def __init__(self) -> None:
        self.lab = ControllerLab(
            sources=(NODES, PODS, SERVICES, SLICES), target_rules=WIRING.targets, identity=WIRING.identity
        )
        self.explainer = Explainer(self.lab.core, self.lab.cluster, GroupEncoder(), "prometheus.io/", {})

    def list(self, source: Source, bodies: list[Values]) -> list[ObjectKey]:
        """List objects as the API server sends them."""
        items = [decode_object(json.dumps(one).encode(), source.kind) for one in bodies]
        self.lab.cluster.put_list(items, source)  # type: ignore[arg-type]
        return [item.key for item in items if item.key is not None]

    def decision(self, key: ObjectKey) -> tuple[str, int]:
        """Return the reason for which it rejects an object, empty if it does not, and its number of targets."""
        desired = self.lab.desired
        rejection = desired.rejections.get(key)
        if key.kind is Kind.ENDPOINT:
            assert desired.join is not None
            offers = (one for some in desired.join.offers.values() for one in some)
            count = len({one.id for one in offers if one.key == key})
        else:
            targets = desired.store.get(key)
            count = len(targets) if isinstance(targets, tuple) else 0
        return ("" if rejection is None else rejection.reason), count

    def has_written(self, explained: ExplainedObject, key: ObjectKey) -> bool:
        """Return True if Consul holds every service of an object, for this object."""
        records = [self.lab.observed.get(one.id) for one in explained.services]
        return bool(records) and all(isinstance(one, AsDesired) and one.target.key == key for one in records)


async def test_explain_lint_and_the_daemon_decide_one_way_about_500_odd_objects(tmp_path: Path) -> None:
    """Ports, phases, annotations, addresses and names of every kind, on Pods, Nodes and Services."""
    daemon, dice = Daemon(), Dice(500)
    pods = [pod(number, dice) for number in range(COUNTS["pods"])]
    nodes = [node(number, dice) for number in range(COUNTS["nodes"])]
    services = [service(number, dice) for number in range(COUNTS["services"])]
    assert sum(COUNTS.values()) == 500
    seen: Counter[str] = Counter()
    async with daemon.lab.running():
        keys = [*daemon.list(NODES, nodes), *daemon.list(PODS, pods)]
        daemon.list(SLICES, [endpoints_of(one, number) for number, one in enumerate(services)])
        keys += [endpoints_key(key.namespace, key.name) for key in daemon.list(SERVICES, services)]
        await daemon.lab.until_so(lambda: daemon.lab.status.has_synced and daemon.lab.queue.is_drained)
        for body, key in zip([*nodes, *pods, *services], keys, strict=True):
            reason, count = daemon.decision(key)
            assert by_lint(tmp_path, body) == (reason, count), (key, body)
            (explained,) = await daemon.explainer.explain(key)
            assert explained.is_target is daemon.has_written(explained, key), (explained, body)
            last = explained.conditions[-1]
            assert last.detail.startswith(f"rejected: {reason}:") is bool(reason), (explained, body)
            assert (len(explained.services), last.is_met) == (count, count > 0), (explained, body)
            seen[reason or ("target" if explained.is_target else "gives way" if count else last.name)] += 1
    assert seen["target"] > 100, seen
    assert len(seen) >= 15, seen
