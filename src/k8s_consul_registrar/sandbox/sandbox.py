"""A whole sandbox: an API server, kubelets and a Consul."""

import base64
import stat
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import yaml

from k8s_consul_registrar.sandbox import objects
from k8s_consul_registrar.sandbox.access import ADMIN, Access, Rule
from k8s_consul_registrar.sandbox.certificates import Authority, ClientCertificate, KubeletCertificate
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_release import ConsulOptions
from k8s_consul_registrar.sandbox.kube_api import KubeApi
from k8s_consul_registrar.sandbox.kubelet import Kubelet
from k8s_consul_registrar.sandbox.store import Store

ADMIN_USER = "admin"


class Sandbox:
    """A cluster and a Consul on loopback; an asynchronous context manager.

    `bookmark_period` is in seconds. `can_stream_lists` is the API server's feature gate WatchList.
    """

    def __init__(
        self,
        *,
        store: Store | None = None,
        kube_port: int = 0,
        consul_options: ConsulOptions = ConsulOptions(),  # noqa: B008 - an immutable value
        consul_port: int = 0,
        bookmark_period: float = 60,
        can_stream_lists: bool = True,
    ) -> None:
        self.access = Access()
        self.authority = Authority()
        self.admin_token = self.access.grant(ADMIN_USER)
        self.kubelets: dict[str, Kubelet] = {}
        self.kube = KubeApi(
            self.access,
            self.authority.api_server("127.0.0.1", "::1", "localhost", "kubernetes.default.svc"),
            store=store,
            port=kube_port,
            bookmark_period=bookmark_period,
            can_stream_lists=can_stream_lists,
        )
        self.consul = Consul(consul_options, port=consul_port)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.kube)
        await self._stack.enter_async_context(self.consul)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def ca_pem(self) -> bytes:
        """The certificate of the authority that signs those of the API server and the kubelets."""
        return self.authority.pem

    def token(self, user: str, *rules: Rule | tuple[str, ...]) -> str:
        """Return a new token for a user with these rules, or with all rights if there is none."""
        return self.access.grant(user, rules or ADMIN)

    def client_certificate(self, user: str, *rules: Rule | tuple[str, ...]) -> ClientCertificate:
        """Return a certificate for a user with these rules, or with all rights if there is none."""
        self.access.grant(user, rules or ADMIN)
        return self.authority.client(user)

    async def add_kubelet(
        self,
        name: str,
        host: str = "127.0.0.1",
        *,
        port: int = 0,
        certificate: KubeletCertificate = KubeletCertificate.ADDRESS,
        metrics: bytes | None = None,
        is_live: bool = False,
        has_node: bool = True,
    ) -> Kubelet:
        """Start a kubelet on a loopback address, and create its Node."""
        tls = self.authority.kubelet(name, host, certificate)
        kubelet = Kubelet(name, self.access, tls, host=host, port=port, metrics=metrics, is_live=is_live)
        await self._stack.enter_async_context(kubelet)
        self.kubelets[name] = kubelet
        if has_node:
            addresses = (("InternalIP", host), ("Hostname", name))
            self.kube.create(objects.node(name, addresses=addresses, kubelet_port=kubelet.port))
        return kubelet

    def write_kubeconfig(self, path: Path, token: str = "") -> Path:
        """Write a kubeconfig for the token, the administrator's by default, that only its owner can read."""
        path.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
        path.write_text(yaml.safe_dump(self.kubeconfig(token)), encoding="utf-8")
        return path

    def kubeconfig(self, token: str = "") -> dict[str, Any]:
        """Return a kubeconfig for the token, the administrator's by default."""
        ca_data = base64.b64encode(self.ca_pem).decode()
        cluster = {"server": self.kube.url, "certificate-authority-data": ca_data}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "sandbox", "cluster": cluster}],
            "users": [{"name": "sandbox", "user": {"token": token or self.admin_token}}],
            "contexts": [{"name": "sandbox", "context": {"cluster": "sandbox", "user": "sandbox"}}],
            "current-context": "sandbox",
        }
