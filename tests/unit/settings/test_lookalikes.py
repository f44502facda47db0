"""Names that resemble a setting: those that are mistakes are found, and everyday variables are not."""

import re

import pytest

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.settings.lookalikes import lookalikes, nearest
from k8s_consul_registrar.settings.reading import SETTINGS, read_proxy, read_registrar

NAMES = {one.env for one in SETTINGS}

MISTAKES = {
    # a word too few
    "KUBELET_INSECURE_SKIP_VERIFY": "KUBELET_INSECURE_SKIP_TLS_VERIFY",
    "KUBELET_INSECURE_TLS": "KUBELET_INSECURE_SKIP_TLS_VERIFY",
    "CONSUL_TOKEN": "CONSUL_HTTP_TOKEN",
    "CONSUL_TOKEN_FILE": "CONSUL_HTTP_TOKEN_FILE",
    "CONSUL_SSL_VERIFY": "CONSUL_HTTP_SSL_VERIFY",
    "TLS_CERT": "TLS_CERT_FILE",
    "TLS_KEY": "TLS_KEY_FILE",
    "KUBELET_CA": "KUBELET_CA_FILE",
    "POD_SELECTOR": "POD_LABEL_SELECTOR",
    "SCRAPE_TIMEOUT": "SCRAPE_TIMEOUT_MAX",
    "STALE_NODES": "STALE_NODES_MAX",
    # a word too many
    "CONSUL_CACERT_FILE": "CONSUL_CACERT",
    "LEASE_DURATION_SECONDS": "LEASE_DURATION",
    "LEADER_ELECTION_ENABLED": "LEADER_ELECTION",
    "SHUTDOWN_GRACE_PERIOD": "SHUTDOWN_GRACE",
    # words in another order
    "KUBELET_INSECURE_TLS_SKIP_VERIFY": "KUBELET_INSECURE_SKIP_TLS_VERIFY",
    # cut off
    "CONSUL_ADDR": "CONSUL_ADDRESS",
    "LEADER_ELECT": "LEADER_ELECTION",
    "BRAKE_CONFIRMATION": "BRAKE_CONFIRM",
    # misspelt
    "CLUTSER_NAME": "CLUSTER_NAME",
    "CLUSTERNAME": "CLUSTER_NAME",
    "CLUSTER_NAMES": "CLUSTER_NAME",
    "NAMESPACE": "NAMESPACES",
    "SHARD_PATH": "SHARD_PATHS",
    "PROXY_POD": "PROXY_PODS",
    "SYNC_PERIODS": "SYNC_PERIOD",
    "KUBE_CONFIG": "KUBECONFIG",
    "CONSUL_CA_CERT": "CONSUL_CACERT",
    "ANNOTATIONS_PREFIX": "ANNOTATION_PREFIX",
    "LOGLEVEL": "LOG_LEVEL",
}
EVERYDAY = [
    "HOME",
    "PATH",
    "PWD",
    "OLDPWD",
    "SHLVL",
    "TERM",
    "LANG",
    "LC_ALL",
    "HOSTNAME",
    "USER",
    "LOGNAME",
    "SHELL",
    "TZ",
    "EDITOR",
    "PAGER",
    "MAIL",
    "DISPLAY",
    "TMPDIR",
    "PS1",
    "_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "FTP_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "PYTHONHASHSEED",
    "PYTHON_VERSION",
    "PYTHON_SHA256",
    "PYTHONDONTWRITEBYTECODE",
    "GPG_KEY",
    "VIRTUAL_ENV",
    "KUBERNETES_SERVICE_HOST",
    "KUBERNETES_PORT",
    "KUBERNETES_NAMESPACE",
    "KUBERNETES_POD_NAME",
    "POD_NAME",
    "POD_NAMESPACE",
    "POD_IP",
    "POD_UID",
    "POD_CIDR",
    "POD_SERVICE_ACCOUNT",
    "NODE_NAME",
    "NODE_IP",
    "HOST_IP",
    "SERVICE_ACCOUNT",
    "SERVICE_NAME",
    "SERVICE_ID",
    "SERVICE_PORT",
    "HTTP_PORT",
    "HTTP_HOST",
    "PROXY_PORT",
    "PROXY_URL",
    "PROXY_HOST",
    "PROXY_USER",
    "HOST",
    "CONSUL_HTTP_AUTH",
    "CONSUL_CAPATH",
    "CONSUL_GRPC_ADDR",
    "CONSUL_GRPC_CACERT",
    "CONSUL_GRPC_CAPATH",
    "CONSUL_LICENSE",
    "CONSUL_VERSION",
    "CONSUL_DATACENTER",
    "CONSUL_LOCAL_CONFIG",
    "CONSUL_CLIENT_INTERFACE",
    "CONSUL_BIND_INTERFACE",
    "CONSUL_DATA_DIR",
    "CONSUL_CONFIG_DIR",
    "CLUSTER_ID",
    "CLUSTER_DOMAIN",
    "CLUSTER_CIDR",
    "K8S_CLUSTER_NAME",
    "EKS_CLUSTER_NAME",
    "WATCH_NAMESPACE",
    "OPERATOR_NAME",
    "OTEL_LOG_LEVEL",
    "OTEL_SERVICE_NAME",
    "RUST_LOG",
    "LOG_FILE",
    "LOG_DIR",
    "LOG_PATH",
    "LOGS",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "AWS_REGION",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AZURE_CLIENT_ID",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "NODE_ENV",
    "NODE_OPTIONS",
    "NODE_PATH",
    "NODE_VERSION",
    "NODE_EXTRA_CA_CERTS",
    "TLS_VERSION",
    "TLS_ENABLED",
    "TLS_MIN_VERSION",
    "SCRAPE_INTERVAL",
    "LEASE_ID",
    "INSTANCE_ID",
    "INSTANCE_TYPE",
    "DISCOVERY_URL",
    "ADMIN_USER",
    "ADMIN_PASSWORD",
    "ADMIN_TOKEN",
    "SHARD",
    "SHARD_ID",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "NO_COLOR",
    "COLUMNS",
    "CI",
    "MODE",
    "PORTAL",
    "SPORT",
]


@pytest.mark.parametrize(("name", "meant"), MISTAKES.items())
def test_mistaken_name_leads_to_the_setting_first(name: str, meant: str) -> None:
    """In whatever way it is mistaken."""
    assert nearest(name, NAMES)[0] == meant
    assert lookalikes({name: "x"}, NAMES)[name][0] == meant


@pytest.mark.parametrize("name", EVERYDAY)
def test_everyday_variable_resembles_no_setting(name: str) -> None:
    """Of systems, languages, Kubernetes manifests, and Consul itself."""
    assert lookalikes({name: "x"}, NAMES) == {}


@pytest.mark.parametrize(
    "service",
    [
        *sorted(name.replace("_", "-").lower() for name in NAMES),
        *("consul", "consul-http", "admin", "proxy", "log", "tls", "pod", "node", "http-sd", "sync", "lease"),
        *("k8s-consul-registrar", "k8s-consul-registrar-svc", "kubelet", "cluster", "kubernetes"),
    ],
)
def test_variables_of_a_service_resemble_no_setting(service: str) -> None:
    """Kubernetes sets these for every Service of the namespace, even one that is named like a setting."""
    name = service.upper().replace("-", "_")
    links = {
        f"{name}_SERVICE_HOST": "192.0.2.1",
        f"{name}_SERVICE_PORT": "8500",
        f"{name}_SERVICE_PORT_HTTP_METRICS": "8500",
        f"{name}_PORT": "tcp://192.0.2.1:8500",
        f"{name}_PORT_8500_TCP": "tcp://192.0.2.1:8500",
        f"{name}_PORT_8500_TCP_ADDR": "192.0.2.1",
        f"{name}_PORT_8500_TCP_PORT": "8500",
        f"{name}_PORT_8500_TCP_PROTO": "tcp",
    }
    assert lookalikes(links, NAMES) == {}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_misspelling_of_a_long_name_is_found(name: str) -> None:
    """A letter missing, doubled or swapped with the next, anywhere but at the start; no underscore counts."""
    if len(name.replace("_", "")) < 6:
        return
    for i in range(1, len(name) - 1):
        for wrong in (name[:i] + name[i + 1 :], name[:i] + name[i] * 2 + name[i + 1 :]):
            assert wrong in NAMES or name in nearest(wrong, NAMES), wrong
        swapped = name[:i] + name[i + 1] + name[i] + name[i + 2 :]
        assert swapped in NAMES or name in nearest(swapped, NAMES), swapped


def test_no_setting_resembles_another() -> None:
    """A setting is never reported, whichever mode it belongs to."""
    assert lookalikes(dict.fromkeys(NAMES, "x"), NAMES) == {}
    assert read_proxy({"CLUSTER_NAME": "lab", "CONSUL_ADDRESS": "c:1"}).common.warnings == ()


def test_lookalike_is_a_warning_that_names_the_setting_and_no_value() -> None:
    """In both modes, and beside the other warnings."""
    environment = {"CLUSTER_NAME": "lab", "KUBELET_INSECURE_SKIP_VERIFY": "s3cr3t", "CONSUL_TOKEN": "s3cr3t"}
    for settings in (read_registrar(environment), read_proxy(environment)):
        first, second = settings.common.warnings
        assert (
            first
            == "KUBELET_INSECURE_SKIP_VERIFY is not a setting: KUBELET_INSECURE_SKIP_TLS_VERIFY is meant?"
        )
        assert re.match(r"CONSUL_TOKEN is not a setting: CONSUL_HTTP_TOKEN", second)
        assert "s3cr3t" not in first + second


def test_variable_that_a_service_sets_is_explained() -> None:
    """A Service named `admin` sets ADMIN_PORT to a URL unless service links are disabled."""
    with pytest.raises(SettingsError) as raised:
        read_proxy({"ADMIN_PORT": "tcp://192.0.2.1:80"})
    (problem,) = raised.value.problems
    assert problem.startswith("ADMIN_PORT: 'tcp://192.0.2.1:80' is not a whole number")
    assert problem.endswith("set enableServiceLinks to false")
