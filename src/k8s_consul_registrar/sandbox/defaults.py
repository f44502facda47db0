"""What an API server fills in when an object is created.

Pod defaults: kubernetes `pkg/apis/core/v1/defaults.go`; a Pod's status is the server's alone
(`pkg/registry/core/pod/strategy.go`), a Node's is kept (`pkg/registry/core/node/strategy.go`).
"""

from typing import Any

from k8s_consul_registrar.sandbox.resources import NAMESPACES, NODES, PODS, Resource

_UNREACHABLE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def with_defaults(resource: Resource, obj: dict[str, Any]) -> dict[str, Any]:
    """Return a new object of this resource with what the server adds; metadata is not touched."""
    if resource is PODS:
        return {
            **obj,
            "spec": _pod_spec(obj["spec"]),
            "status": {"phase": "Pending", "qosClass": "BestEffort"},
        }
    if resource is NODES:
        taint = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}
        spec = {"taints": [taint], **(obj.get("spec") or {})}
        return {**obj, "spec": spec, "status": _node_status(obj.get("status") or {})}
    if resource is NAMESPACES:
        return {**obj, "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}}
    return obj


def with_consistent_status(resource: Resource, obj: dict[str, Any]) -> dict[str, Any]:
    """Return an object whose status holds what follows from the rest of it.

    A Pod's `podIP` wins over `podIPs` that begin otherwise (`pkg/apis/core/v1/conversion.go`), and the times
    of its conditions are null where unknown.
    """
    status = obj.get("status") or {}
    if resource is not PODS or not status:
        return obj
    status = dict(status)
    if address := status.get("podIP"):
        if (status.get("podIPs") or [{}])[0].get("ip") != address:
            status["podIPs"] = [{"ip": address}]
    elif addresses := status.get("podIPs"):
        status["podIP"] = addresses[0]["ip"]
    times = {"lastProbeTime": None, "lastTransitionTime": None}
    if conditions := status.get("conditions"):
        status["conditions"] = [{**times, **condition} for condition in conditions]
    return {**obj, "status": status}


def _pod_spec(spec: dict[str, Any]) -> dict[str, Any]:
    tolerations = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
        for key in _UNREACHABLE
    ]
    return {
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 30,
        "dnsPolicy": "ClusterFirst",
        "securityContext": {},
        "schedulerName": "default-scheduler",
        "tolerations": tolerations,
        "priority": 0,
        "enableServiceLinks": True,
        "preemptionPolicy": "PreemptLowerPriority",
        **spec,
        **{
            field: [_container(container) for container in spec[field]]
            for field in ("initContainers", "containers")
            if spec.get(field)
        },
    }


def _container(container: dict[str, Any]) -> dict[str, Any]:
    image = str(container.get("image", ""))
    is_latest = ":" not in image.rpartition("/")[2] or image.endswith(":latest")
    filled = {
        "resources": {},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "imagePullPolicy": "Always" if is_latest else "IfNotPresent",
        **container,
    }
    if ports := container.get("ports"):
        filled["ports"] = [{"protocol": "TCP", **port} for port in ports]
    return filled


def _node_status(status: dict[str, Any]) -> dict[str, Any]:
    info = ("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "containerRuntimeVersion")
    more = ("kubeletVersion", "kubeProxyVersion", "operatingSystem", "architecture")
    return {
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}},
        "nodeInfo": dict.fromkeys((*info, *more), ""),
        **status,
    }
