"""The deployment with `deploy/overlays/two-replicas`: two that may take turns, and no agent."""

import os
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from k8s_consul_registrar.settings.reading import settings_of
from support.files import DEPLOY

OVERLAY = DEPLOY / "overlays" / "two-replicas"
REGISTRAR = "k8s-consul-registrar"
Objects = dict[tuple[str, str], dict[str, Any]]


def by_name(text: str) -> Objects:
    """Return objects by kind and name."""
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def added() -> Objects:
    """Return the objects that the overlay adds."""
    return by_name((OVERLAY / "election.yaml").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """Return every object as kustomize builds them."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on PATH")
    folder = tmp_path_factory.mktemp("kustomize")
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(DEPLOY, folder)],
        "components": [os.path.relpath(OVERLAY, folder)],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    done = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return by_name(done.stdout)


@pytest.fixture
def deployment(built: Objects) -> dict[str, Any]:
    """Return the spec of the registrar's Deployment."""
    spec: dict[str, Any] = built["Deployment", REGISTRAR]["spec"]
    return spec


def environment(deployment: dict[str, Any]) -> dict[str, str]:
    """Return the registrar's variables."""
    (container,) = deployment["template"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"]}


def test_built_objects_fit_the_schemas(built: Objects) -> None:
    """Each object passes the API's schemas, strictly."""
    version = kubernetes_validate.latest_version()
    for each in built.values():
        kubernetes_validate.validate(each, version, strict=True)


def test_added_objects_fit_the_schemas(added: Objects) -> None:
    """The same for the overlay's own objects, with or without kubectl."""
    version = kubernetes_validate.latest_version()
    assert {kind for kind, _ in added} == {"Role", "RoleBinding", "PodDisruptionBudget"}
    for each in added.values():
        kubernetes_validate.validate(each, version, strict=True)


def test_role_allows_one_lease_and_no_more(added: Objects) -> None:
    """Get and update of the one Lease by name; creating cannot be restricted to a name."""
    lease = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"]}
    assert added["Role", "k8s-consul-registrar-election"]["rules"] == [
        {**lease, "resourceNames": ["k8s-consul-registrar"], "verbs": ["get", "update"]},
        {**lease, "verbs": ["create"]},
    ]


def test_role_is_the_registrar_s_where_it_runs(added: Objects, built: Objects) -> None:
    """Role, binding and Lease are in the Pods' own namespace, which is where the Lease is looked for."""
    binding = added["RoleBinding", "k8s-consul-registrar-election"]
    account = built["Deployment", REGISTRAR]["spec"]["template"]["spec"]["serviceAccountName"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "default"}]
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == (
        "Role",
        "k8s-consul-registrar-election",
    )
    assert {each["metadata"]["namespace"] for each in added.values()} == {"default"}
    assert built["Deployment", REGISTRAR]["metadata"]["namespace"] == "default"


def test_two_elect_the_one_that_writes_the_catalog(deployment: dict[str, Any], added: Objects) -> None:
    """Two replicas with the same Lease, which the Role names, the catalog backend, and variables that exist."""
    given = environment(deployment)
    assert deployment["replicas"] == 2
    (named, _) = added["Role", "k8s-consul-registrar-election"]["rules"]
    assert (given["LEADER_ELECTION"], [given["LEASE_NAME"]]) == ("true", named["resourceNames"])
    assert given["CONSUL_BACKEND"] == "catalog"
    assert not given["CONSUL_ADDRESS"].startswith("127.")
    assert given.pop("MODE") == "registrar"
    assert given.keys() <= {option.env for option in settings_of("registrar")} | {"CONSUL_BACKEND"}


def test_nothing_of_the_agent_is_left(built: Objects, deployment: dict[str, Any]) -> None:
    """No sidecar, no volume, no claim, no group for its files; the API credentials stay as they were."""
    pod = deployment["template"]["spec"]
    assert [each["name"] for each in pod["containers"]] == [REGISTRAR]
    assert [each["name"] for each in pod["volumes"]] == ["api-access"]
    assert [kind for kind, _ in built if kind == "PersistentVolumeClaim"] == []
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_one_is_always_there(deployment: dict[str, Any], added: Objects) -> None:
    """A roll-out starts the new before it ends the old, a drain takes one, and they prefer two nodes."""
    assert deployment["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }
    budget = added["PodDisruptionBudget", REGISTRAR]["spec"]
    labels = deployment["selector"]["matchLabels"]
    assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    (preferred,) = deployment["template"]["spec"]["affinity"]["podAntiAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    assert preferred["podAffinityTerm"] == {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": labels},
    }


def test_proxy_is_as_it_was(built: Objects) -> None:
    """The overlay changes the registrar alone."""
    base = by_name((DEPLOY / "deployment-svc.yaml").read_text())
    assert built["Deployment", "k8s-consul-registrar-svc"] == base["Deployment", "k8s-consul-registrar-svc"]


def test_placeholder_is_marked_change() -> None:
    """Every placeholder's line says CHANGE."""
    lines = (OVERLAY / "registrar.yaml").read_text().splitlines()
    assert [line for line in lines if "example" in line and "# CHANGE" not in line] == []
