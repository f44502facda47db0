"""Consul's records and their JSON, in the encoding of Consul 1.8.7 (`agent/structs/structs.go`)."""

import ipaddress
from collections.abc import Mapping
from typing import Any

import msgspec

Json = dict[str, Any]
DEFAULT_NAMESPACE = "default"  # of Enterprise; empty where a record or request names none


class Weights(msgspec.Struct, frozen=True):
    """The weights of an instance in DNS answers."""

    Passing: int = 1
    Warning: int = 1


class Node(msgspec.Struct, frozen=True):
    """A node of the catalog."""

    name: str
    address: str
    id: str = ""
    datacenter: str = "dc1"
    tagged_addresses: Mapping[str, str] | None = None
    meta: Mapping[str, str] | None = None
    create_index: int = 0
    modify_index: int = 0

    def content(self) -> "Node":
        """Return this record without its indexes, for comparisons."""
        return msgspec.structs.replace(self, create_index=0, modify_index=0)

    def json(self) -> Json:
        """Return the record in the form of the catalog's answers."""
        return {
            "ID": self.id,
            "Node": self.name,
            "Address": self.address,
            "Datacenter": self.datacenter,
            "TaggedAddresses": self.tagged_addresses,
            "Meta": self.meta,
            "CreateIndex": self.create_index,
            "ModifyIndex": self.modify_index,
        }

    raw_json = json


class Service(msgspec.Struct, frozen=True):
    """An instance of a service, on an agent or a node of the catalog; `ports` is of 1.22 and later."""

    id: str
    name: str
    address: str = ""
    port: int = 0
    tags: tuple[str, ...] | None = None
    meta: Mapping[str, str] | None = None
    tagged_addresses: Mapping[str, Json] | None = None
    weights: Weights = Weights()
    ports: tuple[Json, ...] = ()
    enable_tag_override: bool = False
    namespace: str = ""
    create_index: int = 0
    modify_index: int = 0

    @property
    def key(self) -> str:
        """The name under which a node holds it: IDs are those of a namespace."""
        return key_of(self.id, self.namespace)

    def content(self) -> "Service":
        """Return this record without its indexes, for comparisons."""
        return msgspec.structs.replace(self, create_index=0, modify_index=0)

    def agent_json(self) -> Json:
        """Return the record in the form of the agent's answers."""
        return {
            "ID": self.id,
            "Service": self.name,
            "Tags": self.tags or (),
            "Meta": self.meta or {},
            "Port": self.port,
            "Address": self.address,
            **self._optional(),
            "Weights": self.weights,
            "EnableTagOverride": self.enable_tag_override,
        }

    def raw_json(self) -> Json:
        """Return the record in the form of transactions' answers, where tags that are not set are null."""
        return {
            "ID": self.id,
            "Service": self.name,
            "Tags": self.tags,
            "Address": self.address,
            **self._optional(),
            "Meta": self.meta,
            "Port": self.port,
            "Weights": self.weights,
            "EnableTagOverride": self.enable_tag_override,
            "Proxy": {"MeshGateway": {}, "Expose": {}},
            "Connect": {},
            "CreateIndex": self.create_index,
            "ModifyIndex": self.modify_index,
        }

    def json(self) -> Json:
        """Return the record in the form of the catalog's and health's answers."""
        return {**self.raw_json(), "Tags": self.tags or ()}

    def _optional(self) -> Json:
        """Return the fields that answers leave out when they are empty."""
        fields = {"TaggedAddresses": self.tagged_addresses, "Ports": self.ports, "Namespace": self.namespace}
        return {name: value for name, value in fields.items() if value}


class Check(msgspec.Struct, frozen=True):
    """A health check; `service_id` is empty for a check of the whole node."""

    node: str
    id: str
    name: str = ""
    status: str = "critical"
    notes: str = ""
    output: str = ""
    service_id: str = ""
    service_name: str = ""
    service_tags: tuple[str, ...] = ()
    type: str = ""
    definition: Json = {}
    namespace: str = ""
    create_index: int = 0
    modify_index: int = 0

    @property
    def key(self) -> str:
        """The name under which a node holds it."""
        return key_of(self.id, self.namespace)

    @property
    def service_key(self) -> str:
        """The name under which the node holds its service."""
        return key_of(self.service_id, self.namespace)

    def content(self) -> "Check":
        """Return this record without its indexes, for comparisons."""
        return msgspec.structs.replace(self, create_index=0, modify_index=0)

    def raw_json(self) -> Json:
        """Return the record in the form of transactions' answers: a node's check has null for service tags."""
        return {**self.json(), "ServiceTags": self.service_tags if self.service_id else None}

    def json(self) -> Json:
        """Return the record in the form of health's answers."""
        return {
            "Node": self.node,
            "CheckID": self.id,
            "Name": self.name,
            "Status": self.status,
            "Notes": self.notes,
            "Output": self.output,
            "ServiceID": self.service_id,
            "ServiceName": self.service_name,
            "ServiceTags": self.service_tags,
            "Type": self.type,
            "Definition": self.definition,
            "CreateIndex": self.create_index,
            "ModifyIndex": self.modify_index,
        }


def key_of(record_id: str, namespace: str) -> str:
    """Return an ID made unique over the namespaces of Enterprise; elsewhere it is the ID."""
    return record_id if namespace in ("", DEFAULT_NAMESPACE) else f"{namespace}\0{record_id}"


def catalog_service_json(node: Node, service: Service) -> Json:
    """Return an instance in the form of `/v1/catalog/service/<name>`."""
    optional = {"ServiceTaggedAddresses": service.tagged_addresses, "ServicePorts": service.ports}
    return {
        "ID": node.id,
        "Node": node.name,
        "Address": node.address,
        "Datacenter": node.datacenter,
        "TaggedAddresses": node.tagged_addresses,
        "NodeMeta": node.meta,
        "ServiceKind": "",
        "ServiceID": service.id,
        "ServiceName": service.name,
        "ServiceTags": service.tags or (),
        "ServiceAddress": service.address,
        **{name: value for name, value in optional.items() if value},
        "ServiceWeights": service.weights,
        "ServiceMeta": service.meta or {},
        "ServicePort": service.port,
        "ServiceEnableTagOverride": service.enable_tag_override,
        "ServiceProxy": {"MeshGateway": {}, "Expose": {}},
        "ServiceConnect": {},
        "CreateIndex": service.create_index,
        "ModifyIndex": service.modify_index,
    }


def tagged_addresses(address: str, port: int) -> dict[str, Json]:
    """Return the tagged addresses that an agent derives from a service's IP address."""
    try:
        version = ipaddress.ip_address(address).version
    except ValueError:
        return {}
    return {f"{scope}_ipv{version}": {"Address": address, "Port": port} for scope in ("lan", "wan")}
