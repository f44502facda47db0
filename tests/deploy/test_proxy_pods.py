"""The deployment with `deploy/overlays/proxy-pods`: Pods through the proxy, for clients that show the token."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from deploy.test_overlays import Objects, build
from k8s_consul_registrar.settings.reading import read_proxy, read_registrar

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on PATH")
PROXY = "k8s-consul-registrar-svc"


@pytest.fixture(scope="module")
def built() -> Objects:
    """Return every object as kustomize builds them."""
    return build("proxy-pods")


def container(objects: Objects, deployment: str) -> dict[str, Any]:
    """Return the container of a Deployment that is ours, named as it is."""
    pod = objects["Deployment", "default", deployment]["spec"]["template"]["spec"]
    (found,) = [one for one in pod["containers"] if one["name"] == deployment]
    assert isinstance(found, dict)
    return found


def variables(objects: Objects, deployment: str) -> dict[str, str]:
    """Return its variables."""
    return {one["name"]: one["value"] for one in container(objects, deployment)["env"]}


def test_both_modes_read_what_is_set(built: Objects) -> None:
    """The proxy relays Pods to who shows the token, the registrar registers them there, and neither complains."""
    proxy = read_proxy(variables(built, PROXY))
    assert proxy.pods is not None
    assert proxy.inbound.is_authenticated
    assert read_registrar(variables(built, "k8s-consul-registrar")).pods_through_proxy


def test_token_is_where_the_setting_says(built: Objects) -> None:
    """The Secret's volume is mounted, read-only, at the folder of PROXY_BEARER_TOKEN_FILE, readable by our user."""
    spec = built["Deployment", "default", PROXY]["spec"]["template"]["spec"]
    (volume,) = spec["volumes"]
    (mount,) = container(built, PROXY)["volumeMounts"]
    assert volume["secret"] == {"secretName": "k8s-consul-registrar-proxy-token", "defaultMode": 0o444}
    assert (mount["name"], mount["readOnly"]) == (volume["name"], True)
    assert Path(variables(built, PROXY)["PROXY_BEARER_TOKEN_FILE"]).parent == Path(mount["mountPath"])


def test_proxy_may_see_pods_and_no_more(built: Objects) -> None:
    """List and watch of pods, for the proxy's own account; no secrets, no exec, no proxy subresource."""
    role = built["ClusterRole", "", "k8s-consul-registrar-proxy-pods"]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]
    binding = built["ClusterRoleBinding", "", "k8s-consul-registrar-proxy-pods"]
    account = built["Deployment", "default", PROXY]["spec"]["template"]["spec"]["serviceAccountName"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "default"}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
