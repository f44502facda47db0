"""Ownership: the services that are this registrar's, and those of them that it may remove."""

import pytest

from k8s_consul_registrar.model import MANAGED_BY, Kind, ObjectKey, Service
from k8s_consul_registrar.registrar.observed import AsDesired
from k8s_consul_registrar.registrar.ownership import Claim, Identity, kind_of, object_of
from k8s_consul_registrar.targets.resolve import TargetRules, resolve_pod
from support.builders import make_pod, make_service, our_pod_service

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
def test_identity_claims_by_manager_cluster_and_instance(service: Service, claim: Claim) -> None:
    """Manager, cluster and instance together make a service ours."""
    assert LAB.claim(service, "") is claim


def test_identity_heeds_another_cluster_uid_before_every_name() -> None:
    """A UID that differs makes a service foreign, one that is not known on both sides says nothing."""
    service = our_pod_service("a", cluster_uid="one")
    assert LAB.claim(service, "one") is Claim.OURS
    assert LAB.claim(service, "two") is Claim.FOREIGN
    assert LAB.claim(service, "") is Claim.OURS
    assert LAB.claim(our_pod_service("a"), "two") is Claim.OURS


def test_identity_claims_what_its_previous_names_wrote() -> None:
    """Services of earlier settings are ours, those of the empty instance only when it is named."""
    identity = Identity(
        "lab",
        "blue",
        previous_clusters=frozenset({"old"}),
        previous_instances=frozenset({"", "green"}),
        covers_cluster=False,
    )
    assert identity.claim(our_pod_service("a", cluster="old", instance="green"), "") is Claim.OURS
    assert identity.claim(our_pod_service("a"), "") is Claim.OURS
    assert Identity("lab", "blue").claim(our_pod_service("a"), "") is Claim.FOREIGN


def test_identity_of_part_of_a_cluster_removes_nothing_of_the_original_program() -> None:
    """A registrar of a part of the cluster cannot know that a service of the original program is gone."""
    assert LAB.may_remove(Claim.LEGACY, "", "")
    of_a_part = Identity("lab", covers_cluster=False)
    assert not of_a_part.may_remove(Claim.LEGACY, "", "")
    assert of_a_part.may_remove(Claim.OURS, "", "")


def test_identity_with_the_default_name_removes_only_what_the_uid_proves() -> None:
    """Two clusters may both have left the name at its default."""
    identity = Identity("default-cluster", has_default_name=True)
    for recorded, uid in (("", "one"), ("", ""), ("one", "")):
        assert not identity.may_remove(Claim.OURS, recorded, uid)
    assert identity.may_remove(Claim.OURS, "one", "one")


def test_identity_never_removes_a_foreign_service() -> None:
    """Another owner's service is not this registrar's to remove, whatever the UID says."""
    assert not LAB.may_remove(Claim.FOREIGN, "one", "one")


def test_identity_makes_services_that_say_whose_they_are() -> None:
    """The service carries cluster, manager, UID and shard beside the target's own meta, sorted."""
    resolved = resolve_pod(make_pod("a"), TargetRules())
    assert isinstance(resolved, tuple)
    service = AsDesired(resolved[0], "s1", "uid").service(Identity("lab", "blue"))
    assert [key for key, _ in service.meta] == sorted(key for key, _ in service.meta)
    assert service == our_pod_service("a", instance="blue", shard_path="s1", cluster_uid="uid")
    assert AsDesired(resolved[0], "", "").service(LAB) == our_pod_service("a")


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
        (make_service("x", {"kind": "namespace", "namespace": "shop"}), None, None),
    ],
)
def test_service_names_its_object(service: Service, kind: Kind | None, key: ObjectKey | None) -> None:
    """Meta names the object; of the original program's services, the ID does."""
    assert (kind_of(service), object_of(service)) == (kind, key)
