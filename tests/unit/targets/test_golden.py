"""500 odd Pods and Nodes give the same services, byte for byte, as before annotations beyond the first seven."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from k8s_consul_registrar.consul.codec import encode_registration
from k8s_consul_registrar.kube.objects import decode_object
from k8s_consul_registrar.model import Kind, Rejection, Source
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.observed import AsDesired, ObservedState
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.targets.resolve import resolve
from k8s_consul_registrar.wiring.registrar import Wiring

T = TypeVar("T")

PODS, NODES = 450, 50
GROUP = 10  # objects for each line of the file
GOLDEN = Path(__file__).with_name("golden.txt")
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "defaults": {},
    "shaped": {
        "POD_LABELS_AS_META": "app,team",
        "SERVICE_TAGS": "cluster={cluster},{label:app}",
        "SERVICE_ID_PREFIX": "lab-",
        "POD_SERVICE_NAME": "{cluster}-pods",
    },
    "proxied": {"POD_ADDRESS": "proxy", "PROXY_SCHEME": "https"},
}

PATHS = ("/m", "m", "?a=1&b=x%20y", " /x ") * 4 + (
    "/m",
    "m",
    "?a=1&b=x%20y",
    "/m?a=1&a=2",
    "//host/m",
    "http://h/m",
    " /x ",
    "",
    "/é?ü=ß",
    "/" + "x" * 511,
)
PORT_TEXTS = ("80", "81, 80,81", " 9102 ") * 5 + (
    "80",
    "web",
    "80,81",
    "81, 80,81",
    "0",
    "70000",
    "",
    " 9102 ",
    "none",
    "80,",
    "٣",
    "00080",
)
PARAMS = ("module", "a", "b", "x.y", "long")
VALUES = ("x", "", "é", "a b", "\x07", "v" * 513, "v" * 512)


class Dice:
    """Choices that are the same in every Python: only `random()` is promised to stay as it is."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def below(self, count: int) -> int:
        """Return a number from 0 to `count - 1`."""
        return int(self._random.random() * count)

    def one(self, choices: Sequence[T]) -> T:
        """Return one of some choices."""
        return choices[self.below(len(choices))]

    def maybe(self, chance: float = 0.5) -> bool:
        """Return True with this chance."""
        return self._random.random() < chance


def odd_pod(number: int, dice: Dice) -> dict[str, Any]:
    """Return the JSON of a Pod; most are annotated to be scraped."""
    annotations = {"prometheus.io/scrape": dice.one(("true",) * 24 + ("false", "True", "")), "note": "other"}
    if dice.maybe():
        annotations["prometheus.io/path"] = dice.one(PATHS)
    if dice.maybe(0.8):
        annotations["prometheus.io/port"] = dice.one(PORT_TEXTS)
    if dice.maybe(0.4):
        annotations["prometheus.io/scheme"] = dice.one(("http", "https", "HTTPS", "", "https", "http", "ftp"))
    for _ in range(dice.one((0, 0, 0, 1, 2))):
        annotations[f"prometheus.io/param-{dice.one(PARAMS)}"] = dice.one(VALUES)
    names = ("web", "metrics", "prom", "http-metrics", "debug", "")
    ports = [
        {
            "name": dice.one(names),
            "containerPort": dice.one((80, 81, 8080, 9102)),
            "protocol": dice.one(("TCP", "TCP", "UDP")),
            "hostPort": 20_000 + number,
        }
        for _ in range(dice.below(4))
    ]
    ip = dice.one(
        (f"10.1.{number // 250}.{number % 250 + 1}",) * 6 + (f"2001:DB8::{number + 1:x}", "", "0.0.0.0")
    )
    return {
        "metadata": {
            "name": f"odd-{number}",
            "namespace": dice.one(("shop", "kube-system")),
            "uid": f"uid-{number}",
            "resourceVersion": "7",
            "creationTimestamp": f"2026-11-{dice.below(28) + 1:02d}T10:00:00Z",
            "labels": {"app": dice.one(("web", "db", "")), "team": "a", "pod-template-hash": "5d4f8c7b9"},
            "annotations": annotations,
            "ownerReferences": [
                {"kind": "ReplicaSet", "name": f"web-{number}-5d4f8c7b9", "controller": True}
            ],
            **({"deletionTimestamp": "2026-11-28T10:00:00Z"} if dice.maybe(0.1) else {}),
        },
        "spec": {
            "nodeName": f"node-{dice.below(NODES + 5)}",
            "hostNetwork": dice.maybe(0.2),
            "containers": [{"name": "main", "ports": ports}],
            "initContainers": [{"name": "side", "restartPolicy": "Always", "ports": ports[:1]}],
        },
        "status": {
            "phase": dice.one(("Running",) * 24 + ("Unknown", "Unknown", "Pending", "Succeeded", "Failed")),
            "podIP": ip,
            "podIPs": [{"ip": ip}, {"ip": f"2001:db8:1::{number + 1:x}"}],
            "hostIP": dice.one((f"192.0.2.{number % 250 + 1}", "2001:db8:2::1", "")),
            "hostIPs": [{"ip": "192.0.2.1"}, {"ip": "2001:db8:2::1"}],
            "conditions": [{"type": "Ready", "status": dice.one(("True", "False"))}],
        },
    }


def odd_node(number: int, dice: Dice) -> dict[str, Any]:
    """Return the JSON of a Node, perhaps without an address, with another's, or on Windows."""
    kinds = ("InternalIP", "InternalIP", "ExternalIP", "Hostname")
    addresses = [
        {
            "type": dice.one(kinds),
            "address": dice.one(
                (f"192.0.2.{dice.below(60) + 1}", f"2001:db8:2::{number + 1:x}", "node.example")
            ),
        }
        for _ in range(dice.below(4))
    ]
    labels = {"kubernetes.io/os": dice.one(("linux", "linux", "windows")), "pool": "a"}
    if dice.maybe(0.8):
        labels["topology.kubernetes.io/zone"] = dice.one(("zone-a", "zone-b", ""))
    return {
        "metadata": {
            "name": f"node-{number}",
            "uid": f"uid-node-{number}",
            "resourceVersion": "7",
            "creationTimestamp": f"2026-10-{dice.below(28) + 1:02d}T10:00:00Z",
            "labels": labels,
        },
        "status": {
            "addresses": addresses,
            "daemonEndpoints": {"kubeletEndpoint": {"Port": dice.one((10250, 10260, 0))}},
            "conditions": [{"type": "Ready", "status": dice.one(("True", "False"))}],
            "nodeInfo": {"operatingSystem": labels["kubernetes.io/os"]},
        },
    }


def texts_of(settings: Mapping[str, str]) -> list[str]:
    """Return what became of each object: its registrations as Consul gets them, or its rejection."""
    wiring = Wiring(read_registrar({"CLUSTER_NAME": "lab", **settings}))
    desired = DesiredState(
        wiring.settings.selection.sources, partial(resolve, rules=wiring.targets), ObservedState()
    )
    dice = Dice(15)
    objects = [(Kind.NODE, odd_node(number, dice)) for number in range(NODES)]
    objects += [(Kind.POD, odd_pod(number, dice)) for number in range(PODS)]
    items = [decode_object(json.dumps(body).encode(), kind) for kind, body in objects]
    for (kind, _), item in zip(objects, items, strict=True):
        desired.store.put(Source(kind), item)
    assert all(item.key is not None for item in items)
    resolved = [desired.store.get(item.key) for item in items if item.key is not None]
    return [
        f"{one.reason} {one.detail}"
        if isinstance(one, Rejection)
        else " ".join(
            registrations(
                (AsDesired(target, "", "uid-1") for target in (one if isinstance(one, tuple) else ())),
                wiring.identity,
            )
        )
        for one in resolved
    ]


def registrations(entries: Iterable[AsDesired], identity: Identity) -> list[str]:
    """Return the registrations of some services."""
    return [encode_registration(one.service(identity)).decode("utf-8") for one in entries]


def digests() -> list[str]:
    """Return a line for each group of objects under each of the settings."""
    lines = []
    for name, settings in SETTINGS.items():
        texts = texts_of(settings)
        for start in range(0, len(texts), GROUP):
            joined = "\n".join(texts[start : start + GROUP])
            lines.append(f"{name} {start} {hashlib.blake2b(joined.encode(), digest_size=6).hexdigest()}")
    return lines


def test_500_odd_objects_without_new_settings_or_annotations_give_the_services_they_gave() -> None:
    """The file was written by the code before numbered ports, intervals, address families and node paths."""
    assert digests() == GOLDEN.read_text(encoding="ascii").splitlines()


def test_odd_objects_of_the_golden_file_are_targets_and_rejections_of_many_kinds() -> None:
    """Otherwise the file would compare little."""
    texts = texts_of({})
    rejected = {text.split()[0] for text in texts if text and not text.startswith("{")}
    assert sum(text.startswith("{") for text in texts) > 150
    assert len(rejected) >= 11, rejected


if __name__ == "__main__":
    GOLDEN.write_text("".join(f"{line}\n" for line in digests()), encoding="ascii")
