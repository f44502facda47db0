"""The settings that say which objects become targets, and how those are named, tagged and sharded."""

from k8s_consul_registrar.settings.option import BOTH_MODES, REGISTRAR_ONLY, Option
from k8s_consul_registrar.targets.scrape_config import NODE_ADDRESS_TYPES
from k8s_consul_registrar.targets.service_names import ALL_FIELDS, DEFAULT_NODE_NAME, DEFAULT_POD_NAME

_FIELDS = ", ".join(sorted(ALL_FIELDS))

SELECTION_OPTIONS: tuple[Option, ...] = (
    Option(
        "DISCOVER",
        "comma-separated kinds that become targets, of pods and nodes. Default both, with NAMESPACES pods",
        REGISTRAR_ONLY,
    ),
    Option(
        "NAMESPACES",
        "comma-separated namespaces whose Pods count, each listed by itself, so that a Role in each is enough",
        BOTH_MODES,
    ),
    Option(
        "POD_LABEL_SELECTOR", "Kubernetes label selector; Pods it does not match do not count", BOTH_MODES
    ),
    Option("NODE_LABEL_SELECTOR", "the same for Nodes", REGISTRAR_ONLY),
    Option(
        "ANNOTATION_PREFIX",
        "what the annotations of Pods begin with, a DNS name and a slash",
        BOTH_MODES,
        "prometheus.io/",
    ),
    Option(
        "NODE_ADDRESS_TYPES",
        "comma-separated types of a Node's addresses that Prometheus can reach, the first that is there counts",
        REGISTRAR_ONLY,
        ",".join(NODE_ADDRESS_TYPES),
    ),
)

NAMING_OPTIONS: tuple[Option, ...] = (
    Option(
        "POD_SERVICE_NAME",
        f"template of a Pod's service name, over {_FIELDS} and label:<key>, each in braces; "
        "{cluster}-pods puts all under one name",
        REGISTRAR_ONLY,
        DEFAULT_POD_NAME,
    ),
    Option("NODE_SERVICE_NAME", "the same for Nodes", REGISTRAR_ONLY, DEFAULT_NODE_NAME),
    Option(
        "SERVICE_TAGS",
        "comma-separated templates of tags, such as cluster={cluster},shard_path={shard_path}; one with an "
        "empty field is left out",
        REGISTRAR_ONLY,
    ),
    Option(
        "SERVICE_ID_PREFIX",
        "what every service ID begins with, to set registrars apart that share an agent: letters, digits, "
        "'.', '_', '-', at most 50",
        REGISTRAR_ONLY,
    ),
    Option(
        "POD_LABELS_AS_META",
        "comma-separated labels of Pods that become meta label_<name>, with '_' for what is no letter or digit",
        REGISTRAR_ONLY,
    ),
    Option(
        "META_KEYS",
        "comma-separated other names for our meta keys in Consul, such as "
        "cluster=cluster_name,metrics_path=path",
        REGISTRAR_ONLY,
    ),
    Option(
        "SHARD_PATHS",
        "comma-separated shard paths; each service gets one as shard_path",
        REGISTRAR_ONLY,
    ),
    Option(
        "SHARD_STRATEGY",
        "how a service gets its shard path: random, and it keeps it, or hash, by its ID alone",
        REGISTRAR_ONLY,
        "random",
    ),
)
