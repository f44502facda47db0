"""A view of a controller between a cluster and a Consul in memory, as the admin endpoints have it."""

from collections.abc import Iterable, Sequence

from k8s_consul_registrar.admin.view import About, TargetRow, View
from k8s_consul_registrar.kube.cluster_uid import ClusterUid
from k8s_consul_registrar.model import Pod, Source
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.selection import SelectionRecord
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.settings.registrar import selection_digest
from k8s_consul_registrar.wiring.registrar import Wiring
from support.controller_lab import Lab
from support.memory import PODS

SETTINGS = read_registrar({"CLUSTER_NAME": "lab", "SHARD_PATHS": "s1,s2", "CONSUL_HTTP_TOKEN": "t0p-secret"})
WIRING = Wiring(SETTINGS)


class Namespaces:
    """An API server that tells a UID, None where it may not be seen."""

    def __init__(self, uid: str | None) -> None:
        self.uid = uid

    async def namespace_uid(self, name: str) -> str | None:
        """Return it."""
        return self.uid


class Seen:
    """A controller with its view; `learn` makes the cluster's UID known, as a reflector does."""

    def __init__(
        self, *, sources: Sequence[Source] = (PODS,), brake: BrakeRules | None = None, saved_uid: str = ""
    ) -> None:
        self.lab = Lab(
            shards=WIRING.shards,
            sources=sources,
            identity=WIRING.identity,
            brake=brake or BrakeRules(confirm=0.1, confirm_start=600),
        )
        self.namespaces = Namespaces("uid-1")
        self.cluster_uid = ClusterUid(self.namespaces, self.lab.controller.on_cluster_uid)
        self.selection = SelectionRecord(
            selection_digest(SETTINGS),
            catalog=None,
            cluster_uid=lambda: self.lab.desired.cluster_uid,
            saved_cluster_uid=saved_uid,
        )
        self.view = View(
            About("lab", "", "agent"), self.lab.desired, self.lab.observed, self.lab.status, self.lab.rules
        )

    def targets(self) -> dict[str, TargetRow]:
        """Return what is seen, by Pod or Node."""
        return {one.key.name: one for one in self.view.targets()}

    async def synced(self, pods: Iterable[Pod]) -> None:
        """List these Pods, and wait until everything was compared once and written."""
        self.lab.cluster.put_list(pods)
        await self.lab.until_so(lambda: self.lab.status.has_synced and self.lab.queue.is_drained)

    async def learn(self, uid: str | None = "uid-1") -> None:
        """Have the API server asked for the cluster's UID."""
        self.namespaces.uid = uid
        await self.cluster_uid.confirm()
