"""A kubelet's HTTPS server: the metrics endpoints behind the checks of webhook authorization.

Which permission a path needs: kubernetes `pkg/kubelet/server/auth.go`.
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
from k8s_consul_registrar.sandbox.compression import accepts_gzip, compress
from k8s_consul_registrar.sandbox.server import Server

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
# A sample's time, in milliseconds, at the end of its line (Prometheus text format).
_SAMPLE_TIME = re.compile(rb" \d{13}$", re.MULTILINE)


class SeenRequest(NamedTuple):
    """A request a kubelet was sent."""

    method: str
    path: str
    headers: Mapping[str, str]


def recorded_metrics() -> bytes:
    """Return the cAdvisor text a real kubelet sent."""
    return (files("k8s_consul_registrar.sandbox") / "data" / "cadvisor.txt").read_bytes()


class Kubelet:
    """One node's kubelet; an asynchronous context manager. `requests` are the latest, the last one last.

    With `is_live` each answer carries the present time, as one that Prometheus stores has to.
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
        """Answer scrapes with this text from now on."""
        self._metrics = metrics
        self._compressed = compress(metrics)

    @property
    def address(self) -> str:
        """The IP address this kubelet listens on."""
        return self._server.host

    @property
    def port(self) -> int:
        """The port this kubelet listens on."""
        return self._server.port

    @property
    def url(self) -> str:
        """Where this kubelet listens."""
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
    """Return the subresources of the Node of which one must be allowed for a path."""
    for prefix, subresources in _SUBRESOURCES.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return subresources
    return ("proxy",)
