"""Which of Consul's two ways is used to keep services, and how."""

import re
from dataclasses import dataclass

from k8s_consul_registrar.settings.backend_options import BACKENDS, CATALOG
from k8s_consul_registrar.settings.reader import Reader

# Consul compares node names without case and warns of what DNS cannot carry; a space is always a mistake.
_NODE_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_BACKENDS_OWN = 0


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """Where services are kept, and at which nodes they may have been kept before.

    `concurrency` is 0 where the backend's own default counts.
    """

    backend: str
    node_name: str
    previous_node_names: frozenset[str]
    concurrency: int
    has_readiness: bool
    follows: bool


def read_backend(reader: Reader, cluster_name: str, instance: str) -> BackendSettings:
    """Read every variable about the backend."""
    backend = reader.choice("CONSUL_BACKEND", BACKENDS)
    node_name = reader.text("CONSUL_NODE_NAME") or default_node(cluster_name, instance)
    if reader.is_set("CONSUL_NODE_NAME") and not _NODE_NAME.fullmatch(node_name):
        reader.problem("CONSUL_NODE_NAME", f"{node_name!r} must be letters, digits, '.', '_' or '-'")
    has_concurrency = reader.is_set("CONSUL_CONCURRENCY")
    concurrency = reader.integer("CONSUL_CONCURRENCY", 1, 200) if has_concurrency else _BACKENDS_OWN
    has_readiness = reader.boolean("REGISTER_READINESS")
    if has_readiness and backend != CATALOG:
        reader.problem("REGISTER_READINESS", "needs CONSUL_BACKEND=catalog: an agent runs its checks itself")
    previous = reader.names("PREVIOUS_CONSUL_NODE_NAMES") - {""}
    former_clusters = reader.names("PREVIOUS_CLUSTER_NAMES") - {""}
    defaults = {default_node(name, instance) for name in (cluster_name, *former_clusters)}
    return BackendSettings(
        backend, node_name, previous | defaults, concurrency, has_readiness, reader.boolean("WATCH")
    )


def default_node(cluster_name: str, instance: str) -> str:
    """Return the name of the catalog's node unless one is given."""
    return "-".join(part for part in ("k8s", cluster_name, instance) if part)
