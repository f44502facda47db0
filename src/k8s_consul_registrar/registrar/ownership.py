"""Tells which of Consul's services are ours, and which of those may be removed."""

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from k8s_consul_registrar.model import MANAGED_BY, Kind, ObjectKey, Service, Target
from k8s_consul_registrar.targets.service_ids import kind_of_id, pod_of_id
from k8s_consul_registrar.targets.service_names import sharded_name, sharded_tags


class Claim(Enum):
    """Whose a service is: ours, the original program's for our cluster, or somebody else's."""

    OURS = "ours"
    LEGACY = "legacy"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this registrar is, and therefore which services it answers for.

    `speaks_for_cluster` says that no instance name, selector or namespace narrows what is followed, so
    that what is not wanted here is wanted nowhere. `has_default_name` says that the cluster was not
    named: another cluster may carry the same default, so the name proves nothing.
    """

    cluster: str
    instance: str = ""
    previous_clusters: frozenset[str] = frozenset()
    previous_instances: frozenset[str] = frozenset()
    speaks_for_cluster: bool = True
    has_default_name: bool = False

    def claim(self, service: Service, cluster_uid: str) -> Claim:
        """Say whose a service is; `cluster_uid` is empty while it is not known.

        A UID that differs outweighs every name: it is another cluster.
        """
        recorded_uid = service.value("cluster_uid")
        if recorded_uid and cluster_uid and recorded_uid != cluster_uid:
            return Claim.FOREIGN
        manager, cluster = service.value("managed_by"), service.value("cluster")
        if not manager:
            is_legacy = cluster == self.cluster and kind_of_id(service.id) is not None
            return Claim.LEGACY if is_legacy else Claim.FOREIGN
        if manager != MANAGED_BY:
            return Claim.FOREIGN
        is_cluster = cluster == self.cluster or cluster in self.previous_clusters
        instance = service.value("instance")
        is_instance = instance == self.instance or instance in self.previous_instances
        return Claim.OURS if is_cluster and is_instance else Claim.FOREIGN

    def may_remove(self, service: Service, claim: Claim, cluster_uid: str) -> bool:
        """Whether a service that is no longer wanted is ours to remove."""
        if claim is Claim.FOREIGN:
            return False
        if self.has_default_name and not (cluster_uid and service.value("cluster_uid") == cluster_uid):
            return False
        return claim is Claim.OURS or self.speaks_for_cluster

    def service(self, target: Target, shard: str, cluster_uid: str, index: int = 0) -> Service:
        """Make the service of a target: whose it is and where it belongs are added, the shard filled in.

        `index` is that of the record it replaces.
        """
        added = _added_meta(self.cluster, cluster_uid, self.instance, shard)
        return Service(
            id=target.id,
            name=sharded_name(target.name, shard),
            address=target.address,
            port=target.port,
            meta=tuple(sorted((*target.meta, *added))),
            tags=sharded_tags(target.tags, shard),
            index=index,
            ready=target.ready,
        )


@lru_cache(maxsize=256)
def _added_meta(cluster: str, cluster_uid: str, instance: str, shard: str) -> tuple[tuple[str, str], ...]:
    added = {
        "cluster": cluster,
        "cluster_uid": cluster_uid,
        "instance": instance,
        "managed_by": MANAGED_BY,
        "shard_path": shard,
    }
    return tuple((key, value) for key, value in added.items() if value)


def kind_of(service: Service) -> Kind | None:
    """Tell whether a service of ours stands for a Pod or a Node."""
    try:
        return Kind(service.value("kind"))
    except ValueError:
        return kind_of_id(service.id)


def object_of(service: Service) -> ObjectKey | None:
    """Name the object a service of ours stands for; None for a Node the original program registered."""
    match kind_of(service):
        case Kind.POD:
            namespace, pod = service.value("namespace"), service.value("pod")
            if pod:
                return ObjectKey(Kind.POD, namespace, pod)
            return pod_of_id(service.id, namespace)
        case Kind.NODE if node := service.value("node"):
            return ObjectKey(Kind.NODE, "", node)
    return None
