"""The endpoints of the catalog, of health checks, of transactions and of the cluster's status."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from aiohttp import web

from k8s_consul_registrar.sandbox import consul_rules, consul_txn
from k8s_consul_registrar.sandbox.consul_acl import Right
from k8s_consul_registrar.sandbox.consul_http import Gate, json_response, selected
from k8s_consul_registrar.sandbox.consul_model import Json, Node, Service, catalog_service_json
from k8s_consul_registrar.sandbox.consul_release import (
    CHECKS,
    NODES,
    SERVICES,
    ConsulOptions,
    ConsulRelease,
    FilteredMark,
)
from k8s_consul_registrar.sandbox.consul_rules import HttpError, RefusedError
from k8s_consul_registrar.sandbox.consul_state import Catalog, check_of, node_of
from k8s_consul_registrar.sandbox.consul_txn import Operation

LARGEST_TXN = 512 * 1024  # bytes
_LEADER = "127.0.0.1:8300"
_SERVICE_FIELDS = frozenset(
    ("ID", "Service", "Tags", "Address", "TaggedAddresses", "Meta", "Port", "Weights", "EnableTagOverride")
)
_NODE_FIELDS = frozenset(("ID", "Node", "Address", "Datacenter", "TaggedAddresses", "Meta"))
_HEALTH_FIELDS = frozenset(("Node", "Service", "Checks"))
_CHECK_FIELDS = frozenset(
    (
        "Node",
        "CheckID",
        "Name",
        "Status",
        "Notes",
        "Output",
        "ServiceID",
        "ServiceName",
        "ServiceTags",
        "Type",
    )
)
_CATALOG_FIELDS = frozenset(
    (
        *("ID", "Node", "Address", "Datacenter", "TaggedAddresses", "NodeMeta"),
        *("ServiceKind", "ServiceID", "ServiceName", "ServiceTags", "ServiceAddress"),
        *("ServiceWeights", "ServiceMeta", "ServicePort"),
    )
)


class CatalogApi:
    """The HTTP side of a catalog."""

    def __init__(self, options: ConsulOptions, catalog: Catalog, gate: Gate) -> None:
        self._datacenter = options.datacenter
        self._is_enterprise = options.is_enterprise
        self._release = options.release
        self._catalog = catalog
        self._gate = gate

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Serve the endpoints."""
        router.add_put("/v1/catalog/register", self._register)
        router.add_put("/v1/catalog/deregister", self._deregister)
        router.add_put("/v1/txn", self._transact)
        router.add_get("/v1/catalog/nodes", self._nodes)
        router.add_get("/v1/catalog/node/{name}", self._node)
        router.add_get("/v1/catalog/node-services/{name}", self._node_services)
        router.add_get("/v1/catalog/services", self._service_names)
        router.add_get("/v1/catalog/service/{name:.+}", self._instances)
        router.add_get("/v1/health/service/{name:.+}", self._healthy)
        router.add_get("/v1/health/node/{name}", self._node_checks)
        router.add_get("/v1/health/state/{state}", self._checks_in_state)
        router.add_get("/v1/status/leader", self._leader)
        router.add_get("/v1/status/peers", self._peers)

    async def _register(self, request: web.Request) -> web.Response:
        self._gate.count_write()
        fields = _decoded(await self._gate.write(request, Right("service:write")))
        try:
            self._apply_registration(fields)
        except RefusedError as error:
            raise HttpError(500, str(error)) from None
        return json_response(True)  # noqa: FBT003 - the body is the JSON value true

    def _apply_registration(self, fields: Json) -> None:
        node = node_of(fields, consul_rules.string_map(fields, "NodeMeta"), self._datacenter)
        is_node_kept = bool(fields.get("SkipNodeUpdate")) and self._catalog.node(node.name) is not None
        if not node.name:
            raise RefusedError("Must provide node")
        if not node.address and not fields.get("SkipNodeUpdate"):
            raise RefusedError("Must provide address if SkipNodeUpdate is not set")
        given = fields.get("Service")
        has_ports = self._release.has_ports
        service = consul_rules.service_of(given, name_field="Service", has_ports=has_ports) if given else None
        if service is not None and service.id and not service.name:
            raise RefusedError("Must provide service name with ID")
        if service is not None and service.address in consul_rules.ANY_ADDRESSES:
            raise RefusedError("Invalid service address")
        checks = [*(fields.get("Checks") or ()), *([fields["Check"]] if fields.get("Check") else ())]
        with self._catalog.apply():
            if not is_node_kept:
                self._catalog.put_node(node)
            if service is not None:
                with _named("failed inserting service: {}"):
                    self._catalog.put_service(node.name, service)
            for check in checks:
                with _named(f'failed inserting check: {{}} on node "{node.name}"'):
                    self._catalog.put_check(check_of(check, node.name))

    async def _deregister(self, request: web.Request) -> web.Response:
        self._gate.count_write()
        fields = _decoded(await self._gate.write(request, Right("node:write")))
        name = fields.get("Node") or ""
        if not name:
            raise HttpError(500, "Must provide node")
        with self._catalog.apply():
            if service_id := fields.get("ServiceID"):
                self._catalog.drop_service(name, service_id)
            elif check_id := fields.get("CheckID"):
                self._catalog.drop_check(name, check_id)
            else:
                self._catalog.drop_node(name)
        return json_response(True)  # noqa: FBT003 - the body is the JSON value true

    async def _transact(self, request: web.Request) -> web.Response:
        self._gate.refuse_elsewhere(request)
        body = await request.read()
        if len(body) > LARGEST_TXN:
            text = f"Request body({len(body)} bytes) too large, max size: {LARGEST_TXN} bytes."
            raise HttpError(413, f"{text} See https://www.consul.io/docs/agent/options.html#txn_max_req_len.")
        try:
            operations = msgspec.json.decode(body, type=list[dict[str, Any]])
        except msgspec.MsgspecError as error:
            raise HttpError(400, f"Failed to parse body: {error}") from None
        most = self._release.most_operations
        if len(operations) > most:
            raise HttpError(413, f"Transaction contains too many operations ({len(operations)} > {most})")
        has_all = self._gate.sees_everything(request)
        is_write = any(consul_txn.is_write(operation) for operation in operations)
        if is_write:
            self._gate.count_write()
            if has_all:
                self._gate.record(request, body)
        else:
            self._gate.count_read()

        def veto(operation: Operation) -> str:
            return "" if has_all else self._gate.denial(request, operation.right)

        try:
            result = consul_txn.run(
                self._catalog,
                operations,
                self._datacenter,
                may_rename=self._release.may_rename,
                veto=veto,
            )
        except RefusedError as error:
            raise HttpError(400, f"Failed to parse body: {error}") from None
        results = result.results if has_all else []  # a read leaves out, without an error, what ACLs hide
        answer = {"Results": None if result.errors else results, "Errors": result.errors or None}
        status = 409 if result.errors else 200
        if is_write:
            return json_response(answer, status=status)
        return _read_answer(answer, status, self._release, is_filtered=results != result.results)

    async def _nodes(self, request: web.Request) -> web.Response:
        def read() -> list[Json]:
            return selected(request, [node.json() for node in self._catalog.nodes()], _NODE_FIELDS)

        return await self._gate.query(request, NODES, read, unseen=[])

    async def _node(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]

        def read() -> Json | None:
            node = self._catalog.node(name)
            if node is None:
                return None
            return {"Node": node.json(), "Services": {item["ID"]: item for item in self._services(request)}}

        return await self._gate.query(request, ("node", name.lower()), read, unseen=None)

    async def _node_services(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        nothing: Json = {"Node": None, "Services": None}

        def read() -> Json:
            node = self._catalog.node(name)
            if node is None:
                return nothing
            # As in Go: null for a node without services, [] where a filter leaves none.
            services = self._services_of(request)
            shown = _selected_services(request, services) if services else None
            return {"Node": node.json(), "Services": shown}

        return await self._gate.query(request, ("node", name.lower()), read, unseen=nothing)

    def _services(self, request: web.Request) -> list[Json]:
        return _selected_services(request, self._services_of(request))

    def _services_of(self, request: web.Request) -> list[Service]:
        services = self._catalog.services_of(request.match_info["name"])
        if not self._is_enterprise:
            return services
        return [one for one in services if self._gate.in_namespace(request, one.namespace)]

    async def _service_names(self, request: web.Request) -> web.Response:
        return await self._gate.query(request, SERVICES, self._catalog.service_tags, unseen={})

    async def _instances(self, request: web.Request) -> web.Response:
        def read() -> list[Json]:
            records = [catalog_service_json(*pair) for pair in self._tagged(request)]
            return selected(request, records, _CATALOG_FIELDS)

        return await self._gate.query(request, ("service", request.match_info["name"]), read, unseen=[])

    async def _healthy(self, request: web.Request) -> web.Response:
        def read() -> list[Json]:
            records = [self._health(*pair) for pair in self._tagged(request)]
            if request.query.get("passing", "0") in ("", "1", "true"):
                records = [
                    record for record in records if all(c["Status"] == "passing" for c in record["Checks"])
                ]
            return selected(request, records, _HEALTH_FIELDS)

        return await self._gate.query(request, ("service", request.match_info["name"]), read, unseen=[])

    def _tagged(self, request: web.Request) -> list[tuple[Node, Service]]:
        """Return the instances that have each tag of the request; the case does not matter."""
        wanted = {tag.lower() for tag in request.query.getall("tag", [])}
        return [
            (node, service)
            for node, service in self._catalog.instances(request.match_info["name"])
            if wanted <= {tag.lower() for tag in service.tags or ()}
            and self._gate.in_namespace(request, service.namespace)
        ]

    def _health(self, node: Node, service: Service) -> Json:
        checks = [check.json() for check in self._catalog.checks_of(node.name, service.id)]
        return {"Node": node.json(), "Service": service.json(), "Checks": checks}

    async def _node_checks(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        return await self._gate.query(
            request,
            ("checks", name.lower()),
            lambda: [
                check.json()
                for check in self._catalog.checks_of(name)
                if self._gate.in_namespace(request, check.namespace)
            ],
            unseen=[],
        )

    async def _checks_in_state(self, request: web.Request) -> web.Response:
        state = request.match_info["state"]

        def read() -> list[Json]:
            every = [check for node in self._catalog.nodes() for check in self._catalog.checks_of(node.name)]
            found = [
                check.json()
                for check in every
                if state in ("any", check.status) and self._gate.in_namespace(request, check.namespace)
            ]
            return selected(request, found, _CHECK_FIELDS)

        return await self._gate.query(request, CHECKS, read, unseen=[])

    async def _leader(self, _: web.Request) -> web.Response:
        return json_response(_LEADER)

    async def _peers(self, _: web.Request) -> web.Response:
        return json_response([_LEADER])


def _selected_services(request: web.Request, services: list[Service]) -> list[Json]:
    return selected(request, [one.json() for one in services], _SERVICE_FIELDS)


def _read_answer(answer: Json, status: int, release: ConsulRelease, *, is_filtered: bool) -> web.Response:
    """Return the answer of a transaction that only reads."""
    meta: Json = {"Index": 0, "LastContact": 0, "KnownLeader": True, "ConsistencyLevel": ""}
    if release.filtered_mark is not FilteredMark.NONE:
        meta |= {"NotModified": False, "Backend": 0, "ResultsFilteredByACLs": is_filtered}
    response = json_response({**answer, **meta}, status=status)
    response.headers["X-Consul-KnownLeader"] = "true"
    response.headers["X-Consul-LastContact"] = "0"
    return response


@contextmanager
def _named(template: str) -> Iterator[None]:
    """Put the text of a refusal inside into a template."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(template.format(error)) from None


def _decoded(body: bytes) -> Json:
    try:
        return consul_rules.decode_object(body)
    except RefusedError as error:
        raise HttpError(400, f"Request decode failed: {error}") from None
