"""What tests of Pods through the proxy stand on: servers that play a Pod, and the proxy's way to them."""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass

from k8s_consul_registrar.model import ContainerPort, Pod
from k8s_consul_registrar.proxy.limits import Concurrency
from k8s_consul_registrar.proxy.peers import PodAccess
from k8s_consul_registrar.proxy.pod_route import Pods, proxied_pod
from k8s_consul_registrar.proxy.tls import pod_context
from support.proxy_kit import Kubelet, authority_pem

PREFIX = "prometheus.io/"
POD_HOST = "127.0.0.2"  # not a Node's: those of the tests are at 127.0.0.1


@dataclass
class PodServer(Kubelet):
    """A container's port, in plain HTTP unless `is_secure`."""

    host: str = POD_HOST
    names: tuple[str, ...] = (POD_HOST,)
    is_secure: bool = False

    def pod(self, name: str = "web-1", namespace: str = "shop", **changes: object) -> Pod:
        """Return the Pod this server belongs to; `annotations` are without their prefix."""
        given = {"scrape": "true", "port": str(self.port), "scheme": "https" if self.is_secure else "http"}
        given |= changes.pop("annotations", {})  # type: ignore[call-overload]  # the tests' own keyword
        values = {
            "uid": f"uid-of-{name}",
            "created": "2026-01-01T00:00:00Z",
            "phase": "Running",
            "ip": self.host,
            "annotations": {f"{PREFIX}{key}": value for key, value in given.items()},
        }
        return Pod(namespace, name, **(values | changes))  # type: ignore[arg-type]  # the tests' own keywords


def declared(*numbers: int) -> tuple[ContainerPort, ...]:
    """Return containers' ports."""
    return tuple(ContainerPort("", number, "TCP") for number in numbers)


def put(pods: Pods, *those: Pod) -> None:
    """Take Pods in as the proxy's feed does."""
    for pod in those:
        pods.put(pod.namespace, pod.name, proxied_pod(pod, PREFIX, allow_loopback=True))


def known(*those: Pod) -> Pods:
    """Return the Pods as they are after the first complete list."""
    pods = Pods()
    put(pods, *those)
    pods.known = True
    return pods


def access(
    pods: Pods, *, context: ssl.SSLContext | None = None, concurrency: Concurrency | None = None
) -> PodAccess:
    """Return how the proxy reaches them, trusting the tests' authority."""
    trusted = context or pod_context(ca_pem=authority_pem())
    return PodAccess(pods, lambda: trusted, concurrency or Concurrency(), 100)


def path_of(name: str = "web-1", namespace: str = "shop", ports: Sequence[int] = ()) -> str:
    """Return the path by which a Pod is registered."""
    port = f":{ports[0]}" if ports else ""
    return f"/api/v1/namespaces/{namespace}/pods/{name}{port}/metrics"
