"""The settings about how Consul is written to and the cluster followed."""

from k8s_consul_registrar.settings.option import REGISTRAR_ONLY, Option

AGENT = "agent"
CATALOG = "catalog"
NONE = "none"
BACKENDS = (AGENT, CATALOG, NONE)

BACKEND_OPTIONS: tuple[Option, ...] = (
    Option(
        "CONSUL_BACKEND",
        "agent: services belong to the agent at CONSUL_ADDRESS; catalog: to a node of their own, written in "
        "transactions; none: no Consul, targets are served on HTTP_SD_PORT alone",
        REGISTRAR_ONLY,
        AGENT,
    ),
    Option(
        "CONSUL_NODE_NAME",
        "the catalog's node of the services; k8s-<cluster>, with the instance when set, unless given",
        REGISTRAR_ONLY,
    ),
    Option(
        "PREVIOUS_CONSUL_NODE_NAMES",
        "comma-separated catalog nodes the services were at before; ours are removed there once all are at the "
        "new place, as they are at the default nodes of this cluster and its previous names",
        REGISTRAR_ONLY,
    ),
    Option(
        "CONSUL_CONCURRENCY",
        "requests under way at Consul at once; 32 for an agent, 8 transactions for the catalog, unless given",
        REGISTRAR_ONLY,
    ),
    Option(
        "REGISTER_READINESS",
        "true: whether a Pod or Node is ready is written as a check of its service (catalog only)",
        REGISTRAR_ONLY,
        "false",
    ),
    Option(
        "WATCH",
        "false: the cluster is listed every SYNC_PERIOD instead of being followed by events",
        REGISTRAR_ONLY,
        "true",
    ),
)

HTTP_SD_OPTIONS: tuple[Option, ...] = (
    Option(
        "HTTP_SD_PORT",
        "port of /sd/targets, Prometheus' HTTP service discovery; off unless given, 0 for one the system picks",
        REGISTRAR_ONLY,
    ),
    Option(
        "HTTP_SD_STATE_FILE",
        "file in which the targets are saved, at most every 30 seconds, so that a restart serves them, marked as "
        "stale, until it has listed the cluster itself; it needs a folder that survives the restart",
        REGISTRAR_ONLY,
    ),
    Option(
        "HTTP_SD_BEARER_TOKEN_FILE",
        "file with a token that callers of it must carry, read again as it changes",
        REGISTRAR_ONLY,
    ),
    Option(
        "HTTP_SD_TLS_CERT_FILE",
        "file with the certificate of that port, which makes it HTTPS",
        REGISTRAR_ONLY,
    ),
    Option("HTTP_SD_TLS_KEY_FILE", "file with the key of that certificate", REGISTRAR_ONLY),
    Option(
        "HTTP_SD_TLS_CLIENT_CA_FILE",
        "file with the authority of the certificates that callers of it must have",
        REGISTRAR_ONLY,
    ),
)
