"""Digest of the selection: equal for two runs of the registrar that would make the same targets."""

import hashlib
import json

from k8s_consul_registrar.settings.modes import RegistrarSettings
from k8s_consul_registrar.targets.service_names import Template

DIGEST_BYTES = 12
# Part of the digest: another number when the same settings begin to select or shape objects differently.
RULES_VERSION = 1


def selection_digest(settings: RegistrarSettings) -> str:
    """Return a short digest of the settings that select objects and shape their services.

    Where the settings differ, an object that is missing may only be one that the other settings selected.
    Settings that only say how to connect, how long to wait or where to write are not part of it. The order of
    a list counts only where it decides something.
    """
    selection, naming = settings.selection, settings.naming
    parts = {
        "rules": RULES_VERSION,
        "cluster": settings.cluster_name,
        "instance": settings.instance,
        "kinds": sorted(selection.kinds),
        "namespaces": sorted(selection.namespaces),
        "pod_label_selector": selection.pod_label_selector,
        "node_label_selector": selection.node_label_selector,
        "annotation_prefix": selection.annotation_prefix,
        "node_address_types": selection.node_address_types,
        "id_prefix": naming.id_prefix,
        "pod_name": _text(naming.pod_name),
        "node_name": _text(naming.node_name),
        "tags": sorted(map(_text, naming.tags)),
        "labels": sorted(naming.labels),
        "meta_keys": naming.meta_keys.text,
        "shard_paths": sorted(naming.shard_paths),
        "shard_strategy": naming.shard_strategy if naming.shard_paths else "",
        "proxy_node_port": settings.proxy_node_port,
        "proxy_scheme": settings.proxy_scheme,
        "pods_through_proxy": settings.pods_through_proxy,
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).hexdigest()


def _text(template: Template) -> str:
    return "".join(map(str, template.parts))
