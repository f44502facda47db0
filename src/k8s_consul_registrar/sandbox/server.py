"""An HTTP server on loopback, and bodies in gzip where the request accepts it."""

import ssl
import zlib
from typing import Self

from aiohttp import web

GZIP = 16 + zlib.MAX_WBITS  # for zlib: gzip's framing


class Server:
    """A listening aiohttp application; an asynchronous context manager."""

    def __init__(
        self,
        app: web.Application,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self._tls = tls
        # A watch or a blocking query must end with its client, not at its timeout.
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1, keepalive_timeout=600
        )

    @property
    def address(self) -> str:
        """Host and port, an IPv6 host in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The root of the server, without a trailing slash."""
        return f"{'https' if self._tls else 'http'}://{self.address}"

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, ssl_context=self._tls)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


def accepts_gzip(request: web.BaseRequest) -> bool:
    """Return True if the request accepts gzip, with a weight above zero."""
    for offer in request.headers.get("Accept-Encoding", "").lower().split(","):
        name, _, weight = offer.strip().partition(";")
        if name.strip() == "gzip" and weight.replace(" ", "") not in ("q=0", "q=0.0"):
            return True
    return False


def compress(body: bytes) -> bytes:
    """Return the body in gzip, at the level that servers use (1: speed)."""
    return zlib.compress(body, 1, wbits=GZIP)
