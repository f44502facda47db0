"""The registrar as a process: endpoints of annotated Services, and rights that are missing for them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import yaml

from support.cluster import MERGE_PATCH, NAMESPACE, REGISTRAR_RULES, Rules, rule
from support.files import DEPLOY
from support.lab import Lab, SandboxLab, running_lab
from support.processes import LOOPBACK

SERVICES = f"/api/v1/namespaces/{NAMESPACE}/services"
SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
DISCOVER = {"DISCOVER": "pods,nodes,services"}
ONE, TWO = "svc--shop--web--web-1--9102", "svc--shop--web--web-2--9102"
POINTS = ({"ip": "198.51.100.10", "pod": "web-1"}, {"ip": "198.51.100.11", "pod": "web-2"})


def overlay_rules() -> Rules:
    """Return the rules that the overlay grants."""
    documents = yaml.safe_load_all((DEPLOY / "overlays" / "services" / "rbac.yaml").read_text())
    return [one for document in documents for one in document.get("rules", ())]


async def add_service(lab: Lab, name: str = "web", **annotations: str) -> None:
    """Create an annotated Service without a selector."""
    given = {
        "prometheus.io/scrape": "true",
        **{f"prometheus.io/{key}": text for key, text in annotations.items()},
    }
    body = {
        "metadata": {"name": name, "annotations": given},
        "spec": {"ports": [{"port": 80, "name": "metrics"}]},
    }
    await lab.cluster.request("POST", SERVICES, body)


def slice_body(name: str, points: Sequence[Mapping[str, str]], service: str = "web") -> dict[str, Any]:
    """Return an EndpointSlice of Pods."""
    endpoints = [
        {
            "addresses": [one["ip"]],
            "conditions": {"ready": True},
            "nodeName": "node-a",
            "zone": "eu-1a",
            "targetRef": {"kind": "Pod", "name": one["pod"], "namespace": NAMESPACE},
        }
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
