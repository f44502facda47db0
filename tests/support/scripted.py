"""Servers that answer as a test tells them: a Consul, and an API server.

The API server cuts, stalls, repeats, refuses and restarts its history.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from aiohttp import web

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress
from k8s_consul_registrar.consul.client import ConsulClient

QUICK = Timing(
    retry_first=0.02,
    retry_cap=0.05,
    connect_timeout=20,
    read_timeout=20,
    gather=0.0,
    tick=0.2,
    write_interval=0.0,
    probe=0.02,
)

# A standby that reads all the time what its leader wrote.
ATTENTIVE = replace(QUICK, standby_look=0.05)

# For requests that must run out of time; the others have more, so that a busy machine ends none.
IMPATIENT = replace(QUICK, connect_timeout=1, read_timeout=1)

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    """Serve on a port of loopback; yields the base URL."""
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client_of(
    url: str, *, token: str = "", namespace: str = "", partition: str = "", timing: Timing = QUICK
) -> AsyncIterator[ConsulClient]:
    """Open a client for a Consul at a base URL."""
    access = ConsulAccess(ConsulAddress(url), token=token, namespace=namespace, partition=partition)
    async with ConsulClient(access, timing) as client:
        yield client


SCRAPED = {"prometheus.io/scrape": "true", "prometheus.io/port": "9102"}


def pod_object(name: str, version: int | str = 1, **changes: Any) -> dict[str, Any]:
    """Return a running Pod of namespace shop that is scraped unless changed."""
    fields = {
        "uid": f"uid-{name}",
        "ip": "198.51.100.10",
        "annotations": SCRAPED,
        "phase": "Running",
    } | changes
    return {
        "metadata": {
            "name": name,
            "namespace": "shop",
            "uid": fields["uid"],
            "resourceVersion": str(version),
            "creationTimestamp": "2026-11-22T10:00:00Z",
            "annotations": fields["annotations"],
        },
        "spec": {"nodeName": "node-a", "containers": []},
        "status": {"phase": fields["phase"], "podIP": fields["ip"]},
    }


def bookmark_object(version: int | str) -> dict[str, Any]:
    """Return a bookmark's object, as the real server sends it."""
    return {
        "kind": "Pod",
        "metadata": {"resourceVersion": str(version)},
        "spec": {"containers": None},
        "status": {},
    }


def status_object(code: int, **details: Any) -> dict[str, Any]:
    """Return a Status."""
    return {
        "kind": "Status",
        "status": "Failure",
        "message": "told by the test",
        "code": code,
        "details": details,
    }


class ApiAnswer(NamedTuple):
    """A whole answer to one request."""

    status: int
    body: Any
    headers: dict[str, str] = {}  # noqa: RUF012 - never written to


def list_answer(version: str, *pods: dict[str, Any], continue_token: str = "") -> ApiAnswer:
    """Return a list, or a page of one."""
    metadata = {"resourceVersion": version, "continue": continue_token}
    return ApiAnswer(200, {"kind": "PodList", "metadata": metadata, "items": list(pods)})


class Asked(NamedTuple):
    """One request: what it was for, and its query."""

    what: str
    query: dict[str, str]


@dataclass
class Stream:
    """One watch as the server sees it."""

    api: "ScriptedApi"
    request: web.Request
    response: web.StreamResponse

    async def send(self, *events: tuple[str, dict[str, Any]]) -> None:
        """Send events; the server's present version is the newest of them."""
        for _, obj in events:
            version = str(obj.get("metadata", {}).get("resourceVersion", ""))
            if version.isdigit():
                self.api.sent_version = max(self.api.sent_version, int(version))
        lines = [json.dumps({"type": word, "object": obj}).encode() + b"\n" for word, obj in events]
        await self.response.write(b"".join(lines))

    async def write(self, data: bytes) -> None:
        """Send bytes."""
        await self.response.write(data)

    def cut(self) -> None:
        """Break the connection."""
        assert self.request.transport is not None
        self.request.transport.abort()

    async def hold(self) -> None:
        """Stay silent forever."""
        await asyncio.Event().wait()


Watch = Callable[[Stream], Awaitable[None]]
StepT = TypeVar("StepT")


class Script(deque[StepT]):
    """Answers given once each, in order."""


class Always(Script[StepT]):
    """One answer, given without end."""

    def popleft(self) -> StepT:
        """Return the answer, and keep it."""
        return self[0]


async def hold(stream: Stream) -> None:
    """Accept a watch and stay silent."""
    await stream.hold()


def ends(*events: tuple[str, dict[str, Any]]) -> Watch:
    """Return a watch of these events that then ends."""

    async def watch(stream: Stream) -> None:
        await stream.send(*events)

    return watch


def holds(*events: tuple[str, dict[str, Any]]) -> Watch:
    """Return a watch of these events that then stays silent."""

    async def watch(stream: Stream) -> None:
        await stream.send(*events)
        await stream.hold()

    return watch


def cuts(*events: tuple[str, dict[str, Any]]) -> Watch:
    """Return a watch of these events whose connection then breaks."""

    async def watch(stream: Stream) -> None:
        await stream.send(*events)
        await asyncio.sleep(0.02)
        stream.cut()

    return watch


@dataclass
class ScriptedApi:
    """Answers each kind of request from its own script, and after that by default.

    By default the list has `pods` at `version`, a probe (a list of one) has the newest version that a list or
    an event had, the namespace has `uid`, and a watch is held silently.
    """

    pods: list[dict[str, Any]] = field(default_factory=list)
    version: int | str = 100
    uid: str = "cluster-1"
    lists: Script[ApiAnswer] = field(default_factory=Script)
    probes: Script[ApiAnswer] = field(default_factory=Script)
    watches: Script[ApiAnswer | Watch] = field(default_factory=Script)
    namespaces: Script[ApiAnswer] = field(default_factory=Script)
    asked: list[Asked] = field(default_factory=list)
    sent_version: int = 0
    url: str = ""

    def count(self, what: str) -> int:
        """Tell how many requests were for this."""
        return sum(asked.what == what for asked in self.asked)

    def queries(self, what: str) -> list[dict[str, str]]:
        """Return the queries of the requests for this."""
        return [asked.query for asked in self.asked if asked.what == what]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        query = dict(request.query)
        if "/namespaces/" in request.path and request.path.endswith("kube-system"):
            self.asked.append(Asked("namespace", query))
            found = ApiAnswer(200, {"metadata": {"uid": self.uid}})
            return _whole(self.namespaces.popleft() if self.namespaces else found)
        if "watch" in query:
            return await self._watch(request, query)
        version = str(self.version)
        if query.get("limit") == "1":
            self.asked.append(Asked("probe", query))
            newest = str(max(int(version), self.sent_version)) if version.isdigit() else version
            return _whole(self.probes.popleft() if self.probes else list_answer(newest))
        self.asked.append(Asked("list", query))
        return _whole(self.lists.popleft() if self.lists else list_answer(version, *self.pods))

    def restore(self, *pods: dict[str, Any], version: int) -> None:
        """Go back to an earlier state, as a server whose etcd was restored from a backup."""
        self.pods, self.version, self.sent_version = list(pods), version, 0

    async def _watch(self, request: web.Request, query: dict[str, str]) -> web.StreamResponse:
        self.asked.append(Asked("watch", query))
        script = self.watches.popleft() if self.watches else hold
        if isinstance(script, ApiAnswer):
            return _whole(script)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        with suppress(ConnectionError):
            await script(Stream(self, request, response))
            await response.write_eof()
        return response


def _whole(answer: ApiAnswer) -> web.Response:
    return web.Response(status=answer.status, body=json.dumps(answer.body).encode(), headers=answer.headers)


@asynccontextmanager
async def serving_api(api: ScriptedApi) -> AsyncIterator[ScriptedApi]:
    """Serve until the end of the block."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    api.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield api
    finally:
        await runner.cleanup()
