"""The proxy's settings for callers, kubelets and Pods: what goes together and what is refused."""

import pytest

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.model import Kind, Selector, Source
from k8s_consul_registrar.settings.reading import read_proxy, read_registrar
from k8s_consul_registrar.wiring.registrar import Wiring


def problems(**environment: str) -> dict[str, str]:
    """Return the proxy's mistakes by the variable they name."""
    with pytest.raises(SettingsError) as raised:
        read_proxy(environment)
    return dict(text.split(": ", 1) for text in raised.value.problems)


def test_open_port_by_default() -> None:
    """No client needs credentials, and no Pod is relayed."""
    settings = read_proxy({})
    assert (settings.inbound.is_authenticated, settings.inbound.cert_file, settings.pods) == (False, "", None)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ("TLS_CERT_FILE", "TLS_KEY_FILE"),
        ("TLS_KEY_FILE", "TLS_CERT_FILE"),
        ("KUBELET_CLIENT_CERT_FILE", "KUBELET_CLIENT_KEY_FILE"),
        ("KUBELET_CLIENT_KEY_FILE", "KUBELET_CLIENT_CERT_FILE"),
    ],
)
def test_certificate_and_its_key(given: str, missing: str) -> None:
    """One without the other is a mistake."""
    assert set(problems(**{given: "/file"})) == {missing}


def test_client_certificates_need_tls() -> None:
    """Without TLS no caller has one: the port would be open."""
    assert "TLS_CLIENT_CA_FILE" in problems(TLS_CLIENT_CA_FILE="/ca")


@pytest.mark.parametrize(
    "proof",
    [
        {"PROXY_BEARER_TOKEN_FILE": "/token"},
        {"TLS_CLIENT_CA_FILE": "/ca", "TLS_CERT_FILE": "/c", "TLS_KEY_FILE": "/k"},
    ],
)
def test_pods_need_callers_that_show_who_they_are(proof: dict[str, str]) -> None:
    """Without a proof it is a mistake by name; a certificate of our own alone proves nothing of the caller."""
    assert set(problems(PROXY_PODS="true")) == {"PROXY_PODS"}
    assert "PROXY_PODS" in problems(PROXY_PODS="true", TLS_CERT_FILE="/c", TLS_KEY_FILE="/k")
    assert read_proxy({"PROXY_PODS": "true", **proof}).pods is not None


def test_pods_without_bearer_are_served_by_choice() -> None:
    """The operator may open them, and a warning says what that means."""
    settings = read_proxy({"PROXY_PODS": "true", "PROXY_PODS_ANONYMOUS": "true"})
    assert settings.pods is not None
    assert "PROXY_PODS_ANONYMOUS" in settings.common.warnings[0]


def test_which_pods() -> None:
    """Namespaces, labels and annotations select for the proxy as for the registrar."""
    environment = {
        "PROXY_PODS": "true",
        "PROXY_BEARER_TOKEN_FILE": "/token",
        "NAMESPACES": "shop,pay",
        "EXCLUDE_NAMESPACES": "ci",
        "POD_LABEL_SELECTOR": "tier=web",
        "ANNOTATION_PREFIX": "scrape.example/",
    }
    pods = read_proxy(environment).pods
    assert pods is not None
    assert pods.sources == (Source(Kind.POD, "shop"), Source(Kind.POD, "pay"))
    assert (pods.pod_label_selector, pods.annotation_prefix) == ("tier=web", "scrape.example/")
    assert "NAMESPACES" in problems(**{**environment, "NAMESPACES": "a_b"})
    assert pods.pod_selector == Selector("tier=web")
    others = read_proxy({**environment, "NAMESPACES": ""}).pods
    assert others is not None
    assert others.pod_selector == Selector("tier=web", "metadata.namespace!=ci")


def test_setting_without_effect_is_a_warning() -> None:
    """Settings for Pods without PROXY_PODS are warned of."""
    settings = read_proxy({"POD_CA_FILE": "/ca", "PROXY_PODS_ANONYMOUS": "true"})
    assert settings.pods is None
    assert {text.split()[0] for text in settings.common.warnings} == {"POD_CA_FILE", "PROXY_PODS_ANONYMOUS"}


def test_registrars_side() -> None:
    """POD_ADDRESS and PROXY_SCHEME become rules of targets; other words are refused."""
    settings = read_registrar({"CLUSTER_NAME": "lab", "POD_ADDRESS": "proxy", "PROXY_SCHEME": "https"})
    rules = Wiring(settings).targets
    assert (rules.pods_through_proxy, rules.proxy_scheme) == (True, "https")
    rules = Wiring(read_registrar({"CLUSTER_NAME": "lab"})).targets
    assert (rules.pods_through_proxy, rules.proxy_scheme) == (False, "http")
    with pytest.raises(SettingsError) as raised:
        read_registrar({"CLUSTER_NAME": "lab", "POD_ADDRESS": "node", "PROXY_SCHEME": "ftp"})
    assert {text.partition(":")[0] for text in raised.value.problems} == {"POD_ADDRESS", "PROXY_SCHEME"}
