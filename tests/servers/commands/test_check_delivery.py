"""`check delivery`: what a collector knows of our targets, and answers that are no collector's."""

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from k8s_consul_registrar.commands.check import delivery
from k8s_consul_registrar.commands.check.delivery import (
    KNOWN,
    OTHERS,
    UP,
    Collected,
    CollectorError,
    CollectorTarget,
    ask_collector,
    compare,
)
from k8s_consul_registrar.commands.check.report import Finding, Result
from k8s_consul_registrar.commands.check.suite import run
from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.model import Kind, ObjectKey, Target


def target(name: str, address: str = "198.51.100.10", port: int = 9102) -> Target:
    """Return a Pod's target."""
    key = ObjectKey(Kind.POD, "shop", name)
    return Target(key, f"pod--shop--{name}", "lab-pods", address, port, ())


def seen(
    name: str, health: str = "up", problem: str = "", cluster: str = "lab", **more: str
) -> CollectorTarget:
    """Return a target that a collector has by consul_sd."""
    discovered = {
        "__meta_consul_service_id": f"pod--shop--{name}",
        "__meta_consul_service_metadata_cluster": cluster,
        "__address__": "198.51.100.10:9102",
        **more,
    }
    return CollectorTarget({"job": "kubernetes"}, discovered, health, problem)


def finding(name: str, findings: Sequence[Finding]) -> Finding:
    """Return the finding of a name."""
    (found,) = [one for one in findings if one.name == name]
    return found


def test_targets_that_are_known_and_up_need_nothing() -> None:
    """By service ID, by the names of kubernetes_sd, and by address where a job names nothing else."""
    by_name = {
        "__meta_kubernetes_namespace": "shop",
        "__meta_kubernetes_pod_name": "b",
        "__address__": "198.51.100.11:9102",
    }
    by_address = {"__address__": "[2001:db8::1]:9102"}
    active = [seen("a"), CollectorTarget({}, by_name, "up"), CollectorTarget({}, by_address, "unknown")]
    ours = [target("a"), target("b", "198.51.100.11"), target("c", "2001:db8::1")]
    findings = compare(ours, "lab", Collected(active))
    assert finding(KNOWN, findings) == Finding(KNOWN, Result.OK, "all 3 are active targets")
    assert finding(UP, findings).detail == "2 are up, 1 were not scraped yet"


def test_address_of_another_target_proves_nothing() -> None:
    """Behind the proxy many targets share an address: one that names another ID is not ours."""
    findings = compare([target("b")], "lab", Collected([seen("a", cluster="other")]))
    assert finding(KNOWN, findings).outcome == Result.FAIL


@pytest.mark.parametrize(
    ("collected", "cause", "hint"),
    [
        (
            Collected([seen("a")], [seen("b")]),
            "the relabelling of the job 'kubernetes' drops them",
            "relabel_configs",
        ),
        (Collected([seen("a")]), "no job has discovered them", "refresh_interval"),
        (
            Collected([CollectorTarget({}, {"__address__": "x:1"})]),
            "no job discovers targets",
            "file_sd_configs",
        ),
        (Collected(), "no job discovers targets", "file_sd_configs"),
    ],
)
def test_missing_target_is_named_with_its_likely_cause(collected: Collected, cause: str, hint: str) -> None:
    """Dropped by relabelling, not discovered yet, or no job at all."""
    (missing,) = [
        one
        for one in compare([target("b")], "lab", collected)
        if one.name == KNOWN and one.outcome == Result.FAIL
    ]
    assert "1 of 1 are missing: pod--shop--b: " in missing.detail
    assert cause in missing.detail
    assert hint in missing.hint


def test_target_that_is_down_is_named_with_the_collectors_words() -> None:
    """It is delivered, so it is no failure of delivery; the words cannot hurt a terminal."""
    active = [seen("a", "down", "connection refused\x1b[2J"), seen("b", "up")]
    found = finding(UP, compare([target("a"), target("b")], "lab", Collected(active)))
    assert found.outcome == Result.WARN
    assert "1 of 2 are down: pod--shop--a" in found.detail
    assert found.detail.isprintable()


def test_targets_that_nothing_asks_for_are_counted() -> None:
    """Only those of this cluster: another one's are none of our business."""
    active = [seen("a"), seen("gone"), seen("far", cluster="other")]
    found = finding(OTHERS, compare([target("a")], "lab", Collected(active)))
    assert found.detail.startswith("1 of this cluster")
    assert "pod--shop--gone" in found.detail


TARGETS = {"status": "success", "data": {"activeTargets": [], "droppedTargets": None}}


@asynccontextmanager
async def answering(
    body: bytes, status: int = 200, path: str = "/api/v1/targets", auth: str = ""
) -> AsyncIterator[str]:
    """Serve one answer, to those who show `auth` if it is given."""

    async def handle(request: web.Request) -> web.Response:
        if auth and request.headers.get("Authorization") != auth:
            return web.Response(status=401)
        return web.Response(body=body, status=status, headers={"Content-Type": "application/json"})

    app = web.Application()
    app.router.add_get(path, handle)
    async with TestServer(app) as server:
        yield f"http://127.0.0.1:{server.port}"


async def test_collector_is_asked_under_its_prefix_and_with_credentials() -> None:
    """A token by its file, or user and password in the URL."""
    body = msgspec.json.encode(TARGETS)
    async with answering(body, path="/prom/api/v1/targets", auth="Bearer t0ken") as url:
        assert await ask_collector(f"{url}/prom/", "t0ken") == Collected([], ())
    basic = f"Basic {base64.b64encode(b'me:pass').decode()}"
    async with answering(body, auth=basic) as url:
        assert await ask_collector(url.replace("//", "//me:pass@"), "") == Collected([], ())


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 401, "asks for authentication (401)"),
        (b"", 403, "asks for authentication (403)"),
        (b"", 404, "answers 404 at /api/v1/targets"),
        (b"", 302, "answers 302"),
        (b"<html>", 200, "neither Prometheus nor VictoriaMetrics"),
        (b"[]", 200, "neither Prometheus nor VictoriaMetrics"),
        (b'{"status":"success","data":{}}', 200, "neither Prometheus nor VictoriaMetrics"),
        (b'{"status":"error","data":{"activeTargets":[]}}', 200, "neither Prometheus nor VictoriaMetrics"),
        (b"[" * 100_000, 200, "neither Prometheus nor VictoriaMetrics"),
        (b"x" * (2 << 20), 200, "longer than"),
    ],
)
async def test_what_is_no_collector_is_said_so(
    monkeypatch: pytest.MonkeyPatch, body: bytes, status: int, words: str
) -> None:
    """With what to do about it."""
    monkeypatch.setattr(delivery, "SIZE_LIMIT", 1 << 20)
    async with answering(body, status) as url:
        with pytest.raises(CollectorError, match=r".") as raised:
            await ask_collector(url, "")
    assert words in str(raised.value)
    assert raised.value.hint
    with pytest.raises(CollectorError, match="cannot be asked"):
        await ask_collector("http://127.0.0.1:9", "")


async def test_collector_that_hangs_or_refuses_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In words, not by the name of an exception."""

    async def hang(_: web.Request) -> web.Response:
        await asyncio.sleep(2)
        return web.Response()

    app = web.Application()
    app.router.add_get("/api/v1/targets", hang)
    async with TestServer(app) as server:
        with monkeypatch.context() as patience:
            patience.setattr(delivery, "ANSWER", 0.2)
            with pytest.raises(CollectorError, match=r"it does not answer in 0\.2 s"):
                await ask_collector(f"http://127.0.0.1:{server.port}", "")
    with pytest.raises(CollectorError, match="it cannot be asked: Connect call failed"):
        await ask_collector("http://127.0.0.1:9", "")


@pytest.mark.parametrize(("url", "words"), [("", "is missing"), ("nonsense", "is not a URL")])
def test_url_that_is_missing_or_wrong_is_exit_2(url: str, words: str) -> None:
    """Named by its flag."""
    parsed: Any = type(
        "Parsed", (), {"what": "delivery", "prometheus": url, "prometheus_token_file": "", "output": "json"}
    )
    with pytest.raises(SettingsError, match=f"--prometheus {words}"):
        run(parsed, {"CLUSTER_NAME": "lab"})


def test_token_file_is_read_by_its_flags_name(tmp_path: Path) -> None:
    """A file that is missing names the flag, never its content."""
    parsed: Any = type(
        "Parsed",
        (),
        {
            "what": "delivery", "prometheus": "http://127.0.0.1:9",
            "prometheus_token_file": str(tmp_path / "none"), "output": "json",
        },
    )  # fmt: skip
    with pytest.raises(Exception, match="--prometheus-token-file"):
        run(parsed, {"CLUSTER_NAME": "lab"})
