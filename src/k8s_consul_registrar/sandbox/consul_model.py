"""Consul's records and their JSON, as Consul 1.8.7 encodes them (`agent/structs/structs.go`)."""

import ipaddress
from collections.abc import Mapping
from typing import Any

import msgspec

Json = dict[str, Any]


class Weights(msgspec.Struct, frozen=True):
    """How DNS weighs an instance."""

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
        """Return this record without its indexes, to compare it with another."""
        return msgspec.structs.replace(self, create_index=0, modify_index=0)

    def json(self) -> Json:
        """Return the record as the catalog's answers hold it."""
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
    """An instance of a service, on an agent or a node of the catalog."""

    id: str
    name: str
    address: str = ""
    port: int = 0
    tags: tuple[str, ...] | None = None
    meta: Mapping[str, str] | None = None
    tagged_addresses: Mapping[str, Json] | None = None
    weights: Weights = Weights()
    enable_tag_override: bool = False
    create_index: int = 0
    modify_index: int = 0

    def content(self) -> "Service":
        """Return this record without its indexes, to compare it with another."""
        return msgspec.structs.replace(self, create_index=0, modify_index=0)

    def agent_json(self) -> Json:
        """Return the record as the agent's own answers hold it."""
        tagged = {"TaggedAddresses": self.tagged_addresses} if self.tagged_addresses else {}
        return {
            "ID": self.id,
            "Service": self.name,
            "Tags": self.tags or (),
            "Meta": self.meta or {},
            "Port": self.port,
            "Address": self.address,
            **tagged,
            "Weights": self.weights,
            "EnableTagOverride": self.enable_tag_override,
        }

    def raw_json(self) -> Json:
        """Return the record as transactions answer it: tags that are not set are null."""
        tagged = {"TaggedAddresses": self.tagged_addresses} if self.tagged_addresses else {}
        return {
            "ID": self.id,
            "Service": self.name,
            "Tags": self.tags,
            "Address": self.address,
            **tagged,
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
        """Return the record as the catalog's and health's answers hold it."""
        return {**self.raw_json(), "Tags": self.tags or ()}


class Check(msgspec.Struct, frozen=True):
    """A health check's record; `service_id` is empty for a check of the whole node."""

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
    create_index: int = 0
    modify_index: int = 0

    def content(self) -> "Check":
        """Return this record without its indexes, to compare it with another."""
        return msgspec.structs.replace(self, create_index=0, modify_index=0)

    def raw_json(self) -> Json:
        """Return the record as transactions answer it: a node's check has null for its service's tags."""
        return {**self.json(), "ServiceTags": self.service_tags if self.service_id else None}

    def json(self) -> Json:
        """Return the record as health's answers hold it."""
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


def catalog_service_json(node: Node, service: Service) -> Json:
    """Return an instance as `/v1/catalog/service/<name>` holds it."""
    tagged = {"ServiceTaggedAddresses": service.tagged_addresses} if service.tagged_addresses else {}
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
        **tagged,
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
    """Return the tagged addresses an agent derives from a service's address, none from a host name."""
    try:
        version = ipaddress.ip_address(address).version
    except ValueError:
        return {}
    return {f"{scope}_ipv{version}": {"Address": address, "Port": port} for scope in ("lan", "wan")}
