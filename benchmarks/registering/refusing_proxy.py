"""A proxy before Consul that refuses to write the services whose IDs begin with a prefix: UPSTREAM PREFIX PORT.

An agent's PUT is answered 400, a transaction 409 with one error for each such service, as Consul does. A GET of
/refused returns how many different IDs were refused so far.
"""

import sys
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "host"})
_PROBLEM = "Invalid service: refused by the benchmark"
_LARGEST_BODY = 64 * 1024 * 1024


class RefusingProxy:
    """Passes requests on, except writes of what it refuses."""

    def __init__(self, upstream: str, prefix: str) -> None:
        self._upstream = upstream
        self._prefix = prefix
        self._refused: set[str] = set()
        self._session: aiohttp.ClientSession | None = None

    def application(self) -> web.Application:
        """Return what serves it."""
        app = web.Application(client_max_size=_LARGEST_BODY)
        app.cleanup_ctx.append(self._connect)
        app.router.add_get("/refused", self._count)
        app.router.add_route("*", "/{path:.*}", self._serve)
        return app

    async def _connect(self, _: web.Application) -> Any:
        timeout = aiohttp.ClientTimeout(total=700)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            f"http://{self._upstream}", connector=connector, timeout=timeout, auto_decompress=False
        ) as self._session:
            yield

    async def _count(self, _: web.Request) -> web.Response:
        return web.json_response(len(self._refused))

    async def _serve(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.method == "PUT" and (refusal := self._refusal(request.path, body)):
            return refusal
        assert self._session is not None
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        async with self._session.request(
            request.method, request.raw_path, data=body or None, headers=headers
        ) as answer:
            content = await answer.read()
        back = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
        return web.Response(body=content, status=answer.status, headers=back)

    def _refusal(self, path: str, body: bytes) -> web.Response | None:
        if path == "/v1/agent/service/register":
            if self._refuses(msgspec.json.decode(body).get("ID", "")):
                return web.Response(text=_PROBLEM, status=400)
        elif path == "/v1/txn":
            operations = msgspec.json.decode(body)
            errors = [
                {"OpIndex": index, "What": _PROBLEM}
                for index, operation in enumerate(operations)
                if self._refuses(_written_id(operation))
            ]
            if errors:
                return web.json_response({"Results": None, "Errors": errors}, status=409)
        return None

    def _refuses(self, service: str) -> bool:
        if not service.startswith(self._prefix):
            return False
        self._refused.add(service)
        return True


def _written_id(operation: dict[str, Any]) -> str:
    service = operation.get("Service") or {}
    is_write = service.get("Verb") in ("set", "cas")
    return str((service.get("Service") or {}).get("ID", "")) if is_write else ""


def main() -> None:
    upstream, prefix, port = sys.argv[1:]
    app = RefusingProxy(upstream, prefix).application()
    web.run_app(app, host="127.0.0.1", port=int(port), print=None, access_log=None)


if __name__ == "__main__":
    main()
