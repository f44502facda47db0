"""A real Prometheus and a real VictoriaMetrics read the HTTP service discovery: the same rules serve it and Consul's."""

import asyncio
from pathlib import Path

import pytest
import trustme
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from k8s_consul_registrar.admin.http_sd import SD_PATH, HttpSdServer
from k8s_consul_registrar.rotating import bearer_tokens
from k8s_consul_registrar.tls import ServerTls, server_tls
from support.files import ROOT
from support.processes import LOOPBACK
from support.real_servers import REAL, real_prometheus, real_victoria
from support.seen import Registrar, many_targets, pod_target
from support.waiting import PATIENCE, until

pytestmark = REAL

EXAMPLE = ROOT / "deploy" / "prometheus.yml"


def example_rules() -> list[dict[str, object]]:
    """Return the relabelling rules of the example, written for Consul's discovery."""
    rules: list[dict[str, object]] = yaml.safe_load(EXAMPLE.read_text())["scrape_configs"][0][
        "relabel_configs"
    ]
    return rules


def guarded(folder: Path) -> ServerTls:
    """Write a token, our certificate, and one for a collector, into a folder."""
    authority = trustme.CA()
    ours, theirs = authority.issue_cert("localhost"), authority.issue_cert("prometheus")
    for path, pem in (
        (folder / "tls.crt", ours.cert_chain_pems[0]), (folder / "tls.key", ours.private_key_pem),
        (folder / "ca.crt", authority.cert_pem), (folder / "client.crt", theirs.cert_chain_pems[0]),
        (folder / "client.key", theirs.private_key_pem),
    ):  # fmt: skip
        pem.write_to_path(str(path))
    (folder / "token").write_text("t0ken\n")
    return server_tls(folder / "tls.crt", folder / "tls.key", folder / "ca.crt", setting="HTTP_SD_TLS")


def discovery_of(folder: Path, port: int) -> dict[str, object]:
    """Return the configuration by which a collector asks, with the credentials it shows."""
    return {
        "url": f"https://localhost:{port}{SD_PATH}?shard_path=shard-1",
        # Prometheus 2.42 sends no scheme where none is written here.
        "authorization": {"type": "Bearer", "credentials_file": str(folder / "token")},
        "tls_config": {
            "ca_file": str(folder / "ca.crt"),
            "cert_file": str(folder / "client.crt"),
            "key_file": str(folder / "client.key"),
        },
    }


async def test_prometheus_reads_it_with_token_and_certificate(tmp_path: Path) -> None:
    """Targets come over TLS with client certificate and token, and the example's own rules label them."""
    tls = guarded(tmp_path)
    registrar = Registrar(missing="not listed yet")
    registrar.put(
        pod_target("web-1", address="::1", meta={"param_module": "http_2xx", "scheme": "https"}),
        pod_target("web-2", "search", meta={"shard_path": "shard-2"}),
    )
    async with HttpSdServer(
        port=0, view=registrar, bearer=bearer_tokens(tmp_path / "token", "TOKEN"), tls=tls
    ) as server:
        discovery = {**discovery_of(tmp_path, server.port), "refresh_interval": "1s"}
        job = {
            "job_name": "pods",
            "scrape_interval": "1h",
            "http_sd_configs": [discovery],
            "relabel_configs": example_rules(),
        }
        config = yaml.safe_dump({"scrape_configs": [job]})
        async with real_prometheus(config, mechanism="http_sd") as prometheus:

            async def was_put_off() -> bool:
                return "503" in prometheus.program.tail()

            await until(was_put_off)
            assert await prometheus.targets() == []
            registrar.missing = ""

            async def is_there() -> bool:
                return len(await prometheus.targets()) == 1

            await until(is_there)
            (target,) = await prometheus.targets()
            assert target["scrapeUrl"] == "https://[::1]:9102/metrics?module=http_2xx"
            assert target["labels"] == {
                "cluster": "lab", "instance": "[::1]:9102", "job": "pods", "kind": "pod",
                "namespace": "shop", "node": "node-1", "pod": "web-1",
            }  # fmt: skip
            del registrar.held["pod--shop--web-1"]
            registrar.put(pod_target("web-3", tags=("a",)))

            async def is_another() -> bool:
                found = await prometheus.targets()
                return [one["labels"]["pod"] for one in found] == ["web-3"]

            await until(is_another)


@pytest.mark.long
async def test_prometheus_takes_ten_thousand_targets() -> None:
    """All of 10,000 targets are there, each with its own labels."""
    async with HttpSdServer(port=0, view=Registrar(many_targets(10_000))) as server:
        discovery = {"url": f"http://localhost:{server.port}{SD_PATH}", "refresh_interval": "1s"}
        job = {
            "job_name": "pods",
            "scrape_interval": "1h",
            "http_sd_configs": [discovery],
            # Nothing beyond this machine is asked for anything.
            "relabel_configs": [
                *example_rules(),
                {"target_label": "__address__", "replacement": "127.0.0.1:9"},
            ],
        }
        config = yaml.safe_dump({"scrape_configs": [job]})
        async with real_prometheus(config, mechanism="http_sd") as prometheus:

            async def are_there() -> bool:
                return len(await prometheus.targets()) == 10_000

            await until(are_there, within=2 * PATIENCE, every=1.0)
            pods = {one["labels"].get("pod") for one in await prometheus.targets()}
            assert len(pods) == 10_000 - 200 + 1


async def test_victoriametrics_reads_it_with_token_and_certificate(tmp_path: Path) -> None:
    """The example's own rules label what it scrapes, and it keeps what it has while we answer 503."""
    asked: list[str] = []

    async def metrics(request: web.Request) -> web.Response:
        asked.append(request.path_qs)
        return web.Response(text="a_metric 1\n")

    app = web.Application()
    app.router.add_get("/stats", metrics)
    registrar = Registrar()
    tls = guarded(tmp_path)
    bearer = bearer_tokens(tmp_path / "token", "TOKEN")
    async with (
        TestServer(app, host=LOOPBACK) as target,
        HttpSdServer(port=0, view=registrar, bearer=bearer, tls=tls) as server,
    ):
        meta = {"param_module": "http_2xx", "metrics_path": "/stats"}
        registrar.put(
            pod_target("web-1", address=LOOPBACK, port=target.port, meta=meta),
            pod_target("web-2", "search", meta={"shard_path": "shard-2"}),
        )
        job = {
            "job_name": "pods",
            "scrape_interval": "1s",
            "http_sd_configs": [discovery_of(tmp_path, server.port)],
            "relabel_configs": example_rules(),
        }
        async with real_victoria(yaml.safe_dump({"scrape_configs": [job]})) as victoria:

            async def is_scraped() -> bool:
                return [one["health"] for one in await victoria.targets()] == ["up"]

            await until(is_scraped, within=2 * PATIENCE)
            (found,) = await victoria.targets()
            assert found["labels"] == {
                "cluster": "lab", "instance": f"{LOOPBACK}:{target.port}", "job": "pods", "kind": "pod",
                "namespace": "shop", "node": "node-1", "pod": "web-1",
            }  # fmt: skip
            assert set(asked) == {"/stats?module=http_2xx"}
            registrar.missing = "not listed yet"
            await asyncio.sleep(4)
            assert len(await victoria.targets()) == 1
            registrar.missing = ""
            del registrar.held["pod--shop--web-1"]
            registrar.put(pod_target("web-3"))

            async def is_another() -> bool:
                return [one["labels"]["pod"] for one in await victoria.targets()] == ["web-3"]

            await until(is_another)
