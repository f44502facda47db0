"""Ownership: which of Consul's services belong to this registrar, and what it may change of them. Pure."""

from enum import Enum, StrEnum

import msgspec

from k8s_consul_registrar.model import MANAGED_BY, TARGET_KINDS, Kind, ObjectKey, Service
from k8s_consul_registrar.targets.endpoints import endpoints_key
from k8s_consul_registrar.targets.service_names import kind_of_id, pod_of_id


class Policy(StrEnum):
    """The changes of Consul that are allowed."""

    SYNC = "sync"
    UPSERT_ONLY = "upsert-only"  # nothing is removed
    OBSERVE = "observe"  # nothing is written at all

    @property
    def removes(self) -> bool:
        """True if services may be removed."""
        return self is Policy.SYNC

    @property
    def writes(self) -> bool:
        """True if anything may be written."""
        return self is not Policy.OBSERVE


class Claim(Enum):
    """Owner of a service: this registrar, the original program for this cluster, or anything else."""

    OURS = "ours"
    LEGACY = "legacy"
    FOREIGN = "foreign"


class Identity(msgspec.Struct, frozen=True):
    """The registrar's own names, by which it knows its services.

    `covers_cluster` is True if no instance name, selector or namespace narrows what is watched, so that what
    is not desired here is desired nowhere. `has_default_name` is True if the cluster was not named: another
    cluster may carry the same default, so the name proves nothing.
    """

    cluster: str
    instance: str = ""
    previous_clusters: frozenset[str] = frozenset()
    previous_instances: frozenset[str] = frozenset()
    covers_cluster: bool = True
    has_default_name: bool = False

    def claim(self, service: Service, cluster_uid: str) -> Claim:
        """Return the owner of a service; `cluster_uid` is empty while it is unknown.

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

    def may_remove(self, claim: Claim, recorded_uid: str, cluster_uid: str) -> bool:
        """Return whether a service that is no longer desired is this registrar's to remove.

        `recorded_uid` is the cluster UID in the service's meta.
        """
        if claim is Claim.FOREIGN:
            return False
        if self.has_default_name and not (cluster_uid and recorded_uid == cluster_uid):
            return False
        return claim is Claim.OURS or self.covers_cluster


def kind_of(service: Service) -> Kind | None:
    """Return the kind of object that a service stands for, None if it does not say."""
    given = service.value("kind")
    return Kind(given) if given in TARGET_KINDS else kind_of_id(service.id)


def object_of(service: Service) -> ObjectKey | None:
    """Return the object that a service stands for; None for a Node that the original program registered."""
    match kind_of(service):
        case Kind.POD:
            namespace, pod = service.value("namespace"), service.value("pod")
            if pod:
                return ObjectKey(Kind.POD, namespace, pod)
            return pod_of_id(service.id, namespace)
        case Kind.ENDPOINT if name := service.value("service"):
            return endpoints_key(service.value("namespace"), name)
        case Kind.NODE if node := service.value("node"):
            return ObjectKey(Kind.NODE, "", node)
    return None


def holder_of(service: Service) -> str:
    """Describe the owner of a foreign service."""
    named = {key: service.value(key) for key in ("managed_by", "cluster", "instance", "cluster_uid")}
    return (
        ", ".join(f"{key}={value}" for key, value in named.items() if value) or "a service without our meta"
    )


def is_of_a_registrar(service: Service) -> bool:
    """Return whether any registrar wrote a service: another cluster's, another instance's or the original.

    Registrars may share a name, since meta shows whose each service is.
    """
    manager = service.value("managed_by")
    if manager:
        return manager == MANAGED_BY
    return bool(service.value("cluster")) and kind_of_id(service.id) is not None
