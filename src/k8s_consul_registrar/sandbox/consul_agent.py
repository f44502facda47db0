"""The agent's own endpoints: services registered here, which the agent mirrors into the catalog."""

import hashlib

import msgspec
from aiohttp import web

from k8s_consul_registrar.sandbox import consul_rules
from k8s_consul_registrar.sandbox.consul_http import (
    ConsulOptions,
    Gate,
    HttpError,
    empty_response,
    json_response,
    selected,
    wait_of,
    wait_until,
)
from k8s_consul_registrar.sandbox.consul_model import Check, Json, Node, Service, tagged_addresses
from k8s_consul_registrar.sandbox.consul_rules import RefusedError
from k8s_consul_registrar.sandbox.consul_state import Catalog

_FIELDS = frozenset(
    ("ID", "Service", "Tags", "Meta", "Port", "Address", "TaggedAddresses", "Weights", "EnableTagOverride")
)
_NODE_ID = "6558b074-796e-2f90-9691-02f0aea2791e"
_SERF_PORT, _SERVER_PORT = 8301, 8300


class Agent:
    """An agent that is also the cluster's only server."""

    def __init__(self, options: ConsulOptions, catalog: Catalog, gate: Gate) -> None:
        self._options = options
        self._catalog = catalog
        self._gate = gate
        self._services: dict[str, Service] = {}
        with catalog.apply():
            catalog.put_node(_own_node(options))
            catalog.put_check(_serf_health(options))
            catalog.put_service(options.node_name, _own_service(options))

    @property
    def services(self) -> dict[str, Service]:
        """The services this agent holds, by ID."""
        return dict(self._services)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Serve the agent's endpoints."""
        router.add_put("/v1/agent/service/register", self._register)
        router.add_put("/v1/agent/service/deregister/{id:.+}", self._deregister)
        router.add_get("/v1/agent/services", self._list)
        router.add_get("/v1/agent/service/{id:.+}", self._get)
        router.add_get("/v1/agent/self", self._self)
        router.add_get("/v1/agent/members", self._members)
        router.add_post("/v1/internal/acl/authorize", self._authorize)

    def run_anti_entropy(self) -> None:
        """Make the catalog's record of this agent's node equal to what the agent holds.

        A real agent does it about once a minute; services others wrote on its node go.
        """
        node = self._options.node_name
        with self._catalog.apply():
            for service in self._catalog.services_of(node):
                if service.id not in self._services and service.id != "consul":
                    self._catalog.drop_service(node, service.id)
            for service in self._services.values():
                self._catalog.put_service(node, service)

    async def _register(self, request: web.Request) -> web.Response:
        body = await self._gate.write(request)
        try:
            fields = consul_rules.decode_object(body)
            service = consul_rules.service_of(fields, name_field="Name")
        except RefusedError as error:
            raise HttpError(400, f"Request decode failed: {error}") from None
        if not service.name:
            raise HttpError(400, "Missing service name")
        if service.address in consul_rules.ANY_ADDRESSES:
            raise HttpError(400, "Invalid service address")
        try:
            consul_rules.check_meta(service.meta)
        except RefusedError as error:
            raise HttpError(400, f"Invalid Service Meta: {error}") from None
        tagged = {**tagged_addresses(service.address, service.port), **(service.tagged_addresses or {})}
        service = msgspec.structs.replace(service, tagged_addresses=tagged or None)
        self._services[service.id] = service
        with self._catalog.apply():
            self._catalog.put_service(self._options.node_name, service)
        return empty_response()

    async def _deregister(self, request: web.Request) -> web.Response:
        await self._gate.write(request)
        service_id = request.match_info["id"]
        if self._services.pop(service_id, None) is not None:
            with self._catalog.apply():
                self._catalog.drop_service(self._options.node_name, service_id)
        return empty_response()

    async def _list(self, request: web.Request) -> web.Response:
        is_seen = self._gate.sees_everything(request)
        records = [self._services[key].agent_json() for key in sorted(self._services)] if is_seen else []
        response = json_response({record["ID"]: record for record in selected(request, records, _FIELDS)})
        if not is_seen:
            self._gate.mark_filtered(request, response)
        return response

    async def _get(self, request: web.Request) -> web.Response:
        """Answer one service, waiting while its hash is the one the request knows."""
        self._gate.require_all(request)
        service_id = request.match_info["id"]
        if known := request.query.get("hash", ""):
            await wait_until(
                lambda: self._hash(service_id) != known, wait_of(request), self._catalog.subscribe
            )
        service = self._services.get(service_id)
        if service is None:
            raise HttpError(404, f"unknown service ID: {service_id}")
        digest = self._hash(service_id)
        response = json_response({**service.agent_json(), "ContentHash": digest})
        response.headers["X-Consul-ContentHash"] = digest
        return response

    def _hash(self, service_id: str) -> str:
        service = self._services.get(service_id)
        content = msgspec.json.encode(service.agent_json()) if service else b""
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    async def _authorize(self, request: web.Request) -> web.Response:
        """Answer what the token may do; here it is everything or nothing."""
        if not self._options.token:
            raise HttpError(401, "ACL support disabled")
        may_all = self._gate.sees_everything(request)
        asked = msgspec.json.decode(await request.read(), type=list[dict[str, str]])
        return json_response([{**one, "Allow": may_all} for one in asked])

    async def _self(self, request: web.Request) -> web.Response:
        self._gate.require_all(request)
        options = self._options
        config = {
            "Datacenter": options.datacenter,
            "NodeName": options.node_name,
            "NodeID": _NODE_ID,
            "Revision": "",
            "Server": True,
            "Version": options.version,
        }
        meta = {"consul-network-segment": ""}
        stats: Json = {"agent": {"services": str(len(self._services))}, "consul": {"server": "true"}}
        return json_response({"Config": config, "Member": self._member(), "Stats": stats, "Meta": meta})

    async def _members(self, request: web.Request) -> web.Response:
        return json_response([self._member()] if self._gate.sees_everything(request) else [])

    def _member(self) -> Json:
        tags = {"dc": self._options.datacenter, "role": "consul", "build": f"{self._options.version}:"}
        return {
            "Name": self._options.node_name,
            "Addr": "127.0.0.1",
            "Port": _SERF_PORT,
            "Tags": tags,
            "Status": 1,
            "ProtocolMin": 1,
            "ProtocolMax": 5,
            "ProtocolCur": 2,
            "DelegateMin": 2,
            "DelegateMax": 5,
            "DelegateCur": 4,
        }


def _own_node(options: ConsulOptions) -> Node:
    addresses = dict.fromkeys(("lan", "lan_ipv4", "wan", "wan_ipv4"), "127.0.0.1")
    meta = {"consul-network-segment": ""}
    return Node(
        options.node_name,
        "127.0.0.1",
        id=_NODE_ID,
        datacenter=options.datacenter,
        tagged_addresses=addresses,
        meta=meta,
    )


def _own_service(options: ConsulOptions) -> Service:
    meta = {
        "non_voter": "false",
        "raft_version": "3",
        "serf_protocol_current": "2",
        "serf_protocol_max": "5",
        "serf_protocol_min": "1",
        "version": options.version,
    }
    return Service("consul", "consul", port=_SERVER_PORT, meta=meta)


def _serf_health(options: ConsulOptions) -> Check:
    return Check(
        options.node_name,
        "serfHealth",
        name="Serf Health Status",
        status="passing",
        output="Agent alive and reachable",
    )
