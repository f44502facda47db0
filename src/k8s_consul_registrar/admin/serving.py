"""An HTTP application on a port of its own: on every address, bounded in connections and in patience."""

import asyncio
import ssl
from collections.abc import Iterable

from aiohttp import web
from aiohttp.typedefs import Middleware

from k8s_consul_registrar.admin.accepting import Acceptor, Bounds, server_log
from k8s_consul_registrar.admin.listening import listen

# Whoever asks here does so every few seconds, or once a minute: a connection is not worth keeping long.
_KEEPALIVE_TIMEOUT = 30.0
# Seconds a body that nobody asked for is read for, before its connection is closed.
_LINGERING_TIME = 2.0


class Serving:
    """Serves `app` from `start` to `stop`.

    `setting` is what the port is called. Port 0 takes one the system hands out; `port` says which. An
    answer under way gets `patience` seconds when the server stops, or takes another context.
    """

    def __init__(
        self,
        setting: str,
        port: int,
        *,
        patience: float,
        bounds: Bounds | None = None,
        middlewares: Iterable[Middleware] = (),
    ) -> None:
        self._acceptor = Acceptor(bounds)
        self.app = web.Application(middlewares=[self._acceptor.middleware, *middlewares])
        self._runner = web.AppRunner(
            self.app,
            access_log=None,
            logger=server_log(),
            keepalive_timeout=_KEEPALIVE_TIMEOUT,
            shutdown_timeout=patience,
            lingering_time=_LINGERING_TIME,
        )
        self._setting = setting
        self._patience = patience
        self.port = port

    async def start(self, context: ssl.SSLContext | None = None) -> None:
        """Listen, by TLS with a context; raises OperationalError when the port cannot be had."""
        self._listening = listen(self.port, self._setting)
        self.port = self._listening.getsockname()[1]
        try:
            await self._runner.setup()
            assert self._runner.server is not None
            self._acceptor.start(self._listening, self._runner.server, context)
        except BaseException:
            await self.stop()
            raise

    async def renew(self, context: ssl.SSLContext) -> None:
        """Accept with the context of this moment, and end what was accepted with the one before."""
        assert self._runner.server is not None
        before = self._runner.server.connections
        self._acceptor.renew(context)
        # Not their `close`, which leaves an idle connection open and unattended (aiohttp 3.14).
        await asyncio.gather(*(one.shutdown(self._patience) for one in before))

    async def stop(self) -> None:
        """Stop listening and close what is open."""
        await self._acceptor.stop()
        await self._runner.cleanup()
        self._listening.close()
