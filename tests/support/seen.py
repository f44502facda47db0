"""A registrar as the admin endpoints see it, held in memory: for their tests and for pictures of the page."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from k8s_consul_registrar.admin.view import EVERYTHING, About, Owner, Scope, TargetRow, TargetState
from k8s_consul_registrar.consul.codec import MetaKeys
from k8s_consul_registrar.kube.source_state import SourceStatus, Synced
from k8s_consul_registrar.model import Kind, ObjectKey, Rejection, Source
from k8s_consul_registrar.registrar.brake import Held
from k8s_consul_registrar.registrar.decide import Conflict
from k8s_consul_registrar.registrar.status import Activity, Counts, LostAgent, RegistrarStatus
from support.builders import make_service

TEAMS = ("shop", "payments", "search", "billing", "observability", "identity", "checkout", "media")
APPS = ("cart", "catalog", "gateway", "worker", "ledger", "indexer", "sessions", "mailer", "frontend")


def pod_target(
    pod: str, namespace: str = "shop", state: TargetState = TargetState.REGISTERED, **changes: Any
) -> TargetRow:
    """Return a Pod's target; `meta` adds to its meta, `detail` and what a service has may be changed."""
    meta = {
        "cluster": "lab",
        "cluster_uid": "5b0e2f0e-61a4-4a8c-9a53-0d3f4f1f9a11",
        "kind": "pod",
        "managed_by": "k8s-consul-registrar",
        "metrics_path": "/metrics",
        "namespace": namespace,
        "node": "node-1",
        "pod": pod,
        "scheme": "http",
        "shard_path": "shard-1",
    }
    meta |= changes.pop("meta", {})
    detail = changes.pop("detail", "")
    service = make_service(f"pod--{namespace}--{pod}", meta, **changes)
    return TargetRow(service, ObjectKey(Kind.POD, namespace, pod), state, detail)


def node_target(number: int) -> TargetRow:
    """Return a Node's target, at the NodePort of the proxy."""
    address = f"192.0.2.{number % 250 + 1}"
    meta = {
        "cluster": "lab",
        "kind": "node",
        "managed_by": "k8s-consul-registrar",
        "metrics_path": f"/api/v1/nodes/{address}:10250/metrics/cadvisor",
        "node": f"node-{number}",
        "scheme": "http",
        "shard_path": f"shard-{number % 3 + 1}",
    }
    service = make_service(f"node--{address}-{number}", meta, address=address, port=31112)
    return TargetRow(service, ObjectKey(Kind.NODE, "", f"node-{number}"), TargetState.REGISTERED)


def endpoint_target(pod: str, service: str = "web", namespace: str = "shop") -> TargetRow:
    """Return the target of a Pod behind a Service."""
    meta = {"kind": "endpoint", "metrics_path": "/metrics", "namespace": namespace, "node": "node-1"}
    meta |= {"pod": pod, "scheme": "http", "service": service, "managed_by": "k8s-consul-registrar"}
    record = make_service(
        f"svc--{namespace}--{service}--{pod}--9102", meta, name=f"svc--{namespace}--{service}"
    )
    return TargetRow(record, ObjectKey(Kind.ENDPOINT, namespace, service), TargetState.REGISTERED)


def many_targets(count: int) -> dict[str, TargetRow]:
    """Return this many targets of several namespaces by ID, a few of them not registered."""
    found = [node_target(number) for number in range(min(200, count // 50))]
    odd = {7: TargetState.PENDING, 1201: TargetState.REFUSED, 2405: TargetState.CONFLICT}
    problem = {
        TargetState.REFUSED: "403 Permission denied: the token lacks service:write on this name",
        TargetState.CONFLICT: "held by managed_by=terraform",
    }
    for number in range(count - len(found)):
        app, team = APPS[number % len(APPS)], TEAMS[number % len(TEAMS)]
        state = odd.get(number, TargetState.REGISTERED)
        found.append(
            pod_target(
                f"{app}-{number * 2654435761 % 0xFFFFFF:06x}-{number:05x}",
                team,
                state,
                detail=problem.get(state, ""),
                address=f"198.18.{number // 250 % 250}.{number % 250 + 1}",
                port=9100 + number % 7,
                meta={"shard_path": f"shard-{number % 3 + 1}", "node": f"node-{number % 60}"}
                | ({"param_module": "http_2xx"} if number % 11 == 0 else {}),
            )
        )
    return {target.service.id: target for target in found}


def pod_rejection(name: str, reason: str, detail: str, namespace: str = "shop") -> Rejection:
    """Return a rejected Pod, of which Consul still holds a service."""
    return Rejection(ObjectKey(Kind.POD, namespace, name), reason, detail, f"pod--{namespace}--{name}")


@dataclass
class Registrar:
    """A registrar that lists, writes and refuses nothing itself: a test says what there is.

    Like the real one it yields its targets while they change.
    """

    held: dict[str, TargetRow] = field(default_factory=dict)
    rejected: list[Rejection] = field(default_factory=list)
    missing: str = ""
    about: About = field(
        default_factory=lambda: About(
            "lab", "", "agent", "http://127.0.0.1:8500", started_at=time.time() - 7000
        )
    )
    status: RegistrarStatus = field(default_factory=lambda: RegistrarStatus(has_synced=True))
    known: dict[Source, SourceStatus] = field(default_factory=dict)
    holder: str | None = None
    meta_keys: MetaKeys = field(default_factory=MetaKeys)
    owner: Owner = field(default_factory=lambda: Owner("lab", "", "uid-1"))
    generation: int = 1
    walks: int = 0

    def put(self, *targets: TargetRow) -> None:
        """Add or replace targets."""
        self.held.update({target.service.id: target for target in targets})
        self.generation += 1

    def unlisted(self, scope: Scope = EVERYTHING) -> str:
        return self.missing

    def targets(self) -> Iterator[TargetRow]:
        self.walks += 1
        for service_id in list(self.held):
            if target := self.held.get(service_id):
                yield target

    @property
    def position(self) -> int:
        return self.generation

    def changed_since(self, position: int) -> None:
        return None

    def row(self, service_id: str) -> TargetRow | None:
        return self.held.get(service_id)

    def rejections(self) -> list[Rejection]:
        return self.rejected

    def sources(self) -> Mapping[Source, SourceStatus]:
        return self.known

    def leader(self) -> str | None:
        return self.holder


class Healthy:
    """A daemon in which all is well."""

    def is_alive(self) -> bool:
        return True

    def readiness(self) -> str:
        return ""


def busy_registrar(count: int = 10_000) -> Registrar:
    """Return a registrar of a large cluster on a day when a little of everything is wrong."""
    at, now = time.time(), time.monotonic()
    rejected = [
        pod_rejection("coupons-6f9d7c", "ambiguous_port", "no port is annotated; 8080, 9090 and 9443 could be meant"),
        pod_rejection("recommend-0", "unknown_port_name", "no container port is named 'metrcs'"),
        pod_rejection("import-29471", "no_port", "no port is annotated and no container declares one", "billing"),
        pod_rejection("proxy-5c77", "invalid_scheme", "the scheme 'ftp' is neither http nor https", "media"),
    ]  # fmt: skip
    registrar = Registrar(many_targets(count), rejected, holder="k8s-consul-registrar-7c9d-x2x4p")
    names = tuple(list(registrar.held)[300:1540])
    registrar.status = RegistrarStatus(
        recent=deque(
            (
                Activity(is_resync=False, at=at - 9, counts=Counts(registered=1, seconds=0.004)),
                Activity(is_resync=False, at=at - 64, counts=Counts(3, 1, 3, seconds=0.011)),
                Activity(
                    is_resync=True, at=at - 312, counts=Counts(unchanged=count - 3, refused=1, seconds=0.84)
                ),
            )
        ),
        conflicts={
            "pod--search--ledger-1": Conflict(
                ObjectKey(Kind.POD, "search", "ledger-1"), "managed_by=terraform"
            )
        },
        held=(Held(Source(Kind.POD, "media"), names, now - 20, now + 40),) if names else (),
        lost_agents=(
            LostAgent("worker-a7", now - 1900, now - 1300, {"not_here": 2, "rejected": 1}),
            LostAgent("worker-b2", now - 200, now + 400, {}),
        ),
        has_synced=True,
    )
    registrar.known = {
        Source(kind): SourceStatus(Synced(), listed_at=now - 300, objects=objects)
        for kind, objects in ((Kind.NODE, 200), (Kind.POD, 12_480))
    }
    registrar.about = About(
        "lab",
        "",
        "agent",
        "http://127.0.0.1:8500",
        {
            "CLUSTER_NAME": "lab",
            "CONSUL_ADDRESS": "http://127.0.0.1:8500",
            "CONSUL_HTTP_TOKEN": "set",
            "SHARD_PATHS": "shard-1,shard-2,shard-3",
            "SYNC_PERIOD": "600",
            "NAMESPACES": "",
        },
        at - 7000,
    )
    return registrar
