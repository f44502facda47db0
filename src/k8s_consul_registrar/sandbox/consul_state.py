"""Consul's catalog: nodes, services and checks under one Raft index; pure.

Rules: consul 1.8 `agent/consul/state/catalog.go`. A write that changes nothing moves no index. A change of a
node or of a node-level check touches every service on that node. All writes inside one `apply` happen, or
none does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from k8s_consul_registrar.sandbox.consul_model import Check, Node, Service
from k8s_consul_registrar.sandbox.consul_release import CHECKS, NODES, SERVICES, Scope
from k8s_consul_registrar.sandbox.consul_rules import RefusedError, check_meta

_Undo = Callable[[], None]
_EXTINCTIONS: dict[str, Scope] = {"service": ("extinct service", ""), "node": ("extinct node", "")}


class Catalog:
    """The catalog's state; the case of node names does not matter."""

    def __init__(self, *, index: int = 10) -> None:
        self.index = index  # a fresh server has written a few things of its own
        self._nodes: dict[str, Node] = {}
        self._services: dict[str, dict[str, Service]] = {}
        self._checks: dict[str, dict[str, Check]] = {}
        self._instances: dict[str, dict[tuple[str, str], bool]] = {}  # service name -> (node key, ID)
        self._touched: dict[Scope, int] = {}
        self._journal: list[_Undo] | None = None
        self._listeners: list[Callable[[], None]] = []

    # Reading

    def node(self, name: str) -> Node | None:
        """Return a node."""
        return self._nodes.get(name.lower())

    def nodes(self) -> list[Node]:
        """Return all nodes, by name."""
        return [self._nodes[key] for key in sorted(self._nodes)]

    def services_of(self, node: str) -> list[Service]:
        """Return a node's services, by ID."""
        services = self._services.get(node.lower(), {})
        return [services[key] for key in sorted(services)]

    def service(self, node: str, key: str) -> Service | None:
        """Return one service of a node."""
        return self._services.get(node.lower(), {}).get(key)

    def check(self, node: str, key: str) -> Check | None:
        """Return one check of a node."""
        return self._checks.get(node.lower(), {}).get(key)

    def checks_of(self, node: str, service_id: str | None = None) -> list[Check]:
        """Return a node's checks, or only its own and those of one of its services."""
        checks = self._checks.get(node.lower(), {})
        wanted = ("", service_id)
        return [
            checks[key] for key in sorted(checks) if service_id is None or checks[key].service_id in wanted
        ]

    def instances(self, name: str) -> list[tuple[Node, Service]]:
        """Return the instances of a service, by node and ID."""
        return [
            (self._nodes[node], self._services[node][service_id])
            for node, service_id in sorted(self._instances.get(name, ()))
        ]

    def service_tags(self) -> dict[str, list[str]]:
        """Return every service's name with all tags of its instances."""
        return {
            name: sorted({tag for _, service in self.instances(name) for tag in service.tags or ()})
            for name in sorted(self._instances)
            if self._instances[name]
        }

    def index_of(self, scope: Scope) -> int:
        """Return the index of the latest change in this scope, at least 1.

        A service or node that does not exist has the index of the last one removed, so that a blocking query
        for it returns when it is created.
        """
        if self._is_missing(scope):
            scope = _EXTINCTIONS[scope[0]]
        index = self._touched.get(scope, 0)
        return max(index, 1)

    def _is_missing(self, scope: Scope) -> bool:
        kind, name = scope
        return (kind == "node" and name not in self._nodes) or (
            kind == "service" and not self._instances.get(name)
        )

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` after every write until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # Writing

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Make the writes inside one Raft entry; an exception undoes them all."""
        journal: list[_Undo] = []
        self.index += 1
        self._journal = journal
        try:
            yield
        except BaseException:
            for undo in reversed(journal):
                undo()
            self.index -= 1
            raise
        finally:
            self._journal = None
        for listener in tuple(self._listeners):
            listener()

    def put_node(self, node: Node) -> None:
        """Write a node."""
        before = self.node(node.name)
        if before is not None and before.content() == node.content():
            return
        created = before.create_index if before else self.index
        node = msgspec.structs.replace(node, create_index=created, modify_index=self.index)
        self._set(self._nodes, node.name.lower(), node)
        self._touch(NODES, ("node", node.name.lower()))
        self._touch_services_of(node.name)

    def put_service(self, node: str, service: Service) -> None:
        """Write a service on a node that exists."""
        if self.node(node) is None:
            raise RefusedError("Missing node registration")
        try:
            check_meta(service.meta)
        except RefusedError as error:
            raise RefusedError(
                f"Invalid Service Meta for node {node} and serviceID {service.id}: {error}"
            ) from None
        key, before = node.lower(), self.service(node, service.key)
        if before is not None and before.content() == service.content():
            return
        if before is not None and before.name != service.name:
            self._forget_instance(key, before)
        created = before.create_index if before else self.index
        service = msgspec.structs.replace(service, create_index=created, modify_index=self.index)
        self._set(self._services.setdefault(key, {}), service.key, service)
        self._set(self._instances.setdefault(service.name, {}), (key, service.key), value=True)
        self._touch(SERVICES, ("node", key), ("service", service.name))

    def put_check(self, check: Check) -> None:
        """Write a check on a node that exists; a service that it names must exist too."""
        if self.node(check.node) is None:
            raise RefusedError("Missing node registration")
        key, before = check.node.lower(), self.check(check.node, check.key)
        if check.service_id:
            service = self.service(check.node, check.service_key)
            if service is None:
                raise RefusedError("Missing service registration")
            check = msgspec.structs.replace(check, service_name=service.name, service_tags=service.tags or ())
        if before is not None and before.content() == check.content():
            return
        created = before.create_index if before else self.index
        check = msgspec.structs.replace(check, create_index=created, modify_index=self.index)
        self._set(self._checks.setdefault(key, {}), check.key, check)
        self._touch_checked(check)

    def drop_node(self, name: str) -> None:
        """Remove a node with all its services and checks, if there is one."""
        if (node := self.node(name)) is None:
            return
        for service in self.services_of(name):
            self.drop_service(name, service.key)
        for check in self.checks_of(name):
            self.drop_check(name, check.key)
        self._unset(self._nodes, node.name.lower())
        self._touch(NODES, ("node", name.lower()), _EXTINCTIONS["node"])

    def drop_service(self, node: str, key: str) -> None:
        """Remove a service with its checks, if there is one."""
        if (service := self.service(node, key)) is None:
            return
        for check in self.checks_of(node):
            if check.service_id and check.service_key == key:
                self.drop_check(node, check.key)
        self._unset(self._services[node.lower()], key)
        self._forget_instance(node.lower(), service)
        self._touch(SERVICES, ("node", node.lower()))

    def drop_check(self, node: str, key: str) -> None:
        """Remove a check, if there is one."""
        if (check := self.check(node, key)) is not None:
            self._unset(self._checks[node.lower()], key)
            self._touch_checked(check)

    def _forget_instance(self, node_key: str, service: Service) -> None:
        instances = self._instances[service.name]
        self._unset(instances, (node_key, service.key))
        self._touch(("service", service.name))
        if not instances:
            self._touch(_EXTINCTIONS["service"])

    def _touch_checked(self, check: Check) -> None:
        self._touch(CHECKS, ("checks", check.node.lower()))
        if check.service_id:
            self._touch(("service", check.service_name))
        else:
            self._touch_services_of(check.node)

    def _touch_services_of(self, node: str) -> None:
        for service in self._services.get(node.lower(), {}).values():
            self._touch(("service", service.name))

    def _touch(self, *scopes: Scope) -> None:
        for scope in scopes:
            self._set(self._touched, scope, self.index)

    def _set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        self._remember(table, key)
        table[key] = value

    def _unset(self, table: dict[Any, Any], key: Any) -> None:
        self._remember(table, key)
        del table[key]

    def _remember(self, table: dict[Any, Any], key: Any) -> None:
        if self._journal is None:
            raise RuntimeError("the catalog is written inside apply() only")
        if key in table:
            self._journal.append(lambda old=table[key]: table.__setitem__(key, old))  # type: ignore[misc]  # the default binds the old value
        else:
            self._journal.append(lambda: table.pop(key))


def node_of(fields: Mapping[str, Any], meta: Mapping[str, str] | None, datacenter: str) -> Node:
    """Return the node in a catalog request or a transaction."""
    return Node(
        name=fields.get("Node") or "",
        address=fields.get("Address") or "",
        id=fields.get("ID") or "",
        datacenter=fields.get("Datacenter") or datacenter,
        tagged_addresses=fields.get("TaggedAddresses"),
        meta=meta,
    )


def check_of(fields: Mapping[str, Any], node: str) -> Check:
    """Return the check in a catalog request or a transaction."""
    name = fields.get("Name") or ""
    return Check(
        node=fields.get("Node") or node,
        id=fields.get("CheckID") or name,
        name=name,
        status=fields.get("Status") or "critical",
        notes=fields.get("Notes") or "",
        output=fields.get("Output") or "",
        service_id=fields.get("ServiceID") or "",
        type=fields.get("Type") or "",
        namespace=fields.get("Namespace") or "",
        definition=fields.get("Definition") or {},
    )
