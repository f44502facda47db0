"""The agent's own endpoints: services registered here, which the agent copies to the catalog, and logins.

Rules: consul 1.8 `agent/local/state.go`, `agent/agent_endpoint.go`; `deleteService` of 1.15.
"""

import hashlib

import msgspec
from aiohttp import web

from k8s_consul_registrar.sandbox import consul_rules
from k8s_consul_registrar.sandbox.consul_acl import Right, Tokens
from k8s_consul_registrar.sandbox.consul_http import (
    Gate,
    json_response,
    selected,
    token_of,
    wait_of,
    wait_until,
)
from k8s_consul_registrar.sandbox.consul_model import Check, Json, Node, Service, tagged_addresses
from k8s_consul_registrar.sandbox.consul_release import ConsulOptions, DeregisterToken
from k8s_consul_registrar.sandbox.consul_rules import HttpError, RefusedError
from k8s_consul_registrar.sandbox.consul_state import Catalog

_FIELDS = frozenset(
    ("ID", "Service", "Tags", "Meta", "Port", "Address", "TaggedAddresses", "Weights", "EnableTagOverride")
)
_SERF_PORT, _SERVER_PORT = 8301, 8300
_OWN = "consul"  # the service that each server registers for itself


class Agent:
    """An agent, which may also be a server of the cluster."""

    def __init__(
        self, options: ConsulOptions, catalog: Catalog, gate: Gate, tokens: Tokens, members: list[Json]
    ) -> None:
        self.has_node_write = True  # False: the agent's own token may not change its node in the catalog
        self._options = options
        self._release = options.release
        self._catalog = catalog
        self._gate = gate
        self._tokens = tokens
        self._members = members
        self._services: dict[str, Service] = {}
        self._service_tokens: dict[
            str, str
        ] = {}  # also of services that it could not remove from the catalog
        members.append(_member(options))
        with catalog.apply():
            catalog.put_node(_own_node(options))
            catalog.put_check(_serf_health(options))
            if options.is_server:
                catalog.put_service(options.node_name, _own_service(options))

    @property
    def services(self) -> dict[str, Service]:
        """The services that this agent holds, by ID."""
        return dict(self._services)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Serve the agent's endpoints."""
        router.add_put("/v1/agent/service/register", self._register)
        router.add_put("/v1/agent/service/deregister/{id:.+}", self._deregister)
        router.add_get("/v1/agent/services", self._list)
        router.add_get("/v1/agent/service/{id:.+}", self._get)
        router.add_get("/v1/agent/self", self._self)
        router.add_get("/v1/agent/members", self._list_members)
        if self._release.has_version_endpoint:
            router.add_get("/v1/agent/version", self._version)
        router.add_post("/v1/internal/acl/authorize", self._authorize)
        router.add_post("/v1/acl/login", self._login)
        router.add_post("/v1/acl/logout", self._logout)

    def run_anti_entropy(self) -> None:
        """Make the agent's node in the catalog equal to what the agent holds, as far as its tokens allow.

        A real agent does this about once a minute. It removes services that others wrote on its node.
        """
        node = self._options.node_name
        with self._catalog.apply():
            for service in self._catalog.services_of(node):
                is_own = service.id == _OWN and self._options.is_server
                if service.id not in self._services and not is_own:
                    self._drop(service.id)
            for service in self._services.values():
                self._catalog.put_service(node, service)

    def restart(self, *, is_wiped: bool = False) -> None:
        """Restart the agent, which runs anti-entropy; `is_wiped` for one whose `services/` folder is lost."""
        if is_wiped:
            self._services.clear()
        self._service_tokens = {one: self._service_tokens[one] for one in self._services}
        self.run_anti_entropy()

    def _drop(self, service_id: str) -> None:
        """Remove a service from the catalog, if the token that counts may do that."""
        by_service = self._release.deregister_token is DeregisterToken.SERVICE
        token = self._service_tokens.get(service_id) if by_service else None
        may_drop = self.has_node_write if token is None else self._tokens.is_known(token)
        if may_drop:
            self._catalog.drop_service(self._options.node_name, service_id)
            self._service_tokens.pop(service_id, None)

    async def _register(self, request: web.Request) -> web.Response:
        body = await self._gate.write(request, Right("service:write"))
        try:
            fields = consul_rules.decode_object(body)
            service = consul_rules.service_of(fields, name_field="Name", has_ports=self._release.has_ports)
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
        self._service_tokens[service.id] = token_of(request)
        with self._catalog.apply():
            self._catalog.put_service(self._options.node_name, service)
        return web.Response()

    async def _deregister(self, request: web.Request) -> web.Response:
        service_id = request.match_info["id"]
        service = self._services.get(service_id)
        await self._gate.write(request, Right("service:write", service.name if service else ""))
        if service is None and self._release.knows_deregistered:
            hint = "Ensure that the service ID is passed, not the service name."
            raise HttpError(404, f'Unknown service ID "{service_id}". {hint}')
        if service is not None:
            del self._services[service_id]
            with self._catalog.apply():
                self._drop(service_id)
        return web.Response()

    async def _list(self, request: web.Request) -> web.Response:
        is_seen = self._gate.sees_everything(request)
        records = [self._services[key].agent_json() for key in sorted(self._services)] if is_seen else []
        response = json_response({record["ID"]: record for record in selected(request, records, _FIELDS)})
        if not is_seen:
            self._gate.mark_filtered(request, response)
        return response

    async def _get(self, request: web.Request) -> web.Response:
        """Answer one service, after waiting while its hash is the one in the request."""
        service_id = request.match_info["id"]
        service = self._services.get(service_id)
        self._gate.require(request, Right("service:read", service.name if service else ""))
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

    async def _self(self, request: web.Request) -> web.Response:
        options = self._options
        self._gate.require(request, Right("agent:read", options.node_name))
        config = {
            "Datacenter": options.datacenter,
            "NodeName": options.node_name,
            "NodeID": options.node_id,
            "Revision": "",
            "Server": options.is_server,
            "Version": self._release.version,
        }
        meta = {"consul-network-segment": ""}
        role = str(options.is_server).lower()
        stats: Json = {"agent": {"services": str(len(self._services))}, "consul": {"server": role}}
        return json_response({"Config": config, "Member": _member(options), "Stats": stats, "Meta": meta})

    async def _list_members(self, request: web.Request) -> web.Response:
        return json_response(self._members if self._gate.sees_everything(request) else [])

    async def _version(self, _: web.Request) -> web.Response:
        built = {"SHA": "00000000", "BuildDate": "2026-01-01T00:00:00Z", "FIPS": ""}
        return json_response({**built, "HumanVersion": self._release.version})

    async def _authorize(self, request: web.Request) -> web.Response:
        """Answer the token's rights, which here are all or none; each question names its own namespace."""
        if not self._tokens.is_enabled:
            raise HttpError(401, "ACL support disabled")
        has_all, token = self._gate.sees_everything(request), token_of(request)
        questions = msgspec.json.decode(await request.read(), type=list[dict[str, str]])

        def is_allowed(question: dict[str, str]) -> bool:
            # A node belongs to no namespace.
            is_of_node = question["Resource"] == "node"
            return has_all and (is_of_node or self._tokens.sees(token, question.get("Namespace", "")))

        return json_response([{**question, "Allow": is_allowed(question)} for question in questions])

    async def _login(self, request: web.Request) -> web.Response:
        self._gate.refuse_elsewhere(request)
        return json_response(self._tokens.login(await request.read()))

    async def _logout(self, request: web.Request) -> web.Response:
        self._gate.refuse_elsewhere(request)
        self._tokens.logout(token_of(request))
        return json_response(True)  # noqa: FBT003 - the body is the JSON value true


def _member(options: ConsulOptions) -> Json:
    role = "consul" if options.is_server else "node"
    return {
        "Name": options.node_name,
        "Addr": "127.0.0.1",
        "Port": _SERF_PORT,
        "Tags": {"dc": options.datacenter, "role": role, "build": f"{options.release.version}:"},
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
    return Node(
        options.node_name,
        "127.0.0.1",
        id=options.node_id,
        datacenter=options.datacenter,
        tagged_addresses=addresses,
        meta={"consul-network-segment": ""},
    )


def _own_service(options: ConsulOptions) -> Service:
    meta = {
        "non_voter": "false",
        "raft_version": "3",
        "serf_protocol_current": "2",
        "serf_protocol_max": "5",
        "serf_protocol_min": "1",
        "version": options.release.version,
    }
    return Service(_OWN, _OWN, port=_SERVER_PORT, meta=meta)


def _serf_health(options: ConsulOptions) -> Check:
    return Check(
        options.node_name,
        "serfHealth",
        name="Serf Health Status",
        status="passing",
        output="Agent alive and reachable",
    )
