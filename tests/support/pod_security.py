"""The restricted profile of the Pod Security Standards."""

from collections.abc import Iterator
from typing import Any

VOLUMES = frozenset(
    (
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    )
)
SECCOMP = ("RuntimeDefault", "Localhost")
APP_ARMOR = (None, "", "RuntimeDefault", "Localhost")
SELINUX_TYPES = (None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")


def violations(pod: dict[str, Any]) -> list[str]:
    """Return what a Pod's spec has that the profile forbids, or lacks that it demands."""
    containers = [
        one for kind in ("initContainers", "containers", "ephemeralContainers") for one in pod.get(kind, ())
    ]
    return [*_of_pod(pod), *(found for one in containers for found in _of_container(one, pod))]


def _of_pod(pod: dict[str, Any]) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield field
    for volume in pod.get("volumes", ()):
        if kinds := volume.keys() - {"name"} - VOLUMES:
            yield f"volume {volume['name']}: {kinds}"
    if pod.get("securityContext", {}).get("sysctls"):
        yield "sysctls"


def _of_container(one: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    name, own = one["name"], one.get("securityContext", {})
    both = {**pod.get("securityContext", {}), **own}
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{name}: allowPrivilegeEscalation"
    if own.get("privileged"):
        yield f"{name}: privileged"
    if any(port.get("hostPort") for port in one.get("ports", ())):
        yield f"{name}: hostPort"
    if own.get("procMount", "Default") != "Default":
        yield f"{name}: procMount"
    yield from _of_profiles(name, both)
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", ()) or {*capabilities.get("add", ())} - {"NET_BIND_SERVICE"}:
        yield f"{name}: capabilities"


def _of_profiles(name: str, both: dict[str, Any]) -> Iterator[str]:
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield f"{name}: runs as root"
    if both.get("seccompProfile", {}).get("type") not in SECCOMP:
        yield f"{name}: seccompProfile"
    if both.get("appArmorProfile", {}).get("type") not in APP_ARMOR:
        yield f"{name}: appArmorProfile"
    options = both.get("seLinuxOptions", {})
    if options.get("type") not in SELINUX_TYPES or options.get("user") or options.get("role"):
        yield f"{name}: seLinuxOptions"
