"""Every setting there is."""

from collections.abc import Iterator, Mapping

from k8s_consul_registrar.settings.backend_options import BACKEND_OPTIONS, HTTP_SD_OPTIONS
from k8s_consul_registrar.settings.option import BOTH_MODES as _BOTH
from k8s_consul_registrar.settings.option import PROXY_ONLY as _PROXY
from k8s_consul_registrar.settings.option import REGISTRAR, Option
from k8s_consul_registrar.settings.option import REGISTRAR_ONLY as _REGISTRAR
from k8s_consul_registrar.settings.proxy_options import (
    IDENTITY_OPTIONS,
    INBOUND_OPTIONS,
    POD_OPTIONS,
    REACHING_OPTIONS,
)
from k8s_consul_registrar.settings.target_options import NAMING_OPTIONS, SELECTION_OPTIONS

OPTIONS: tuple[Option, ...] = (
    Option(
        "KUBECONFIG",
        "kubeconfig file, or several with ':' between them, merged as kubectl does. Without it the service "
        "account is used inside a cluster, and ~/.kube/config elsewhere",
        _BOTH,
    ),
    Option(
        "CLUSTER_NAME",
        "this cluster's name in Consul: letters, digits, '.', '_', '-', at most 50. While it is the default "
        "nothing is deregistered that the cluster's UID does not prove ours",
        _REGISTRAR,
        "default-cluster",
    ),
    Option(
        "PREVIOUS_CLUSTER_NAMES",
        "comma-separated names this cluster had; what was written under them counts as ours",
        _REGISTRAR,
    ),
    Option("INSTANCE", "tells apart several registrars of one cluster; part of what is ours", _REGISTRAR),
    Option(
        "PREVIOUS_INSTANCES",
        'comma-separated instances whose services are adopted; "" (two quotes) names the empty one',
        _REGISTRAR,
    ),
    Option(
        "CONSUL_ADDRESS",
        "Consul: host:port, http://…, https://… or unix:///path; before CONSUL_HTTP_ADDR",
        _REGISTRAR,
        "127.0.0.1:8500",
    ),
    Option("CONSUL_HTTP_ADDR", "Consul's own variable for its address", _REGISTRAR),
    Option("CONSUL_HTTP_TOKEN", "Consul ACL token (environment only)", _REGISTRAR, is_secret=True),
    Option("CONSUL_HTTP_TOKEN_FILE", "file with the Consul ACL token, read again as it changes", _REGISTRAR),
    Option("CONSUL_HTTP_SSL", "true: https where the address names no scheme", _REGISTRAR, "false"),
    Option("CONSUL_HTTP_SSL_VERIFY", "false: accept any certificate of Consul", _REGISTRAR, "true"),
    Option("CONSUL_CACERT", "file with the authority that signs Consul's certificate", _REGISTRAR),
    Option("CONSUL_CLIENT_CERT", "file with our certificate for Consul", _REGISTRAR),
    Option("CONSUL_CLIENT_KEY", "file with the key of that certificate", _REGISTRAR),
    Option("CONSUL_TLS_SERVER_NAME", "name expected in Consul's certificate", _REGISTRAR),
    Option("CONSUL_NAMESPACE", "Consul Enterprise namespace", _REGISTRAR),
    Option("CONSUL_PARTITION", "Consul Enterprise admin partition", _REGISTRAR),
    Option(
        "SYNC_PERIOD",
        "seconds between full passes; the default stands in for an invalid one",
        _REGISTRAR,
        "600",
    ),
    *BACKEND_OPTIONS,
    *HTTP_SD_OPTIONS,
    *SELECTION_OPTIONS,
    *NAMING_OPTIONS,
    Option(
        "PROXY_NODE_PORT", "NodePort of the proxy, the port Nodes are registered with", _REGISTRAR, "31112"
    ),
    *REACHING_OPTIONS,
    Option(
        "BRAKE_CONFIRM", "seconds that lists must agree on a mass removal before it is done", _REGISTRAR, "60"
    ),
    Option(
        "BRAKE_CONFIRM_START",
        "the same for a source that turns out empty, or on the first list after a start",
        _REGISTRAR,
        "600",
    ),
    Option(
        "ORPHAN_AFTER",
        "seconds an agent must be seen lost before our services at its node are removed, 1 or more; with "
        "CONSUL_BACKEND=agent alone",
        _REGISTRAR,
        "600",
    ),
    Option("ALLOW_MASS_DEREGISTER", "true: mass removals are not held", _REGISTRAR, "false"),
    Option(
        "LEADER_ELECTION",
        "true: of several replicas one writes, whoever holds a Lease; needs the catalog backend",
        _REGISTRAR,
        "false",
    ),
    Option(
        "LEASE_NAME", "name of that Lease; default one of the cluster's name and the instance", _REGISTRAR
    ),
    Option("LEASE_NAMESPACE", "namespace of that Lease; default the Pod's own", _REGISTRAR),
    Option(
        "LEASE_DURATION", "whole seconds after which a Lease nobody renews is taken over", _REGISTRAR, "15"
    ),
    Option(
        "LEASE_RENEW_DEADLINE",
        "seconds after the last renewal when a leader stops writing; below LEASE_DURATION",
        _REGISTRAR,
        "10",
    ),
    Option(
        "LEASE_RETRY_PERIOD",
        "seconds between renewals, and between tries of those that wait; 1.2 times it is below "
        "LEASE_RENEW_DEADLINE",
        _REGISTRAR,
        "2",
    ),
    Option(
        "CONSUL_AGENT_SHARED",
        "true: all replicas use one agent, so they may elect a leader without the catalog backend",
        _REGISTRAR,
        "false",
    ),
    Option("PORT", "HTTP port of the proxy, on IPv4 and IPv6", _PROXY, "8080"),
    Option(
        "KUBELET_CA_FILE",
        "file with the authority that signs the kubelets' certificates; default the cluster's",
        _PROXY,
    ),
    Option("KUBELET_INSECURE_SKIP_TLS_VERIFY", "true: accept any certificate of a kubelet", _PROXY, "false"),
    Option(
        "KUBELET_TLS_SERVER_NAME",
        "what a kubelet's certificate must name: 'ip', the address it is reached at, or 'node', its Node",
        _PROXY,
        "ip",
    ),
    *IDENTITY_OPTIONS,
    Option(
        "PROXY_PATHS",
        "comma-separated kubelet paths to relay beside /metrics/cadvisor: /metrics, /metrics/resource, "
        "/metrics/probes",
        _PROXY,
    ),
    Option(
        "PROXY_ALLOW_LOOPBACK", "true: Nodes at loopback addresses are reached (for trying)", _PROXY, "false"
    ),
    Option(
        "PROXY_BEARER_TOKEN_FILE",
        "file with a token that every scrape must carry as 'Authorization: Bearer'; of several, one a line, each "
        "is good",
        _PROXY,
    ),
    *INBOUND_OPTIONS,
    *POD_OPTIONS,
    Option(
        "STALE_NODES_MAX",
        "seconds the last known Nodes and Pods are served without the API server",
        _PROXY,
        "3600",
    ),
    Option("SCRAPE_TIMEOUT_MAX", "longest scrape in seconds, whatever the caller announces", _PROXY, "120"),
    Option("SCRAPE_CONCURRENCY_PER_NODE", "scrapes under way at one Node; further ones wait", _PROXY, "8"),
    Option("SCRAPE_CONCURRENCY", "scrapes under way in all; further ones wait", _PROXY, "512"),
    Option(
        "PROXY_WORKERS",
        "processes that relay, for more than one core; beyond 1 each has its share of the limits above",
        _PROXY,
        "1",
    ),
    Option("DRAIN_DELAY", "seconds the proxy still accepts after SIGTERM", _PROXY, "3"),
    Option("SHUTDOWN_GRACE", "seconds scrapes under way may take after that", _PROXY, "25"),
    Option("ADMIN_PORT", "port of /healthz, /readyz and /metrics; 0 for one the system picks", _BOTH, "8081"),
    Option("LOG_LEVEL", "debug, info, warning or error", _BOTH, "info"),
    Option("LOG_FORMAT", "json or console; console on a terminal, else json", _BOTH),
)


def options_of(mode: str) -> Iterator[Option]:
    """Yield the settings a mode heeds."""
    return (option for option in OPTIONS if mode in option.modes)


def shown_settings(environment: Mapping[str, str], mode: str = REGISTRAR) -> dict[str, str]:
    """Return every setting of a mode as anyone may see it: of a secret only whether it is set."""
    shown = {}
    for option in options_of(mode):
        given = environment.get(option.env, "").strip()
        shown[option.env] = ("set" if given else "not set") if option.is_secret else given or option.default
    return shown
