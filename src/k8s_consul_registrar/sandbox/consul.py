"""The sandbox's Consul: one agent that is also the only server, over HTTP."""

from typing import Self

from aiohttp import web

from k8s_consul_registrar.sandbox.consul_agent import Agent
from k8s_consul_registrar.sandbox.consul_catalog import CatalogApi
from k8s_consul_registrar.sandbox.consul_http import ConsulOptions, Gate, Write, consul_manners
from k8s_consul_registrar.sandbox.consul_state import Catalog
from k8s_consul_registrar.sandbox.server import Server

_LARGEST_BODY = 8 * 1024 * 1024  # bytes; the endpoints have their own, smaller limits


class Consul:
    """A Consul agent; an asynchronous context manager."""

    def __init__(
        self,
        options: ConsulOptions = ConsulOptions(),  # noqa: B008 - an immutable value
        *,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.catalog = Catalog()
        self._gate = Gate(options, self.catalog)
        self.agent = Agent(options, self.catalog, self._gate)
        app = web.Application(middlewares=[consul_manners], client_max_size=_LARGEST_BODY)
        self.agent.add_routes(app.router)
        CatalogApi(options, self.catalog, self._gate).add_routes(app.router)
        self._server = Server(app, host=host, port=port)

    @property
    def address(self) -> str:
        """Host and port, as CONSUL_ADDRESS names them."""
        return self._server.address

    @property
    def url(self) -> str:
        """The root of the HTTP API."""
        return self._server.url

    @property
    def writes(self) -> list[Write]:
        """The requests so far that were to change something; may be cleared."""
        return self._gate.writes

    async def __aenter__(self) -> Self:
        await self._server.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.__aexit__()
