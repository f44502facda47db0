"""The registrar as a process, given bad input: a clear message, a reason counted, nothing else held up."""

import contextlib
from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientError, ClientSession, web
from hypothesis import HealthCheck, given, settings

from support.cluster import JsonObject, rule
from support.lab import SandboxLab, running_lab
from support.odd_inputs import OddPod, add_odd_pods, odd_pods

WEB = "pod--shop--web-1"


async def test_credentials_that_are_not_accepted() -> None:
    """A 401 is reported with the origin of the credentials; nothing is removed, and a right token mends it."""
    async with running_lab() as lab:
        await lab.seed_pod("gone")
        await lab.cluster.add_pod()
        right = await lab.cluster.token()
        lab.token_file.write_text("not-a-token-anyone-knows")
        async with await lab.registrar() as daemon:
            line = await daemon.until_said("cannot list; nothing of it is deregistered meanwhile", "pods")
            assert "our credentials are not accepted" in line["problem"]
            assert str(lab.kubeconfig) in line["problem"]
            assert (await daemon.admin("/readyz"))[0] == 503
            assert lab.writes == []
            lab.token_file.write_text(right)
            await daemon.until(lambda: lab.has(WEB))
            await daemon.ready()
            assert right not in daemon.output


async def test_pods_that_may_not_be_listed() -> None:
    """A 403 names the permission to grant and blocks Pods alone: Nodes go on, no Pod is deregistered."""
    async with running_lab() as lab:
        await lab.seed_pod("web-1")
        await lab.cluster.add_node("node-a", ("InternalIP", "192.0.2.10"))
        await lab.cluster.add_node("node-b", ("InternalIP", "192.0.2.11"))
        lab.token_file.write_text(await lab.cluster.token([rule("list watch", "nodes")]))
        async with await lab.registrar() as daemon:
            line = await daemon.until_said("cannot list; nothing of it is deregistered meanwhile")
            assert line["source"] == "pods"
            wanted = "cannot list and watch pods at the cluster scope: grant list and watch on pods; "
            assert line["problem"].startswith(wanted)
            await daemon.until(lambda: lab.has(WEB, "node--192.0.2.10", "node--192.0.2.11"))
            await lab.cluster.delete_node("node-a")
            await daemon.until(lambda: lab.has(WEB, "node--192.0.2.11"))
            status, text = await daemon.admin("/readyz")
            assert (status, "grant list and watch on pods" in text) == (503, True)
            assert await daemon.metric('source_followed{kind="pod"}') == 0
            assert await daemon.metric('watch_restarts_total{cause="forbidden",kind="pod"}')
            assert await daemon.metric('source_followed{kind="node"}') == 1


async def test_clusters_uid_may_be_out_of_sight() -> None:
    """Without the right to read kube-system the daemon works, and services carry no UID."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        lab.token_file.write_text(await lab.cluster.token([rule("list watch", "pods nodes")]))
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has(WEB))
            assert "cluster_uid" not in lab.meta(WEB)


@contextlib.asynccontextmanager
async def refusing_consul(lab: SandboxLab, refused: dict[str, int]) -> AsyncIterator[str]:
    """Stand before the lab's Consul and answer writes of some services with a status instead."""
    async with ClientSession() as session:

        async def relay(request: web.Request) -> web.Response:
            body = await request.read()
            service_id = (await request.json())["ID"] if request.path.endswith("/register") else ""
            if service_id in refused:
                return web.Response(status=refused[service_id], text="Invalid something or other")
            url = f"{lab.consul.url}{request.raw_path}"
            try:
                async with session.request(request.method, url, data=body) as answer:
                    return web.Response(status=answer.status, body=await answer.read())
            except ClientError:
                return web.Response(status=502)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", relay)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await session.close()  # ends the blocking queries under way
            await runner.cleanup()


@pytest.mark.parametrize("status", [400, 403, 500])
async def test_target_consul_refuses_does_not_hold_up_the_rest(status: int) -> None:
    """Every other service is written in the same pass; the refusal is logged once, counted and retried."""
    refused = {WEB: status}
    async with running_lab() as lab, refusing_consul(lab, refused) as address:
        for number in range(5):
            await lab.cluster.add_pod(f"web-{number}")
        await lab.seed_pod("gone")
        async with await lab.registrar(CONSUL_ADDRESS=address) as daemon:
            line = await daemon.until_said("Consul refuses a service")
            assert (line["service"], line["verb"]) == (WEB, "register")
            assert f"Consul answers {status}" in line["problem"]
            others = [f"pod--shop--web-{number}" for number in (0, 2, 3, 4)]
            await daemon.until(lambda: lab.has(*others))
            await daemon.until(lambda: len(daemon.said("changes", "'refused': 1")) >= 2)
            assert len(daemon.said("Consul refuses a service")) == 1
            await daemon.ready()
            refused.clear()
            await daemon.until(lambda: lab.has(WEB, *others))


GARBAGE = {
    "port-zero": ({"port": "0"}, "invalid_port"),
    "port-huge": ({"port": "70000"}, "invalid_port"),
    "port-name": ({"port": "no-such"}, "unknown_port_name"),
    "port-none": ({}, "no_port"),
    "scheme": ({"port": "80", "scheme": "gopher"}, "invalid_scheme"),
    "path": ({"port": "80", "path": "/a\nb\x07"}, "invalid_path"),
    "path-url": ({"port": "80", "path": "HTTPS://example.com/metrics"}, "invalid_path"),
    "path-long": ({"port": "80", "path": "/" + "x" * 600}, "meta_too_long"),
    "query": ({"port": "80", "path": "/m?a=%ff"}, "invalid_path"),
    "param": ({"port": "80", "path": "/m?a-b=1"}, "invalid_param"),
    "param-two": ({"port": "80", "path": "/m?a=1", "param-a": "2"}, "invalid_param"),
    "many": ({"port": "80", **{f"param-p{number}": "x" for number in range(80)}}, "meta_too_many"),
}  # fmt: skip


async def test_garbage_annotations_are_rejected_by_reason() -> None:
    """Each is one line and one count, what Consul holds of such a Pod stays, and good Pods are registered."""
    async with running_lab() as lab:
        held = await lab.seed_pod("port-zero")
        for name, (annotations, _) in GARBAGE.items():
            await lab.cluster.add_pod(
                name,
                annotations={
                    "prometheus.io/scrape": "true",
                    **{f"prometheus.io/{key}": value for key, value in annotations.items()},
                },
            )
        await lab.cluster.add_pod()
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has(WEB, "pod--shop--port-zero"))
            await daemon.ready()
            told = {line["object"]: line["reason"].partition(":")[0] for line in daemon.said("rejected")}
            assert told == {f"pod shop/{name}": reason for name, (_, reason) in GARBAGE.items()}
            for reason in set(told.values()):
                count = sum(each == reason for each in told.values())
                await daemon.measures(f'rejections{{reason="{reason}"}}', count)
            await daemon.passes(2)
            assert len(daemon.said("rejected")) == len(GARBAGE)
            assert lab.services["pod--shop--port-zero"] == held
            await daemon.measures('kept_services{why="rejected"}', 1)


@pytest.mark.long
async def test_five_hundred_odd_pods() -> None:
    """Each that asks is either a service Consul takes or a rejection that is counted, and none is both."""
    pods: list[OddPod] = []

    @settings(max_examples=500, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(odd_pods())
    def collect(pod: OddPod) -> None:
        pods.append(pod)

    collect()
    async with running_lab() as lab, await lab.registrar(SYNC_PERIOD="2") as daemon:
        wanted = await add_odd_pods(lab.cluster, pods)
        await lab.cluster.add_pod("the-last")
        await daemon.until(lambda: "pod--shop--the-last" in lab.services)
        line: JsonObject = await daemon.passes(2)
        assert not daemon.said("Consul refuses a service"), "what we take Consul takes"
        await daemon.measures('targets{kind="pod",state="registered"}', len(lab.services))
        assert line["rejected"] == len(wanted) + 1 - len(lab.services)
        assert set(lab.services) <= {*wanted, "pod--shop--the-last"}
        assert 0 < line["rejected"] < len(wanted), "both sorts are among them"


@pytest.mark.parametrize("server", ["api", "consul"])
async def test_stall_is_outlived(server: str) -> None:
    """A request that hangs for a while continues where it stopped; health is answered meanwhile."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_pod()
        await daemon.until(lambda: lab.has(WEB))
        await daemon.until_said("resync")
        await daemon.ready()
        door = lab.api_door if server == "api" else lab.consul_door
        door.stall()
        await lab.cluster.add_pod("web-2")
        await daemon.until(lambda: door.is_held)
        assert (await daemon.admin("/healthz"))[0] == (await daemon.admin("/readyz"))[0] == 200
        await door.heal()
        await daemon.until(lambda: lab.has(WEB, "pod--shop--web-2"))
