"""The relay one would write first: aiohttp's handler and client on uvloop, streaming piece by piece.

Run as a program: `plain.py PORT CA_FILE`; the token comes by the environment.
"""

import os
import re
import ssl
import sys

import aiohttp
import uvloop
from aiohttp import web

_TARGET = re.compile(r"/api/v1/nodes/(127\.[0-9.]+):([0-9]+)(/metrics/cadvisor)")
_DOWN = ("Content-Type", "Content-Encoding", "Content-Length")


class Relay:
    """One client session for all scrapes."""

    def __init__(self, ca_file: str, token: str) -> None:
        self._context = ssl.create_default_context(cafile=ca_file)
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    async def start(self, _: web.Application) -> None:
        """Open the session, in the loop that uses it."""
        connector = aiohttp.TCPConnector(ssl=self._context, limit=0, keepalive_timeout=75)
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=30),
        )

    async def relay(self, request: web.Request) -> web.StreamResponse:
        """Answer one scrape."""
        match = _TARGET.fullmatch(request.path)
        if match is None or self._session is None:
            return web.Response(status=404)
        headers = {
            name: request.headers[name] for name in ("Accept", "Accept-Encoding") if name in request.headers
        }
        headers["Authorization"] = f"Bearer {self._token}"
        url = f"https://{match[1]}:{match[2]}{match[3]}"
        async with self._session.get(url, headers=headers, allow_redirects=False) as answer:
            passed = {name: answer.headers[name] for name in _DOWN if name in answer.headers}
            response = web.StreamResponse(status=answer.status, headers=passed)
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response


def main() -> None:
    """Serve until killed."""
    port, ca_file = int(sys.argv[1]), sys.argv[2]
    relay = Relay(ca_file, os.environ["TOKEN"])
    app = web.Application()
    app.on_startup.append(relay.start)
    app.router.add_get("/{tail:.*}", relay.relay)
    uvloop.install()
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


if __name__ == "__main__":
    main()
