"""The sandbox's Consul: servers and agents that share one catalog, each over HTTP."""

import uuid
from dataclasses import dataclass, field, replace
from typing import Self

from aiohttp import web

from k8s_consul_registrar.sandbox.consul_acl import Tokens
from k8s_consul_registrar.sandbox.consul_agent import Agent
from k8s_consul_registrar.sandbox.consul_catalog import CatalogApi
from k8s_consul_registrar.sandbox.consul_http import Gate, Write
from k8s_consul_registrar.sandbox.consul_model import Json
from k8s_consul_registrar.sandbox.consul_release import ConsulOptions
from k8s_consul_registrar.sandbox.consul_state import Catalog
from k8s_consul_registrar.sandbox.server import Server

_LARGEST_BODY = 8 * 1024 * 1024  # bytes; the endpoints have their own, smaller limits


@dataclass(frozen=True, slots=True)
class _Cluster:
    """The state that all servers and agents of a Consul cluster share."""

    tokens: Tokens
    catalog: Catalog = field(default_factory=Catalog)
    members: list[Json] = field(default_factory=list)


class Consul:
    """A Consul server or agent; an asynchronous context manager.

    By itself it is the only server of its cluster; `peer` adds servers and agents.
    """

    def __init__(
        self,
        options: ConsulOptions = ConsulOptions(),  # noqa: B008 - an immutable value
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        cluster: _Cluster | None = None,
    ) -> None:
        self._options = options
        self._cluster = cluster or _Cluster(Tokens(options))
        self._gate = Gate(options, self.catalog, self.tokens)
        self.agent = Agent(options, self.catalog, self._gate, self.tokens, self._cluster.members)
        app = web.Application(middlewares=[self._gate.manners], client_max_size=_LARGEST_BODY)
        self.agent.add_routes(app.router)
        CatalogApi(options, self.catalog, self._gate).add_routes(app.router)
        self._server = Server(app, host=host, port=port)

    def peer(self, node_name: str, *, is_server: bool = True) -> "Consul":
        """Return another server, or an agent, of this cluster; it is not started yet."""
        options = replace(self._options, node_name=node_name, node_id=str(uuid.uuid4()), is_server=is_server)
        return Consul(options, host=self._server.host, cluster=self._cluster)

    @property
    def catalog(self) -> Catalog:
        """The cluster's catalog."""
        return self._cluster.catalog

    @property
    def tokens(self) -> Tokens:
        """The cluster's ACL tokens."""
        return self._cluster.tokens

    @property
    def address(self) -> str:
        """Host and port, in the form of CONSUL_ADDRESS."""
        return self._server.address

    @property
    def url(self) -> str:
        """The root of the HTTP API."""
        return self._server.url

    @property
    def writes(self) -> list[Write]:
        """The requests so far that were meant to change something; a test may clear it."""
        return self._gate.writes

    async def __aenter__(self) -> Self:
        await self._server.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.__aexit__()
