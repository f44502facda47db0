"""The settings about how Consul is written to and the cluster followed."""

from k8s_consul_registrar.settings.option import REGISTRAR_ONLY, Option

AGENT = "agent"
CATALOG = "catalog"
BACKENDS = (AGENT, CATALOG)

BACKEND_OPTIONS: tuple[Option, ...] = (
    Option(
        "CONSUL_BACKEND",
        "agent: services belong to the agent at CONSUL_ADDRESS; catalog: to a node of their own, written in "
        "transactions",
        REGISTRAR_ONLY,
        AGENT,
    ),
    Option(
        "CONSUL_NODE_NAME",
        "the catalog's node of the services; k8s-<cluster>, with the instance when set, unless given",
        REGISTRAR_ONLY,
    ),
    Option(
        "CONSUL_CONCURRENCY",
        "requests under way at Consul at once; 32 for an agent, 4 transactions for the catalog, unless given",
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
