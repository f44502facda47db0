"""`plan`, `explain`, `lint` and the daemon decide one way about 500 odd objects."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from k8s_consul_registrar.admin.explain import ExplainedObject, Explainer
from k8s_consul_registrar.admin.target_groups import GroupEncoder
from k8s_consul_registrar.commands.lint import ERROR, lint
from k8s_consul_registrar.commands.plan import compared
from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.kube.objects import decode_object
from k8s_consul_registrar.model import Kind, ObjectKey, Source
from k8s_consul_registrar.registrar.observed import AsDesired
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.targets.endpoints import endpoints_key
from k8s_consul_registrar.targets.meta import EXTRA_KEYS
from k8s_consul_registrar.targets.scrape_config import socket_address
from k8s_consul_registrar.wiring.registrar import Wiring
from support.controller_lab import ControllerLab
from support.memory import NAMESPACES, NODES, PODS, SERVICES, SLICES
from unit.targets.test_golden import PATHS, Dice, odd_node, odd_pod

# Pods, Nodes and Services.
ALL, SOME = (380, 40, 80), (100, 20, 60)
META = {
    "EXTRA_META": ",".join(EXTRA_KEYS),
    "POD_ANNOTATIONS_AS_META": "note",
    "NAMESPACE_LABELS_AS_META": "team",
    "NODE_LABELS_AS_META": "pool",
}
# Few places, of which none is taken.
FULL = {"MAX_TARGETS_PER_NAMESPACE": "12", "QUOTA_REMOVE": "true"}
SIX = {"POD_IP_FAMILY": "ipv6", "NODE_IP_FAMILY": "ipv6"}
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
FAMILIES = (["IPv4"], ["IPv6"], ["IPv4", "IPv6"], ["IPv6", "IPv4"])

Values = dict[str, Any]


def with_more(metadata: Values, dice: Dice) -> None:
    """Give an object more annotations."""
    for name, values in MORE.items():
        if dice.maybe(0.12):
            metadata["annotations"][f"prometheus.io/{name}"] = dice.one(values)


def pod(number: int, dice: Dice) -> Values:
    """Return the manifest of a running Pod, perhaps with more annotations, of one family, or with a long name."""
    body = odd_pod(number, dice)
    with_more(body["metadata"], dice)
    if dice.maybe(0.1):
        body["metadata"]["name"] = f"odd-{number}-".ljust(253, "x")
    if dice.maybe(0.03):
        body["spec"]["containers"] = None
    for name in ("podIPs", "hostIPs"):
        if dice.maybe(0.2):
            del body["status"][name]
    for port in (body["spec"]["containers"] or [{}])[0].get("ports", []):
        if dice.maybe(0.3):
            del port["hostPort"]
    return {"apiVersion": "v1", "kind": "Pod", **body}


def node(number: int, dice: Dice) -> Values:
    """Return the manifest of a Node."""
    return {"apiVersion": "v1", "kind": "Node", **odd_node(number, dice)}


def service(number: int, dice: Dice) -> Values:
    """Return the manifest of a Service, annotated like the Pods; some select Pods."""
    ports = [
        {"name": f"p{at}", "port": dice.one((80, 81, 9102)), "protocol": dice.one(("TCP", "TCP", "UDP"))}
        for at in range(dice.below(4))
    ]
    metadata = odd_pod(number, dice)["metadata"]
    with_more(metadata, dice)
    metadata |= {"name": f"svc-{number}", "namespace": "shop"}
    spec = {"ports": ports, "ipFamilies": dice.one(FAMILIES)}
    if dice.maybe():
        spec["selector"] = {"app": "web"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def endpoints_of(service: Values, number: int) -> list[Values]:
    """Return a slice with one endpoint for each family of a Service."""
    return [
        a_slice(service, family, {"addresses": [address.format(number)], "conditions": {"ready": True}})
        for family, address in (("IPv4", "203.0.113.{}"), ("IPv6", "2001:db8:3::{}"))
        if family in service["spec"]["ipFamilies"]
    ]


def odd_endpoints_of(service: Values, number: int, dice: Dice) -> list[Values]:
    """Return slices that a manifest does not tell: with names, without ports, and with endpoints that cannot be scraped."""
    bad, unready, good = (
        {"addresses": [dice.one(("0.0.0.0", "224.0.0.1", "nonsense"))]},
        {"addresses": [f"198.18.1.{number}"], "conditions": {"ready": False}},
        {"addresses": [f"198.18.2.{number}"], "conditions": {"ready": False, "serving": True}},
    )
    parts = [
        a_slice(service, "IPv4", bad, unready, good),
        a_slice(service, "FQDN", {"addresses": ["db.example"]}),
        a_slice(service, "IPv6", {"addresses": [f"2001:db8:4::{number}"]}) | {"ports": None},
    ]
    return [part for part in parts if dice.maybe(0.7)]


def a_slice(service: Values, family: str, *endpoints: Values) -> Values:
    """Return one slice of a Service; where that selects Pods, each endpoint is one."""
    name = service["metadata"]["name"]
    if "selector" in service["spec"]:
        endpoints = tuple(
            {**one, "targetRef": {"kind": "Pod", "name": f"{name}-{at}"}, "nodeName": "node-1"}
            for at, one in enumerate(endpoints)
        )
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-{family.lower()}",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": family,
        "ports": service["spec"]["ports"],
        "endpoints": list(endpoints),
    }


class Cluster:
    """Odd objects; of some Services no manifest tells the endpoints."""

    def __init__(self, counts: tuple[int, int, int]) -> None:
        dice = Dice(sum(counts))
        pods, nodes, services = counts
        self.pods = [pod(number, dice) for number in range(pods)]
        self.nodes = [node(number, dice) for number in range(nodes)]
        self.services = [service(number, dice) for number in range(services)]
        self.slices: list[Values] = []
        self.untold: list[Values] = []
        for number, one in enumerate(self.services):
            if number % 4 == 3:
                self.untold.append(one)
                self.slices += odd_endpoints_of(one, number, dice)
            else:
                self.slices += endpoints_of(one, number)


def by_lint(folder: Path, body: Values, wiring: Wiring) -> tuple[str, int]:
    """Return the reason for which lint finds a manifest to be no target, empty if it is, and its number of targets."""
    file = folder / "manifest.json"
    file.write_text(json.dumps(body))
    report = lint([str(file)], wiring.targets, reads_services=True)
    reasons = [
        one.reason for one in report.findings if one.level == ERROR or one.reason == Reason.NOT_PROXIED
    ]
    assert len(reasons) <= 1, reasons
    return (reasons[0] if reasons else ""), report.targets


class Daemon:
    """A registrar with a Consul of its own."""

    def __init__(self, wiring: Wiring) -> None:
        self.lab = ControllerLab(
            sources=wiring.settings.sources,
            target_rules=wiring.targets,
            identity=wiring.identity,
            quota=wiring.settings.quota,
            quota_removes=wiring.settings.quota_removes,
        )
        self.explainer = Explainer(self.lab.core, self.lab.cluster, GroupEncoder(), "prometheus.io/", {})

    def put(self, source: Source, bodies: Sequence[Values]) -> list[ObjectKey]:
        """List objects as the API server sends them."""
        items = [decode_object(json.dumps(one).encode(), source.kind) for one in bodies]
        self.lab.cluster.put_list(items, source)  # type: ignore[arg-type]
        return [item.key for item in items if item.key is not None]

    def list_all(self, cluster: Cluster) -> list[ObjectKey]:
        """List a cluster; return the keys of its Nodes, Pods and Services."""
        if NAMESPACES in self.lab.desired.store.statuses():
            self.put(NAMESPACES, [{"metadata": {"name": "shop", "labels": {"team": "a"}}}])
        keys = [*self.put(NODES, cluster.nodes), *self.put(PODS, cluster.pods)]
        self.put(SLICES, cluster.slices)
        return [
            *keys,
            *(endpoints_key(key.namespace, key.name) for key in self.put(SERVICES, cluster.services)),
        ]

    async def plan(self) -> tuple[Mapping[str, str], Counter[str]]:
        """Return what `plan` would register, by ID, and its rejections by reason."""
        plan = await compared(self.lab.core, await self.lab.resync.compare())
        rejected = [one.what.split(": ") for one in plan.lines if one.what.startswith("rejected: ")]
        return {one.id: one.what for one in plan.lines if one.sign == "+"}, Counter(
            words[1] for words in rejected
        )

    def outcome(self) -> tuple[Mapping[str, str], Counter[str]]:
        """Return what it has registered, as `plan` shows that, and its rejections by reason."""
        held = {
            one.id: f"{socket_address(one.address, one.port)} {one.value('metrics_path')}"
            for one in self.lab.consul.held.values()
        }
        rejections = (*self.lab.desired.rejections.values(), *self.lab.status.lost_rejections())
        return held, Counter(one.reason for one in rejections)

    def decision(self, key: ObjectKey) -> tuple[str, int]:
        """Return the reason for which it rejects an object, empty if it does not, and its number of targets."""
        desired = self.lab.desired
        rejection = desired.rejections.get(key)
        if key.kind is Kind.ENDPOINT:
            assert desired.join is not None
            offers = (one for some in desired.join.offers.values() for one in some)
            count = len({one.id for one in offers if one.key == key and one.address})
        else:
            targets = desired.store.get(key)
            count = len(targets) if isinstance(targets, tuple) else 0
        return ("" if rejection is None else rejection.reason), count

    def has_written(self, explained: ExplainedObject, key: ObjectKey) -> bool:
        """Return True if Consul holds every service of an object, for this object."""
        records = [self.lab.observed.get(one.id) for one in explained.services]
        return bool(records) and all(isinstance(one, AsDesired) and one.target.key == key for one in records)


@pytest.mark.parametrize(
    ("counts", "settings"),
    [
        pytest.param(ALL, {}, id="defaults"),
        pytest.param(SOME, {**SIX, **META}, id="ipv6"),
        pytest.param(SOME, FULL, id="full"),
        pytest.param(SOME, {"POD_ADDRESS": "host", "NODE_IP_FAMILY": "ipv4", **META}, id="host"),
        pytest.param(SOME, {"POD_ADDRESS": "proxy", "NODE_IP_FAMILY": "ipv6", **META}, id="proxied"),
    ],
)
async def test_plan_explain_lint_and_the_daemon_decide_one_way_about_odd_objects(
    tmp_path: Path, counts: tuple[int, int, int], settings: dict[str, str]
) -> None:
    """Ports, phases, annotations, addresses, families, slices and names of every kind, on Pods, Nodes and Services."""
    wiring = Wiring(read_registrar({"CLUSTER_NAME": "lab", "DISCOVER": "pods,nodes,services", **settings}))
    cluster, planner, daemon = Cluster(counts), Daemon(wiring), Daemon(wiring)
    planner.list_all(cluster)
    planned = await planner.plan()
    seen: Counter[str] = Counter()
    partly = 0
    async with daemon.lab.running():
        keys = daemon.list_all(cluster)
        await daemon.lab.until_so(lambda: daemon.lab.status.has_synced and daemon.lab.queue.is_drained)
        assert planned == daemon.outcome()
        for body, key in zip([*cluster.nodes, *cluster.pods, *cluster.services], keys, strict=True):
            reason, count = daemon.decision(key)
            if body not in cluster.untold:
                assert by_lint(tmp_path, body, wiring) == (reason, count), (key, body)
            (explained,) = await daemon.explainer.explain(key)
            assert explained.is_target is daemon.has_written(explained, key), (explained, body)
            last = explained.conditions[-1]
            assert (f"rejected: {reason}:" in last.detail) is bool(reason), (explained, body)
            assert (len(explained.services), last.is_met) == (count, count > 0), (explained, body)
            partly += bool(reason) and count > 0
            said = [condition.detail for one in explained.services for condition in one.conditions]
            is_full = any("namespace_full" in one for one in said)
            assert is_full is any(one.id in daemon.lab.status.blocked for one in explained.services)
            other = "full" if is_full else "gives way" if count else last.name
            seen[reason or ("target" if explained.is_target else other)] += 1
    assert (seen["full"] > 0) is (settings is FULL), seen
    assert sum(seen.values()) == sum(counts)
    assert seen["target"] > sum(counts) // 12, seen
    assert len(seen) >= 15, seen
    assert partly or "POD_ADDRESS" in settings, seen
