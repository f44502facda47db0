"""The registrar as a process: endpoints of annotated Services, and rights that are missing for them."""

import asyncio
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import yaml

from k8s_consul_registrar.registrar.desired import GRACE
from support.cluster import MERGE_PATCH, NAMESPACE, REGISTRAR_RULES, Rules, rule
from support.files import DEPLOY
from support.lab import Lab, SandboxLab, running_lab
from support.processes import LOOPBACK
from support.waiting import unless_late

SERVICES = f"/api/v1/namespaces/{NAMESPACE}/services"
SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
DISCOVER = {"DISCOVER": "pods,nodes,services"}
ONE, TWO = "svc--shop--web--web-1--9102", "svc--shop--web--web-2--9102"
POINTS = ({"ip": "198.51.100.10", "pod": "web-1"}, {"ip": "198.51.100.11", "pod": "web-2"})


def overlay_rules() -> Rules:
    """Return the rules that the overlay grants."""
    documents = yaml.safe_load_all((DEPLOY / "overlays" / "services" / "rbac.yaml").read_text())
    return [one for document in documents for one in document.get("rules", ())]


async def add_service(
    lab: Lab,
    name: str = "web",
    namespace: str = NAMESPACE,
    spec: Mapping[str, Any] | None = None,
    /,
    **annotations: str,
) -> None:
    """Create an annotated Service without a selector."""
    given = {
        "prometheus.io/scrape": "true",
        **{f"prometheus.io/{key}": text for key, text in annotations.items()},
    }
    body = {
        "metadata": {"name": name, "annotations": given},
        "spec": {"ports": [{"port": 80, "name": "metrics"}], **(spec or {})},
    }
    await lab.cluster.request("POST", SERVICES.replace(NAMESPACE, namespace), body)


def slice_body(
    name: str, points: Sequence[Mapping[str, str]], service: str = "web", *, is_ready: bool = True
) -> dict[str, Any]:
    """Return an EndpointSlice; a point without a `pod` is outside the cluster."""
    inside = {"nodeName": "node-a", "zone": "eu-1a"}
    endpoints = [
        {"addresses": [one["ip"]], "conditions": {"ready": is_ready, "serving": is_ready}}
        | ({"targetRef": {"kind": "Pod", "name": one["pod"]}, **inside} if "pod" in one else {})
        for one in points
    ]
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "metrics", "port": 9102, "protocol": "TCP"}],
    }


async def allow(lab: SandboxLab) -> None:
    """Grant what the manifests and the overlay grant."""
    lab.token_file.write_text(await lab.cluster.token([*REGISTRAR_RULES, *overlay_rules()]))


async def test_endpoints_of_a_service_follow_it() -> None:
    """Endpoints come with their Service, change slices without a write, give way to a Pod, and go with it."""
    async with running_lab() as lab:
        await lab.cluster.add_namespace(NAMESPACE)
        await allow(lab)
        await add_service(lab)
        await lab.cluster.request("POST", SLICES, slice_body("web-a", POINTS))
        async with await lab.registrar(SYNC_PERIOD="600", HTTP_SD_PORT="0", **DISCOVER) as daemon:
            await daemon.ready()
            assert lab.has(ONE, TWO)
            meta = lab.meta(ONE)
            names = ("kind", "namespace", "service", "pod", "node", "zone", "metrics_path")
            assert [meta[name] for name in names] == [
                "endpoint", "shop", "web", "web-1", "node-a", "eu-1a", "/metrics",
            ]  # fmt: skip
            url = f"http://{LOOPBACK}:{await daemon.port('http_sd_port')}/sd/targets?kind=endpoint"
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                groups = json.loads(await answer.text())
            assert {one["targets"][0] for one in groups} == {"198.51.100.10:9102", "198.51.100.11:9102"}
            lab.consul.writes.clear()
            await lab.cluster.request("POST", SLICES, slice_body("web-b", POINTS))
            await lab.cluster.request("DELETE", f"{SLICES}/web-a")
            await lab.cluster.add_pod()  # web-1, at the place of the first endpoint
            await daemon.until(lambda: lab.has("pod--shop--web-1", TWO))
            assert lab.writes == ["register pod--shop--web-1", f"deregister {ONE}"]
            assert lab.meta("pod--shop--web-1")["service"] == "web"
            patch = {"metadata": {"annotations": {"prometheus.io/scrape": "false"}}}
            await lab.cluster.request("PATCH", f"{SERVICES}/web", patch, content_type=MERGE_PATCH)
            await daemon.until(lambda: lab.has("pod--shop--web-1"))
            await daemon.until(lambda: "service" not in lab.meta("pod--shop--web-1"))


async def test_endpoints_survive_a_restart_without_a_write_and_absent_ones_go() -> None:
    """Services of an earlier run are known by their meta: equal ones stay, those of absent endpoints are confirmed and removed."""
    async with running_lab() as lab:
        await lab.cluster.add_namespace(NAMESPACE)
        await allow(lab)
        await add_service(lab)
        points = [{"ip": f"198.51.100.{number}", "pod": f"web-{number}"} for number in range(1, 9)]
        await lab.cluster.request("POST", SLICES, slice_body("web-a", points))
        async with await lab.registrar(**DISCOVER) as daemon:
            await daemon.ready()
            assert len(lab.services) == 8
        lab.consul.writes.clear()
        await lab.cluster.request("DELETE", f"{SLICES}/web-a")
        await lab.cluster.request("POST", SLICES, slice_body("web-b", points[1:]))
        async with await lab.registrar(**DISCOVER) as daemon:
            await daemon.until(lambda: ONE not in lab.services)
            assert lab.writes == [f"deregister {ONE}"]


async def test_missing_right_to_slices_is_shown_and_stops_nothing_else() -> None:
    """Without the right the registrar is not ready and says which one to grant, while Pods are registered."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        rules = [*REGISTRAR_RULES, rule("list watch", "services")]
        lab.token_file.write_text(await lab.cluster.token(rules))
        async with await lab.registrar(**DISCOVER) as daemon:
            await daemon.until(lambda: "pod--shop--web-1" in lab.services)
            said = "cannot list; nothing of it is deregistered meanwhile"
            await daemon.until_said(said, "grant list and watch on endpointslices")
            assert (await daemon.admin("/readyz"))[0] == 503
            await allow(lab)
            await daemon.ready()


async def test_namespaces_are_watched_apart() -> None:
    """With NAMESPACES only the Services of these are read, and the endpoints of each come and go."""
    settings = {"NAMESPACES": f"{NAMESPACE},other", "SYNC_PERIOD": "600", **DISCOVER}
    elsewhere = "svc--other--db--192.0.2.7--9102"
    async with running_lab() as lab:
        for namespace in (NAMESPACE, "other", "third"):
            await lab.cluster.add_namespace(namespace)
        await allow(lab)
        await add_service(lab)
        await lab.cluster.request("POST", SLICES, slice_body("web-a", POINTS))
        outside = slice_body("db-a", [{"ip": "192.0.2.7"}], "db")
        for namespace in ("other", "third"):
            await add_service(lab, "db", namespace)
            await lab.cluster.request("POST", SLICES.replace(NAMESPACE, namespace), outside)
        async with await lab.registrar(**settings) as daemon:
            await daemon.ready()
            assert lab.has(ONE, TWO, elsewhere)
            assert "pod" not in lab.meta(elsewhere)
            await lab.cluster.request("DELETE", f"{SLICES.replace(NAMESPACE, 'other')}/db-a")
            await daemon.until(lambda: lab.has(ONE, TWO))
            await lab.cluster.request("PUT", f"{SLICES}/web-a", slice_body("web-a", POINTS[1:]))
            await daemon.until(lambda: lab.has(TWO))


async def test_endpoints_that_are_not_ready_count_only_where_the_service_publishes_them() -> None:
    """A change of publishNotReadyAddresses brings them, and takes them away again."""
    async with running_lab() as lab:
        await lab.cluster.add_namespace(NAMESPACE)
        await allow(lab)
        await add_service(lab, "web", NAMESPACE, {"publishNotReadyAddresses": True})
        await lab.cluster.request("POST", SLICES, slice_body("web-a", POINTS, is_ready=False))
        async with await lab.registrar(SYNC_PERIOD="600", **DISCOVER) as daemon:
            await daemon.ready()
            assert lab.has(ONE, TWO)
            for publishes, ids in ((False, ()), (True, (ONE, TWO))):
                patch = {"spec": {"publishNotReadyAddresses": publishes}}
                await lab.cluster.request("PATCH", f"{SERVICES}/web", patch, content_type=MERGE_PATCH)
                await daemon.until(functools.partial(lab.has, *ids))


async def test_pods_behind_the_proxy_are_reached_only_by_their_own_annotations() -> None:
    """An annotated Pod is one target, another endpoint is rejected, and one outside is scraped directly."""
    outside = "svc--shop--web--192.0.2.7--9102"
    async with running_lab() as lab:
        await allow(lab)
        await lab.cluster.add_pod(host_ip="192.0.2.10")
        await add_service(lab)
        await lab.cluster.request("POST", SLICES, slice_body("web-a", [*POINTS, {"ip": "192.0.2.7"}]))
        async with await lab.registrar(SYNC_PERIOD="600", POD_ADDRESS="proxy", **DISCOVER) as daemon:
            await daemon.until(lambda: lab.has("pod--shop--web-1", outside))
            await daemon.until(lambda: lab.meta("pod--shop--web-1").get("service") == "web")
            assert lab.address("pod--shop--web-1") == "192.0.2.10"
            assert lab.address(outside) == "192.0.2.7"
            await daemon.ready()
            await daemon.measures('rejections{reason="not_proxied"}', 1)
            await lab.cluster.add_pod("web-2", ips=["198.51.100.11"], host_ip="192.0.2.11")
            await daemon.until(lambda: lab.has("pod--shop--web-1", "pod--shop--web-2", outside))
            await daemon.until(lambda: lab.meta("pod--shop--web-2").get("service") == "web")


async def test_endpoint_that_moves_between_slices_is_never_deregistered() -> None:
    """Whichever slice is written first, and however often: the service stays, and nothing is written."""

    async def attempt(_: int) -> None:
        async with running_lab() as lab:
            await lab.cluster.add_namespace(NAMESPACE)
            await allow(lab)
            await add_service(lab)
            await lab.cluster.request("POST", SLICES, slice_body("web-a", POINTS))
            await lab.cluster.request("POST", SLICES, slice_body("web-b", []))
            async with await lab.registrar(SYNC_PERIOD="600", **DISCOVER) as daemon:
                await daemon.ready()
                lab.consul.writes.clear()
                names = ["web-a", "web-b"]
                for _ in range(6):
                    first, second = names
                    await lab.cluster.request("PUT", f"{SLICES}/{first}", slice_body(first, []))
                    await lab.cluster.request("PUT", f"{SLICES}/{second}", slice_body(second, POINTS))
                    names.reverse()
                await lab.cluster.request("POST", SLICES, slice_body("web-c", [{"ip": "192.0.2.7"}]))
                await daemon.until(lambda: lab.has(ONE, TWO, "svc--shop--web--192.0.2.7--9102"))
                await asyncio.sleep(GRACE + 0.5)
                assert lab.writes == ["register svc--shop--web--192.0.2.7--9102"]

    await unless_late(attempt, by=GRACE / 4)
