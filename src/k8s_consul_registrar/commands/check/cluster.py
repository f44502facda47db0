"""Checks of the API server: that it answers, accepts the credentials, and allows what the modes do."""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands.check.report import Finding, Result, fail, ok, skipped, warn
from k8s_consul_registrar.errors import AccessError, ClusterError, ClusterForbidden, ClusterUnauthorized
from k8s_consul_registrar.kube.access import Access, load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster import IDENTITY_NAMESPACE
from k8s_consul_registrar.kube.events import GROUP as EVENT_GROUP
from k8s_consul_registrar.kube.events import NODE_NAMESPACE
from k8s_consul_registrar.kube.responses import GROUPS, RESOURCES
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

    @property
    def what(self) -> str:
        """The resource as a role names it."""
        return f"{self.resource}/{self.subresource}" if self.subresource else self.resource

    def __str__(self) -> str:
        return f"{self.verb} {self.what}{f' in {self.namespace}' if self.namespace else ''}"


def source_permissions(sources: Iterable[Source]) -> tuple[Permission, ...]:
    """Return the permissions to follow these sources."""
    return tuple(
        Permission(
            verb, RESOURCES[source.kind], namespace=source.namespace, group=GROUPS.get(source.kind, "")
        )
        for source in sources
        for verb in ("list", "watch")
    )


def lease_permissions(namespace: str, name: str) -> tuple[Permission, ...]:
    """Return the permissions to elect a leader; `create` cannot be restricted to a name."""
    lease = Permission("create", "leases", "", namespace, "coordination.k8s.io")
    return (lease, *(lease._replace(verb=verb, name=name) for verb in ("get", "update")))


def event_permissions(sources: Iterable[Source]) -> tuple[Permission, ...]:
    """Return the permissions to write Events about the objects of these sources."""
    namespaces = {NODE_NAMESPACE if one.kind is Kind.NODE else one.namespace for one in sources}
    where = {""} if "" in namespaces else namespaces
    return tuple(
        Permission(verb, "events", namespace=namespace, group=EVENT_GROUP)
        for namespace in sorted(where)
        for verb in ("create", "patch")
    )


# The overlay that grants what `deploy/rbac.yaml` does not.
OVERLAYS = {
    RESOURCES[Kind.SERVICE]: "deploy/overlays/services",
    RESOURCES[Kind.ENDPOINT]: "deploy/overlays/services",
    RESOURCES[Kind.NAMESPACE]: "deploy/overlays/namespace-labels",
    "events": "deploy/overlays/emit-events",
}
# A kubelet asks for the last before it serves its metrics (kubernetes pkg/kubelet/server/auth.go).
PROXY_PERMISSIONS = (
    Permission("list", "nodes"),
    Permission("watch", "nodes"),
    Permission("get", "nodes", "metrics"),
)
# Either lets its holder run commands in every container of a Node.
NEVER_NEEDED = (Permission("get", "nodes", "proxy"), Permission("create", "nodes", "proxy"))


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The outcome of the first look at the cluster; a part that could not be read is empty."""

    findings: tuple[Finding, ...]
    access: Access | None = None
    uid: str = ""
    nodes: tuple[Node, ...] = ()


async def check_cluster(
    environment: Mapping[str, str], timing: Timing, wanted: Sequence[Permission], *, needs_uid: bool
) -> ClusterView:
    """Check the credentials, the API server and the permissions, and read what other checks need."""
    try:
        access = load_access(environment)
    except AccessError as error:
        return ClusterView((fail("credentials", str(error), "KUBECONFIG names the kubeconfig to use"),))
    credentials = await _check_credentials(access)
    if credentials.outcome is Result.FAIL:
        return ClusterView((credentials,))
    async with KubeClient(access, timing) as client:
        server = await _check_server(client, access)
        if server.outcome is Result.FAIL:
            missed = skipped("permissions", "not checked, since the check of the API server failed")
            return ClusterView((credentials, server, missed), access)
        permissions, (uid_finding, uid), nodes = await asyncio.gather(
            _check_permissions(client, wanted),
            _check_identity(client),
            _some_nodes(client),
        )
    of_identity = [uid_finding] if needs_uid else []
    return ClusterView((credentials, server, *permissions, *of_identity), access, uid, tuple(nodes))


async def _check_credentials(access: Access) -> Finding:
    """Check that the credentials can be read; the finding names their origin."""
    name = "credentials"
    try:
        await access.credentials.identity()
    except AccessError as error:
        return fail(name, str(error), "repair the file or program that the text names")
    return ok(name, access.origin)


async def _check_server(client: KubeClient, access: Access) -> Finding:
    """Check that the API server answers; the finding has its version and how its certificate is verified."""
    name = "api server"
    try:
        version = await client.server_version()
    except ClusterUnauthorized as error:
        return fail(name, str(error), "the token or certificate is expired, revoked, or another cluster's")
    except ClusterForbidden:
        version = "and does not show its version"
    except ClusterError as error:
        return fail(name, str(error), "is this the right cluster, and may this machine reach it?")
    where = f"{access.server} answers, {version}"
    if access.trust is None:
        return warn(name, f"{where}, without TLS", "a token sent over plain HTTP can be read on the way")
    if not access.trust.is_verified:
        hint = "replace insecure-skip-tls-verify in the kubeconfig by certificate-authority"
        return warn(name, f"{where}, its certificate is not verified", hint)
    return ok(name, f"{where}, its certificate is verified by {access.trust.ca_setting or 'the system'}")


async def _check_permissions(client: KubeClient, wanted: Sequence[Permission]) -> list[Finding]:
    """Ask the API server about each permission (SelfSubjectAccessReview)."""
    needed = await asyncio.gather(*(_needed(client, one) for one in wanted))
    return [*needed, *await _unneeded(client)]


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
    role = f"a Role in {permission.namespace}" if permission.namespace else "the ClusterRole"
    where = OVERLAYS.get(permission.resource, "deploy/rbac.yaml")
    of = f' of apiGroups ["{permission.group}"]' if permission.group else ""
    grant = f'grant verbs ["{permission.verb}"] on resources ["{permission.what}"]{of} in {role}'
    return fail(name, "not allowed", f"{grant} of our account ({where})")


async def _unneeded(client: KubeClient) -> list[Finding]:
    try:
        answers = await asyncio.gather(*(_is_allowed(client, one) for one in NEVER_NEEDED))
    except ClusterError:
        return []  # the permissions that are needed show it
    granted = [str(one) for one, is_allowed in zip(NEVER_NEEDED, answers, strict=True) if is_allowed]
    if not granted:
        return []
    hint = (
        "its holder can run commands in every container: remove nodes/proxy from the account's role (an "
        "administrator's kubeconfig has it too; check as the account that will run)"
    )
    return [warn("nodes/proxy", f"allowed, and never needed: {', '.join(granted)}", hint)]


async def _is_allowed(client: KubeClient, permission: Permission) -> bool:
    verb, resource, subresource, namespace, group, name = permission
    return await client.can_i(
        verb, resource, subresource=subresource, namespace=namespace, group=group, name=name
    )


async def _check_identity(client: KubeClient) -> tuple[Finding, str]:
    """Read the UID that identifies the cluster, empty if it cannot be read."""
    name = "cluster uid"
    try:
        uid = await client.namespace_uid(IDENTITY_NAMESPACE)
    except ClusterError as error:
        return fail(name, str(error)), ""
    if uid:
        return ok(name, uid), uid
    detail = (
        f"the namespace {IDENTITY_NAMESPACE} may not be read: two clusters of one CLUSTER_NAME look the same"
    )
    hint = f'grant verbs ["get"] on resources ["namespaces"] with resourceNames ["{IDENTITY_NAMESPACE}"]'
    return warn(name, detail, hint), ""


async def _some_nodes(client: KubeClient) -> list[Node]:
    """Return the Nodes of one page, none where they cannot be listed (the permissions show why)."""
    with contextlib.suppress(ClusterError):
        async for page in client.pages(Kind.NODE, page_size=MOST_NODES):
            return [item for item in page.items if isinstance(item, Node)]
    return []
