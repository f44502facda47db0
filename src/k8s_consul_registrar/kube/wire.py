"""Pods, Nodes and Namespaces as the API server sends them: the fields we use, and nothing else."""

from typing import Annotated

import msgspec

from k8s_consul_registrar.kube.service_objects import Metadata, Wire


class WireCondition(Wire):
    """A condition of a Pod or Node."""

    type: str = ""
    status: str = ""


class _Port(Wire):
    container_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    name: str = ""
    protocol: str = "TCP"
    host_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0


class _Container(Wire):
    name: str = ""
    ports: list[_Port] | None = None
    restart_policy: str | None = None


class WirePodSpec(Wire):
    """The spec of a Pod."""

    node_name: str = ""
    host_network: bool = False
    containers: list[_Container] | None = None
    init_containers: list[_Container] | None = None


class WireIp(Wire):
    """One IP of a Pod or of its Node."""

    ip: str = ""


class WirePodStatus(Wire):
    """The status of a Pod."""

    phase: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")
    host_ip: str = msgspec.field(name="hostIP", default="")
    pod_ips: list[WireIp] | None = msgspec.field(name="podIPs", default=None)
    host_ips: list[WireIp] | None = msgspec.field(name="hostIPs", default=None)
    conditions: list[WireCondition] | None = None


class WireOwner(Wire):
    """A reference to an object that owns another."""

    kind: str = ""
    name: str = ""
    controller: bool | None = None


class _PodMetadata(Metadata):
    owner_references: list[WireOwner] | None = None


class WirePod(Wire):
    """A Pod as it is sent."""

    metadata: _PodMetadata
    spec: WirePodSpec | None = None
    status: WirePodStatus | None = None


class _Address(Wire):
    type: str = ""
    address: str = ""


class _Endpoint(Wire):
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = msgspec.field(name="Port", default=0)


class _DaemonEndpoints(Wire):
    kubelet_endpoint: _Endpoint | None = None


class WireNodeStatus(Wire):
    """The status of a Node."""

    addresses: list[_Address] | None = None
    daemon_endpoints: _DaemonEndpoints | None = None
    conditions: list[WireCondition] | None = None


class WireNode(Wire):
    """A Node as it is sent."""

    metadata: Metadata
    status: WireNodeStatus | None = None


class WireNamespace(Wire):
    """A Namespace as it is sent."""

    metadata: Metadata
