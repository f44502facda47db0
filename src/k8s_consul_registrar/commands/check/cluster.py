"""Checks of the API server: that it answers, takes our credentials, and allows what the modes do."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from k8s_consul_registrar.commands.check.report import Finding, fail, ok, skipped, warn
from k8s_consul_registrar.errors import (
    AccessError,
    ClusterError,
    ClusterForbidden,
    ClusterUnauthorized,
)
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster_uid import IDENTITY_NAMESPACE
from k8s_consul_registrar.kube.watch_decoder import RESOURCES
from k8s_consul_registrar.model import Kind, Node, Source

# Nodes from which a sample is picked.
MOST_NODES = 100


class Permission(NamedTuple):
    """A right that a mode uses, in RBAC's words; an empty `namespace` is the whole cluster."""

    verb: str
    resource: str
    subresource: str = ""
    namespace: str = ""
    group: str = ""
    name: str = ""

    def __str__(self) -> str:
        what = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        return f"{self.verb} {what}{f' in {self.namespace}' if self.namespace else ''}"


def source_permissions(sources: Iterable[Source]) -> tuple[Permission, ...]:
    """Return what it takes to follow these sources."""
    return tuple(
        Permission(verb, RESOURCES[source.kind], namespace=source.namespace)
        for source in sources
        for verb in ("list", "watch")
    )


def lease_permissions(namespace: str, name: str) -> tuple[Permission, ...]:
    """Return what electing a leader takes; a right to create cannot be bound to a name."""
    lease = Permission("create", "leases", "", namespace, "coordination.k8s.io")
    return (lease, *(lease._replace(verb=verb, name=name) for verb in ("get", "update")))


# A kubelet asks for the last before it serves its metrics (kubernetes pkg/kubelet/server/auth.go).
PROXY_PERMISSIONS = (
    Permission("list", "nodes"),
    Permission("watch", "nodes"),
    Permission("get", "nodes", "metrics"),
)
# Either lets its holder run commands in every container of a Node.
NEVER_NEEDED = (Permission("get", "nodes", "proxy"), Permission("create", "nodes", "proxy"))


async def check_credentials(access: Access) -> Finding:
    """Check that our credentials can be read; the finding names their origin."""
    name = "credentials"
    try:
        await access.credentials.identity()
    except AccessError as error:
        return fail(
            name, str(error), "repair what the text names: a file, or the program that hands out tokens"
        )
    return ok(name, access.origin)


async def check_server(client: KubeClient, access: Access) -> Finding:
    """Check that the API server answers; the finding has its version and how its certificate is verified."""
    name = "api server"
    try:
        version = await client.server_version()
    except ClusterUnauthorized as error:
        return fail(name, str(error), "the token or certificate is expired, revoked, or another cluster's")
    except ClusterForbidden:
        version = "of a version that is not shown to us"
    except ClusterError as error:
        return fail(name, str(error), "is this the right cluster, and may this machine reach it?")
    where = f"{access.server} answers, {version}"
    if access.trust is None:
        return warn(name, f"{where}, without TLS", "a token sent over plain HTTP can be read on the way")
    if not access.trust.is_verified:
        return warn(
            name,
            f"{where}, its certificate is not verified",
            "take insecure-skip-tls-verify out of the kubeconfig and give certificate-authority",
        )
    return ok(name, f"{where}, its certificate is verified by {access.trust.ca_setting or 'the system'}")


async def check_permissions(
    client: KubeClient, wanted: Sequence[Permission], unwanted: Sequence[Permission] = ()
) -> list[Finding]:
    """Ask the API server about each permission (SelfSubjectAccessReview)."""
    needed = await asyncio.gather(*(_needed(client, one) for one in wanted))
    return [*needed, *await _granted_in_vain(client, unwanted)]


async def _needed(client: KubeClient, permission: Permission) -> Finding:
    name = str(permission)
    try:
        is_allowed = await _is_allowed(client, permission)
    except ClusterForbidden as error:
        return skipped(name, f"the API server does not tell: {error}")
    except ClusterError as error:
        return fail(name, str(error))
    if is_allowed:
        return ok(name, "allowed")
    return fail(name, "not allowed", _grant(permission))


def _grant(permission: Permission) -> str:
    what = permission.resource + (f"/{permission.subresource}" if permission.subresource else "")
    role = f"a Role in {permission.namespace}" if permission.namespace else "the ClusterRole"
    return f'grant verbs ["{permission.verb}"] on resources ["{what}"] in {role} of our account (deploy/rbac.yaml)'


async def _granted_in_vain(client: KubeClient, unwanted: Sequence[Permission]) -> list[Finding]:
    try:
        answers = await asyncio.gather(*(_is_allowed(client, one) for one in unwanted))
    except ClusterError:
        return []  # told already, by the permissions that are needed
    granted = [str(one) for one, is_allowed in zip(unwanted, answers, strict=True) if is_allowed]
    if not granted:
        return []
    return [
        warn(
            "nodes/proxy",
            f"allowed, and never needed: {', '.join(granted)}",
            "it lets its holder run commands in every container: take nodes/proxy out of our account's "
            "role (an administrator's kubeconfig has it too; check with the account that will run)",
        )
    ]


async def _is_allowed(client: KubeClient, permission: Permission) -> bool:
    return await client.can_i(
        permission.verb,
        permission.resource,
        subresource=permission.subresource,
        namespace=permission.namespace,
        group=permission.group,
        name=permission.name,
    )


async def check_identity(client: KubeClient) -> tuple[Finding, str]:
    """Read the UID that identifies the cluster, empty if it cannot be read."""
    name = "cluster uid"
    try:
        uid = await client.namespace_uid(IDENTITY_NAMESPACE)
    except ClusterError as error:
        return fail(name, str(error)), ""
    if uid:
        return ok(name, uid), uid
    return warn(
        name,
        f"the namespace {IDENTITY_NAMESPACE} may not be read: two clusters of one CLUSTER_NAME cannot be told apart",
        f'grant verbs ["get"] on resources ["namespaces"] with resourceNames ["{IDENTITY_NAMESPACE}"]',
    ), ""


async def some_nodes(client: KubeClient) -> list[Node]:
    """Return the Nodes of one page, empty where they cannot be listed (the permissions tell why)."""
    try:
        async for page in client.pages(Kind.NODE, page_size=MOST_NODES):
            return [item for item in page.items if isinstance(item, Node)]
    except ClusterError:
        pass
    return []
