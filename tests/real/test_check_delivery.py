"""`check delivery` against a real Prometheus: what it has, what its relabelling drops, what it cannot scrape."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from support.cluster import REGISTRAR_RULES
from support.lab import SandboxLab, running_lab
from support.real_servers import REAL, fetched_prometheus, fetched_victoria, real_prometheus, real_victoria
from support.waiting import until

pytestmark = REAL


async def test_check_delivery_names_what_a_prometheus_lacks() -> None:
    """One target is active and down, one is dropped by relabelling; exit 1 while one is missing."""
    async with running_lab() as lab:
        settings = {
            "CONSUL_BACKEND": "none",
            "FILE_SD_PATH": str(lab.folder / "targets.json"),
            "DISCOVER": "pods",
        }
        job = {
            "job_name": "pods",
            "scrape_interval": "1s",
            "file_sd_configs": [{"files": [settings["FILE_SD_PATH"]]}],
            "relabel_configs": [
                {"source_labels": ["__meta_consul_service_metadata_pod"], "regex": "web-2", "action": "drop"}
            ],
        }
        config = yaml.safe_dump({"scrape_configs": [job]})
        async with (
            real_prometheus(config, tools=fetched_prometheus("2.53")) as prometheus,
            await lab.registrar(**settings) as registrar,
        ):
            await lab.cluster.add_pod(ips=["127.0.0.2"])
            await lab.cluster.add_pod("web-2", ips=["127.0.0.3"])

            async def is_scraped() -> bool:
                return [one["health"] for one in await prometheus.targets()] == ["down"]

            await until(is_scraped, context=lambda: registrar.output + prometheus.program.tail())
            shown = {"CLUSTER_NAME": "lab", "DISCOVER": "pods", "CONSUL_BACKEND": "none", "HTTP_SD_PORT": "0"}
            async with lab.daemon("check", "delivery", "--prometheus", prometheus.url, **shown) as check:
                assert await check.ended() == 1
                output = check.output
        assert "1 of 2 are missing: pod--shop--web-2: the relabelling of the job 'pods' drops them" in output
        assert "1 of 1 are down: pod--shop--web-1" in output


PASSWORD = "p4ssw0rd"
# That password with bcrypt, as `htpasswd -nB` makes it.
HASH = "$2b$05$0n4JPsWnrJnLb49aY.jYdO2I3AZKfNtVmrSsT168gnXO5dcerZlOm"


async def check_delivery(lab: SandboxLab, url: str, *more: str) -> tuple[int, str]:
    """Run the command and return its exit code and output."""
    shown = {"CLUSTER_NAME": "lab", "DISCOVER": "pods", "CONSUL_BACKEND": "none", "HTTP_SD_PORT": "0"}
    async with lab.daemon("check", "delivery", "--prometheus", url, *more, **shown) as check:
        return await check.ended(), check.output


@asynccontextmanager
async def behind_a_token(url: str, token: str) -> AsyncIterator[str]:
    """Serve a collector to those who show a token, as a proxy before it does."""

    async def relay(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {token}":
            return web.Response(status=401)
        async with aiohttp.ClientSession() as session, session.get(f"{url}{request.path_qs}") as answer:
            return web.Response(
                body=await answer.read(), status=answer.status, content_type=answer.content_type
            )

    app = web.Application()
    app.router.add_get("/{path:.*}", relay)
    async with TestServer(app) as server:
        yield f"http://127.0.0.1:{server.port}"


@asynccontextmanager
async def collector(kind: str, config: str, folder: Path) -> AsyncIterator[str]:
    """Run a collector that wants user and password, or one behind a token; yield its URL without them."""
    if kind == "victoria":
        flags = {"httpAuth.username": "me", "httpAuth.password": PASSWORD}
        async with real_victoria(config, binary=fetched_victoria("1.145"), flags=flags) as victoria:
            yield victoria.url
        return
    tools = fetched_prometheus("2.53")
    if kind == "token":
        async with (
            real_prometheus(config, tools=tools) as prometheus,
            behind_a_token(prometheus.url, "t0ken") as url,
        ):
            yield url
        return
    web_config = folder / "web.yml"
    web_config.write_text(yaml.safe_dump({"basic_auth_users": {"me": HASH}}))
    async with real_prometheus(config, f"--web.config.file={web_config}", tools=tools) as prometheus:
        yield prometheus.url


@pytest.mark.parametrize("kind", ["basic", "token", "victoria"])
async def test_collector_behind_authentication_is_asked_with_credentials(kind: str, tmp_path: Path) -> None:
    """Without them it is said what to give; with them its targets are compared."""
    async with running_lab() as lab:
        await lab.cluster.add_pod(ips=["127.0.0.2"])
        targets = tmp_path / "targets.json"
        targets.write_text(json.dumps([{"targets": ["127.0.0.2:9102"], "labels": {}}]))
        job = {"job_name": "pods", "scrape_interval": "1s", "file_sd_configs": [{"files": [str(targets)]}]}
        lab.token_file.write_text(await lab.cluster.token(REGISTRAR_RULES))
        token = tmp_path / "token"
        token.write_text("t0ken")
        async with collector(kind, yaml.safe_dump({"scrape_configs": [job]}), tmp_path) as url:
            code, output = await check_delivery(lab, url)
            assert (code, "asks for authentication (401)" in output) == (1, True), output
            given = ["--prometheus-token-file", str(token)] if kind == "token" else []
            known = url if given else url.replace("//", f"//me:{PASSWORD}@")

            async def is_known() -> bool:
                _, output = await check_delivery(lab, known, *given)
                assert PASSWORD not in output
                return "all 1 are active targets" in output

            await until(is_known)
