"""Which of Consul's services are ours, and which may be removed."""

import pytest

from builders import make_pod, make_service, our_pod_service
from k8s_consul_registrar.model import MANAGED_BY, Kind, ObjectKey, Service
from k8s_consul_registrar.registrar.ownership import Claim, Identity, kind_of, object_of
from k8s_consul_registrar.targets.resolve import TargetRules, resolve_pod

LAB = Identity("lab")


@pytest.mark.parametrize(
    ("service", "claim"),
    [
        (our_pod_service("a"), Claim.OURS),
        (our_pod_service("a", cluster="other"), Claim.FOREIGN),
        (our_pod_service("a", instance="blue"), Claim.FOREIGN),
        (our_pod_service("a", managed_by="consul-k8s"), Claim.FOREIGN),
        (make_service("pod--a--b", {"cluster": "lab"}), Claim.LEGACY),
        (make_service("node--1.2.3.4", {"cluster": "lab"}), Claim.LEGACY),
        (make_service("pod--a--b", {"cluster": "other"}), Claim.FOREIGN),
        (make_service("web", {"cluster": "lab"}), Claim.FOREIGN),
        (make_service("pod--a--b"), Claim.FOREIGN),
        (make_service("web", {"managed_by": MANAGED_BY}), Claim.FOREIGN),
    ],
)
def test_claim(service: Service, claim: Claim) -> None:
    """Manager, cluster and instance together make a service ours."""
    assert LAB.claim(service, "") is claim


def test_another_cluster_uid_outweighs_every_name() -> None:
    """A UID that differs makes a service foreign, one that is not known on both sides says nothing."""
    service = our_pod_service("a", cluster_uid="one")
    assert LAB.claim(service, "one") is Claim.OURS
    assert LAB.claim(service, "two") is Claim.FOREIGN
    assert LAB.claim(service, "") is Claim.OURS
    assert LAB.claim(our_pod_service("a"), "two") is Claim.OURS


def test_previous_names_count_as_ours() -> None:
    """What earlier settings wrote is ours, the empty instance only when it is named."""
    identity = Identity(
        "lab",
        "blue",
        previous_clusters=frozenset({"old"}),
        previous_instances=frozenset({"", "green"}),
        speaks_for_cluster=False,
    )
    assert identity.claim(our_pod_service("a", cluster="old", instance="green"), "") is Claim.OURS
    assert identity.claim(our_pod_service("a"), "") is Claim.OURS
    assert Identity("lab", "blue").claim(our_pod_service("a"), "") is Claim.FOREIGN


def test_legacy_is_removed_only_by_who_speaks_for_the_cluster() -> None:
    """A registrar of a part of the cluster cannot know that a service of the original program is gone."""
    legacy = make_service("pod--a--b", {"cluster": "lab"})
    assert LAB.may_remove(legacy, Claim.LEGACY, "")
    of_a_part = Identity("lab", speaks_for_cluster=False)
    assert not of_a_part.may_remove(legacy, Claim.LEGACY, "")
    assert of_a_part.may_remove(our_pod_service("a"), Claim.OURS, "")


def test_default_name_removes_only_what_the_uid_proves() -> None:
    """Two clusters may both have left the name at its default."""
    identity = Identity("default-cluster", has_default_name=True)
    unproven = our_pod_service("a", cluster="default-cluster")
    proven = our_pod_service("a", cluster="default-cluster", cluster_uid="one")
    assert not identity.may_remove(unproven, Claim.OURS, "one")
    assert not identity.may_remove(unproven, Claim.OURS, "")
    assert not identity.may_remove(proven, Claim.OURS, "")
    assert identity.may_remove(proven, Claim.OURS, "one")


def test_foreign_is_never_removed() -> None:
    """What is not ours is not ours to remove."""
    assert not LAB.may_remove(our_pod_service("a", cluster="other"), Claim.FOREIGN, "")


def test_service_of_a_target_says_whose_it_is() -> None:
    """The service carries cluster, manager, UID and shard beside the target's own meta, sorted."""
    verdict = resolve_pod(make_pod("a"), TargetRules())
    assert isinstance(verdict, tuple)
    service = Identity("lab", "blue").service(verdict[0], "s1", "uid")
    assert [key for key, _ in service.meta] == sorted(key for key, _ in service.meta)
    assert service == our_pod_service("a", instance="blue", shard_path="s1", cluster_uid="uid")
    assert LAB.service(verdict[0], "", "") == our_pod_service("a")


@pytest.mark.parametrize(
    ("service", "kind", "key"),
    [
        (our_pod_service("a"), Kind.POD, ObjectKey(Kind.POD, "shop", "a")),
        (
            make_service("pod--shop--a--b", {"namespace": "shop"}),
            Kind.POD,
            ObjectKey(Kind.POD, "shop", "a--b"),
        ),
        (make_service("pod--shop--a", {"namespace": "other"}), Kind.POD, None),
        (make_service("pod--shop--a"), Kind.POD, None),
        (make_service("node--1.2.3.4"), Kind.NODE, None),
        (make_service("x", {"kind": "node", "node": "n"}), Kind.NODE, ObjectKey(Kind.NODE, "", "n")),
        (make_service("x", {"kind": "odd"}), None, None),
    ],
)
def test_object_of(service: Service, kind: Kind | None, key: ObjectKey | None) -> None:
    """Meta names the object; of the original program's services, the ID does."""
    assert (kind_of(service), object_of(service)) == (kind, key)
