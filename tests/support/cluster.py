"""A Kubernetes API server for whole-daemon tests, changed only by API calls.

It is a real one where `KUBEBUILDER_ASSETS` names a folder with `etcd` and `kube-apiserver` (the convention
of controller-runtime's envtest), otherwise the sandbox; tests cannot tell which. No controllers, no scheduler
and no kubelets run, so the tests play their part: a Pod gets its phase and address by a PATCH of its status.
"""

import atexit
import base64
import contextlib
import functools
import itertools
import os
import signal
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from k8s_consul_registrar.sandbox.access import Access
from k8s_consul_registrar.sandbox.certificates import Authority, KubeletCertificate
from k8s_consul_registrar.sandbox.kubelet import Kubelet
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from support.files import ROOT
from support.processes import LOOPBACK, Program, StartFailedError, reserve_ports
from support.waiting import PATIENCE

START_WITHIN = 4 * PATIENCE  # seconds for both servers together
USERS = 200  # a token file is read once, so every user a test may want is in it from the start


class RealApiServer:
    """An etcd and a kube-apiserver on loopback with RBAC; users come from a token file.

    `admin_token` may do everything; `spare_users` (token by name) may do nothing until something is granted.
    """

    def __init__(self, assets: Path) -> None:
        self.authority = Authority()
        self.admin_token = "admin-token-of-this-test-run"
        self.spare_users = {f"user-{number}": f"token-of-user-{number}-in-tests" for number in range(USERS)}
        etcd, peer, self.port = reserve_ports(3)
        self._folder = tempfile.TemporaryDirectory(prefix="envtest-", ignore_cleanup_errors=True)
        home = Path(self._folder.name)
        etcd_url = f"http://{LOOPBACK}:{etcd}"
        self._etcd = Program(
            [
                str(assets / "etcd"), f"--data-dir={home / 'etcd'}", f"--listen-client-urls={etcd_url}",
                f"--advertise-client-urls={etcd_url}", f"--listen-peer-urls=http://{LOOPBACK}:{peer}",
            ],
            home / "etcd.log",
        )  # fmt: skip
        self._write_secrets(home)
        self._api_server = Program(
            [
                str(assets / "kube-apiserver"), f"--etcd-servers={etcd_url}", f"--cert-dir={home}",
                f"--bind-address={LOOPBACK}", f"--secure-port={self.port}", f"--advertise-address={LOOPBACK}",
                "--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.0.0.0/24",
                f"--tls-cert-file={home / 'tls.crt'}", f"--tls-private-key-file={home / 'tls.key'}",
                f"--service-account-issuer=https://{LOOPBACK}:{self.port}/",
                f"--service-account-key-file={home / 'sa.key'}",
                f"--service-account-signing-key-file={home / 'sa.key'}",
                "--authorization-mode=RBAC", f"--token-auth-file={home / 'tokens.csv'}",
                "--disable-admission-plugins=ServiceAccount", "--allow-privileged=true",
            ],
            home / "kube-apiserver.log",
        )  # fmt: skip

    def _write_secrets(self, home: Path) -> None:
        """Write the serving certificate, the key that signs service-account tokens, and the users."""
        leaf = self.authority._ca.issue_cert(LOOPBACK, "localhost")
        (home / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        (home / "tls.key").write_bytes(leaf.private_key_pem.bytes())
        (home / "sa.key").write_bytes(
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
        users = [f'{self.admin_token},admin,admin,"system:masters"']
        users += [f"{token},{name},{name}" for name, token in self.spare_users.items()]
        (home / "tokens.csv").write_text("\n".join(users) + "\n")

    def start(self) -> None:
        """Start both and wait for the namespace the server creates last of what tests need."""
        self._etcd.launch()
        self._api_server.launch()
        until = time.monotonic() + START_WITHIN
        while not self._has("/api/v1/namespaces/kube-system"):
            if time.monotonic() > until or not self._api_server.is_running:
                raise StartFailedError(f"no API server: {self._api_server.tail()}\n{self._etcd.tail()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End both at once."""
        self._api_server.send(signal.SIGKILL)
        self._etcd.send(signal.SIGKILL)
        self._folder.cleanup()

    def _has(self, path: str) -> bool:
        request = urllib.request.Request(
            f"https://{LOOPBACK}:{self.port}{path}", headers={"Authorization": f"Bearer {self.admin_token}"}
        )
        context = ssl.create_default_context(cadata=self.authority.pem.decode())
        try:
            with urllib.request.urlopen(request, timeout=5, context=context):
                return True
        except (urllib.error.URLError, OSError):
            return False


@functools.cache
def shared_api_server(assets: Path) -> RealApiServer:
    """Return this process's API server, started when first asked for."""
    server = RealApiServer(assets)
    atexit.register(server.stop)
    server.start()
    return server


RBAC = ROOT / "deploy" / "rbac.yaml"
MERGE_PATCH = "application/merge-patch+json"
NAMESPACE = "shop"
SCRAPED = {"prometheus.io/scrape": "true", "prometheus.io/port": "9102"}

JsonObject = dict[str, Any]
Rules = Sequence[Mapping[str, Any]]


def deployed_rules(role: str) -> Rules:
    """Return the rules of a ClusterRole in `deploy/rbac.yaml`, so that tests run with what users grant."""
    for document in yaml.safe_load_all(RBAC.read_text()):
        if document["kind"] == "ClusterRole" and document["metadata"]["name"] == role:
            rules: Rules = document["rules"]
            return rules
    raise LookupError(role)


def rule(verbs: str, resources: str, *, group: str = "") -> Mapping[str, Any]:
    """Return one RBAC rule; verbs and resources are separated by spaces, the core group has no name."""
    return {"apiGroups": [group], "verbs": verbs.split(), "resources": resources.split()}


REGISTRAR_RULES = deployed_rules("k8s-consul-registrar-cr")
PROXY_RULES = deployed_rules("k8s-consul-registrar-proxy-cr")


class Endpoint(NamedTuple):
    """Where an API server listens on loopback, and what signs its certificate."""

    port: int
    authority: Authority


class Cluster:
    """One API server and the kubelets a test adds to it.

    `access` is what those kubelets let in. `spare_users` (token by name) are users of a real API server
    nothing was granted to yet; None in the sandbox, which makes users as they are asked for.
    """

    def __init__(
        self, endpoint: Endpoint, admin_token: str, access: Access, spare_users: dict[str, str] | None
    ) -> None:
        self.endpoint = endpoint
        self.access = access
        self._spare_users = spare_users
        self._numbers = itertools.count()
        self._stack = contextlib.AsyncExitStack()
        context = ssl.create_default_context(cadata=endpoint.authority.pem.decode())
        self._session = aiohttp.ClientSession(
            f"https://{LOOPBACK}:{endpoint.port}",
            headers={"Authorization": f"Bearer {admin_token}"},
            connector=aiohttp.TCPConnector(ssl=context, limit=8),
            timeout=aiohttp.ClientTimeout(total=PATIENCE),
        )

    async def close(self) -> None:
        """Stop the kubelets and close the connections."""
        await self._stack.aclose()
        await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        but: int = 0,
        content_type: str = "application/json",
    ) -> JsonObject:
        """Send one request as the administrator; fail unless it succeeds or gets the status `but`."""
        headers = {"Content-Type": content_type}
        async with self._session.request(method, path, json=body, headers=headers) as response:
            answer: JsonObject = await response.json()
            assert response.status < 300 or response.status == but, f"{method} {path}: {answer}"
            return answer

    async def token(self, rules: Rules = REGISTRAR_RULES) -> str:
        """Return a token of a new user who may do just this, at the API server and at the kubelets."""
        pairs = [(verb, what) for each in rules for verb in each["verbs"] for what in each["resources"]]
        if self._spare_users is None:
            return self.access.grant(f"user-{next(self._numbers)}", pairs)
        user, token = self._spare_users.popitem()
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": user}
        subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}
        named = {"metadata": {"name": user}}
        root = "/apis/rbac.authorization.k8s.io/v1"
        await self.request("POST", f"{root}/clusterroles", {**named, "rules": list(rules)})
        binding = {**named, "roleRef": role, "subjects": [subject]}
        await self.request("POST", f"{root}/clusterrolebindings", binding)
        self.access.grant(user, pairs, token)
        return token

    async def uid(self) -> str:
        """Return the cluster's identity, the UID of the namespace kube-system."""
        return str((await self.request("GET", "/api/v1/namespaces/kube-system"))["metadata"]["uid"])

    async def add_namespace(self, name: str) -> None:
        """Create a namespace unless it is there."""
        await self.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}}, but=409)

    async def add_pod(
        self,
        name: str = "web-1",
        namespace: str = NAMESPACE,
        *,
        ips: Sequence[str] = ("198.51.100.10",),
        phase: str = "Running",
        annotations: Mapping[str, str] = SCRAPED,
        ports: Mapping[str, int] | None = None,
        host_ip: str = "",
        host_ips: Sequence[str] = (),
        host_network: bool = False,
        node: str = "node-a",
    ) -> JsonObject:
        """Create a Pod on a node, and report its status as a kubelet would."""
        container: JsonObject = {"name": "app", "image": "registry.example/app:1.0"}
        if ports:
            container["ports"] = [{"name": each, "containerPort": ports[each]} for each in ports]
        pod = {
            "metadata": {"name": name, "annotations": dict(annotations)},
            "spec": {
                "containers": [container],
                "nodeName": node,
                "automountServiceAccountToken": False,
                "hostNetwork": host_network,
            },
        }
        await self.request("POST", f"/api/v1/namespaces/{namespace}/pods", pod)
        return await self.set_pod_status(
            name, namespace, phase=phase, ips=ips, host_ips=host_ips or [host_ip] * bool(host_ip)
        )

    async def set_pod_status(
        self,
        name: str = "web-1",
        namespace: str = NAMESPACE,
        *,
        phase: str,
        ips: Sequence[str],
        host_ips: Sequence[str] = (),
    ) -> JsonObject:
        """Report a Pod's phase and addresses as a kubelet would."""
        addresses = {"podIP": ips[0], "podIPs": [{"ip": ip} for ip in ips]} if ips else {}
        if host_ips:
            addresses |= {"hostIP": host_ips[0], "hostIPs": [{"ip": ip} for ip in host_ips]}
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/status"
        status = {"status": {"phase": phase, **addresses}}
        return await self.request("PATCH", path, status, content_type=MERGE_PATCH)

    async def annotate_pod(
        self, annotations: Mapping[str, str | None], name: str = "web-1", namespace: str = NAMESPACE
    ) -> None:
        """Set annotations of a Pod; None takes one away."""
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        patch = {"metadata": {"annotations": dict(annotations)}}
        await self.request("PATCH", path, patch, content_type=MERGE_PATCH)

    async def delete_pod(self, name: str = "web-1", namespace: str = NAMESPACE, *, grace: int = 0) -> None:
        """Delete a Pod, at once or with `grace` seconds to end (which no kubelet ever confirms)."""
        await self.request("DELETE", f"/api/v1/namespaces/{namespace}/pods/{name}?gracePeriodSeconds={grace}")

    async def add_node(
        self, name: str, *addresses: tuple[str, str], kubelet_port: int = 10250, is_ready: bool = True
    ) -> JsonObject:
        """Create a Node and report its addresses, such as `("InternalIP", "192.0.2.10")`."""
        await self.request("POST", "/api/v1/nodes", {"metadata": {"name": name}})
        status = {
            "addresses": [{"type": kind, "address": address} for kind, address in addresses],
            "conditions": [{"type": "Ready", "status": str(is_ready)}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet_port}},
        }
        path = f"/api/v1/nodes/{name}/status"
        return await self.request("PATCH", path, {"status": status}, content_type=MERGE_PATCH)

    async def delete_node(self, name: str) -> None:
        """Delete a Node."""
        await self.request("DELETE", f"/api/v1/nodes/{name}")

    async def start_kubelet(
        self,
        name: str,
        host: str = "127.0.0.1",
        certificate: KubeletCertificate = KubeletCertificate.ADDRESS,
    ) -> Kubelet:
        """Start a kubelet without creating its Node; it ends with the cluster."""
        tls = self.endpoint.authority.kubelet(name, host, certificate)
        return await self._stack.enter_async_context(Kubelet(name, self.access, tls, host=host))

    async def add_kubelet(self, name: str, host: str = "127.0.0.1") -> Kubelet:
        """Start a kubelet and create its Node."""
        kubelet = await self.start_kubelet(name, host)
        await self.add_node(name, ("InternalIP", host), kubelet_port=kubelet.port)
        return kubelet

    async def wipe(self) -> None:
        """Delete every Pod, Node, Service and EndpointSlice: the tests of a process share a real API server."""
        home = f"namespaces/{NAMESPACE}"
        services = (f"/api/v1/{home}/services", f"/apis/discovery.k8s.io/v1/{home}/endpointslices")
        for path in services:
            for item in (await self.request("GET", path))["items"]:
                await self.request("DELETE", f"{path}/{item['metadata']['name']}", but=404)
        for path in ("/api/v1/pods", "/api/v1/nodes"):
            for item in (await self.request("GET", path))["items"]:
                metadata = item["metadata"]
                scope = f"namespaces/{metadata['namespace']}/" if "namespace" in metadata else ""
                plural = path.rpartition("/")[2]
                await self.request(
                    "DELETE", f"/api/v1/{scope}{plural}/{metadata['name']}?gracePeriodSeconds=0"
                )


def kubeconfig(address: str, authority: Authority, user: Mapping[str, Any]) -> str:
    """Return a kubeconfig's text for an API server behind this `host:port`."""
    ca_data = base64.b64encode(authority.pem).decode()
    cluster = {"server": f"https://{address}", "certificate-authority-data": ca_data}
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": dict(user)}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
    )


@contextlib.asynccontextmanager
async def running_cluster() -> AsyncIterator[Cluster]:
    """Run a cluster without Pods and Nodes, a real one where `KUBEBUILDER_ASSETS` names it."""
    assets = os.environ.get("KUBEBUILDER_ASSETS", "")
    async with contextlib.AsyncExitStack() as stack:
        if assets:
            real = shared_api_server(Path(assets))
            endpoint = Endpoint(real.port, real.authority)
            cluster = Cluster(endpoint, real.admin_token, Access(), real.spare_users)
        else:
            sandbox = await stack.enter_async_context(Sandbox())
            endpoint = Endpoint(int(sandbox.kube.url.rpartition(":")[2]), sandbox.authority)
            cluster = Cluster(endpoint, sandbox.admin_token, sandbox.access, None)
        stack.push_async_callback(cluster.close)
        await cluster.wipe()
        await cluster.add_namespace(NAMESPACE)
        yield cluster
