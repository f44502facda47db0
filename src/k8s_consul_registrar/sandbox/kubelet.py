"""A kubelet's HTTPS server: the metrics endpoints behind webhook authorization.

Permissions of paths: kubernetes `pkg/kubelet/server/auth.go`.
"""

import re
import ssl
import time
from collections import deque
from collections.abc import Mapping
from importlib.resources import files
from typing import NamedTuple, Self

from aiohttp import web

from k8s_consul_registrar.sandbox.access import Access
from k8s_consul_registrar.sandbox.api_errors import ApiError
from k8s_consul_registrar.sandbox.server import Server, accepts_gzip, compress

_METRICS_PATHS = ("/metrics/cadvisor", "/metrics", "/metrics/resource", "/metrics/probes")
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8; escaping=underscores"
_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_SUBRESOURCES = {
    "/metrics": ("metrics",),
    "/stats": ("stats",),
    "/logs": ("log",),
    "/spec": ("spec",),
    "/checkpoint": ("checkpoint",),
    "/pods": ("pods", "proxy"),
    "/runningpods": ("pods", "proxy"),
    "/healthz": ("healthz", "proxy"),
    "/configz": ("configz", "proxy"),
}
_REMEMBERED = 1000
# The timestamp of a sample, in milliseconds, at the end of its line (Prometheus text format).
_SAMPLE_TIME = re.compile(rb" \d{13}$", re.MULTILINE)


class SeenRequest(NamedTuple):
    """A request that a kubelet received."""

    method: str
    path: str
    headers: Mapping[str, str]


def recorded_metrics() -> bytes:
    """Return the cAdvisor text of a real kubelet."""
    return (files("k8s_consul_registrar.sandbox") / "data" / "cadvisor.txt").read_bytes()


class Kubelet:
    """The kubelet of one node; an asynchronous context manager. `requests` are the latest, in order.

    With `is_live` each answer has the current time, because Prometheus drops old samples.
    """

    def __init__(
        self,
        name: str,
        access: Access,
        tls: ssl.SSLContext,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        metrics: bytes | None = None,
        is_live: bool = False,
    ) -> None:
        self.name = name
        self._is_live = is_live
        self.request_count = 0
        self.requests: deque[SeenRequest] = deque(maxlen=_REMEMBERED)
        self._access = access
        self.serve(recorded_metrics() if metrics is None else metrics)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._server = Server(app, host=host, port=port, tls=tls)

    def serve(self, metrics: bytes) -> None:
        """Answer scrapes with this text."""
        self._metrics = metrics
        self._compressed = compress(metrics)

    @property
    def address(self) -> str:
        """The IP address that this kubelet listens on."""
        return self._server.host

    @property
    def port(self) -> int:
        """The port that this kubelet listens on."""
        return self._server.port

    @property
    def url(self) -> str:
        """The root of this kubelet's API."""
        return self._server.url

    async def __aenter__(self) -> Self:
        await self._server.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.__aexit__()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.request_count += 1
        self.requests.append(SeenRequest(request.method, request.path_qs, request.headers))
        try:
            user = self._access.user(request.headers.get("Authorization", ""))
        except ApiError:
            return web.Response(text="Unauthorized", status=401)
        verb, subresources = _VERBS.get(request.method, ""), subresources_of(request.path)
        if not any(self._access.allows(user, verb, f"nodes/{name}") for name in subresources):
            listed = " ".join(subresources)
            text = f"Forbidden (user={user}, verb={verb}, resource=nodes, subresource(s)=[{listed}])\n"
            return web.Response(text=text, status=403)
        if request.method != "GET":
            return web.Response(text="405: Method Not Allowed", status=405, headers={"Allow": "GET"})
        if request.path in _METRICS_PATHS:
            return await self._send_metrics(request)
        if request.path == "/healthz":
            return web.Response(text="ok")
        return web.Response(text="404 page not found\n", status=404)

    async def _send_metrics(self, request: web.Request) -> web.StreamResponse:
        if self._is_live:
            self.serve(_SAMPLE_TIME.sub(b" %d" % (time.time() * 1000), self._metrics))
        headers = {"Content-Type": _CONTENT_TYPE, "Process-Start-Time-Unix": "1795344097"}
        if accepts_gzip(request):
            headers["Content-Encoding"] = "gzip"
            return web.Response(body=self._compressed, headers=headers)
        response = web.StreamResponse(headers=headers)
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(self._metrics)
        await response.write_eof()
        return response


def subresources_of(path: str) -> tuple[str, ...]:
    """Return the Node's subresources for a path; the user needs the right to one of them."""
    for prefix, subresources in _SUBRESOURCES.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return subresources
    return ("proxy",)
