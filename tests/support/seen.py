"""A registrar as the admin endpoints see it, held in memory: for their tests and for pictures of the page."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from k8s_consul_registrar.admin.view import (
    EVERYTHING,
    Scope,
    SeenBrake,
    SeenConflict,
    SeenConsul,
    SeenLeader,
    SeenLostAgent,
    SeenPass,
    SeenSource,
    SeenTarget,
    Setting,
    Status,
    TargetState,
)
from k8s_consul_registrar.model import Kind, ObjectKey, Rejection
from support.builders import make_service

TEAMS = ("shop", "payments", "search", "billing", "observability", "identity", "checkout", "media")
APPS = ("cart", "catalog", "gateway", "worker", "ledger", "indexer", "sessions", "mailer", "frontend")


def pod_target(
    pod: str, namespace: str = "shop", state: TargetState = TargetState.REGISTERED, **changes: Any
) -> SeenTarget:
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
    return SeenTarget(service, ObjectKey(Kind.POD, namespace, pod), state, detail)


def node_target(number: int) -> SeenTarget:
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
    return SeenTarget(service, ObjectKey(Kind.NODE, "", f"node-{number}"), TargetState.REGISTERED)


def many_targets(count: int) -> dict[str, SeenTarget]:
    """Return so many targets of several namespaces by ID, a few of them not registered."""
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

    held: dict[str, SeenTarget] = field(default_factory=dict)
    rejected: list[Rejection] = field(default_factory=list)
    missing: str = ""
    now: Status = field(
        default_factory=lambda: Status(
            version="0.1.0",
            cluster="lab",
            instance="",
            started_at=time.time() - 7000,
            unready="",
            leader=SeenLeader(),
            consul=SeenConsul("agent", "http://127.0.0.1:8500"),
        )
    )
    generation: int = 1
    walks: int = 0

    def put(self, *targets: SeenTarget) -> None:
        """Add or replace targets."""
        self.held.update({target.service.id: target for target in targets})
        self.generation += 1

    def unlisted(self, scope: Scope = EVERYTHING) -> str:
        return self.missing

    def targets(self) -> Iterator[SeenTarget]:
        self.walks += 1
        for service_id in list(self.held):
            if target := self.held.get(service_id):
                yield target

    def rejections(self) -> Iterable[Rejection]:
        return self.rejected

    def status(self) -> Status:
        return self.now


def busy_registrar(count: int = 10_000) -> Registrar:
    """Return a registrar of a large cluster on a day when a little of everything is wrong."""
    at = time.time()
    rejected = [
        pod_rejection("coupons-6f9d7c", "ambiguous_port", "no port is annotated; 8080, 9090 and 9443 could be meant"),
        pod_rejection("recommend-0", "unknown_port_name", "no container port is named 'metrcs'"),
        pod_rejection("import-29471", "no_port", "no port is annotated and no container declares one", "billing"),
        pod_rejection("proxy-5c77", "invalid_scheme", "the scheme 'ftp' is neither http nor https", "media"),
    ]  # fmt: skip
    registrar = Registrar(many_targets(count), rejected)
    passes = (
        SeenPass("changes", "success", at - 9, 0.004, {"registered": 1}),
        SeenPass("changes", "success", at - 64, 0.011, {"registered": 3, "updated": 1, "deregistered": 3}),
        SeenPass("full", "partial", at - 312, 0.84, {"unchanged": count - 3, "refused": 1}),
        SeenPass("full", "failure", at - 915, 10.2, problem="Consul is unreachable: connection refused"),
    )
    names = tuple(list(registrar.held)[300:305])
    registrar.now = replace(
        registrar.now,
        leader=SeenLeader("leader", "k8s-consul-registrar-7c9d-x2x4p"),
        sources=(
            SeenSource("nodes", is_followed=True, listed_at=at - 300, objects=200),
            SeenSource("pods", is_followed=True, listed_at=at - 300, objects=12_480),
        ),
        conflicts=(
            SeenConflict("pod--search--ledger-1", ObjectKey(Kind.POD, "search", "ledger-1"), "managed_by=terraform"),
        ),
        brakes=(SeenBrake("pods of media", 1240, names, at - 20, at + 40),),
        lost_agents=(
            SeenLostAgent("worker-a7", at - 1900, at - 1300, {"not_here": 2, "rejected": 1}),
            SeenLostAgent("worker-b2", at - 200, at + 400),
        ),
        passes=passes,
        settings=(
            Setting("CLUSTER_NAME", "lab"),
            Setting("CONSUL_ADDRESS", "http://127.0.0.1:8500"),
            Setting.secret("CONSUL_HTTP_TOKEN", is_set=True),
            Setting("SHARD_PATHS", "shard-1,shard-2,shard-3"),
            Setting("SYNC_PERIOD", "600"),
            Setting("NAMESPACES", ""),
        ),
    )  # fmt: skip
    return registrar
