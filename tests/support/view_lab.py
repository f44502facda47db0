"""A view of a controller between a cluster and a Consul in memory, as the admin endpoints have it."""

from collections.abc import Sequence
from typing import Any, cast

from k8s_consul_registrar.admin.view import SeenTarget
from k8s_consul_registrar.app.view import View
from k8s_consul_registrar.kube.cluster_uid import ClusterUid
from k8s_consul_registrar.model import Source
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.selection import SelectionRecord
from k8s_consul_registrar.settings.digest import selection_digest
from k8s_consul_registrar.settings.modes import read_registrar
from k8s_consul_registrar.wiring.registrar import RegistrarParts, Wiring
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
        nothing = cast("Any", None)
        self.parts = RegistrarParts(
            controller=self.lab.controller,
            desired=self.lab.desired,
            observed=self.lab.observed,
            reflectors=nothing,
            rules=self.lab.rules,
            reporter=self.lab.reporter,
            resync=self.lab.resync,
            queue=self.lab.queue,
            registry=self.lab.consul,
            reconciler=self.lab.reconciler,
            names=self.lab.names,
            cluster_uid=self.cluster_uid,
            selection=self.selection,
        )
        self.view = View(SETTINGS, self.parts)

    def targets(self) -> dict[str, SeenTarget]:
        """Return what is seen, by Pod or Node."""
        return {one.key.name: one for one in self.view.targets()}

    async def learn(self, uid: str | None = "uid-1") -> None:
        """Have the API server asked for the cluster's UID."""
        self.namespaces.uid = uid
        await self.cluster_uid.confirm()
