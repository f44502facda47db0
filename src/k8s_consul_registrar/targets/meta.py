"""Service meta: the registrar's own keys, copied labels, and Consul's limits."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from k8s_consul_registrar.targets.reasons import Reason, Rejected, has_control
from k8s_consul_registrar.targets.service_names import is_label_key

# Consul's limits on meta: agent/structs/structs.go, validateMetaPair and metaMaxKeyPairs. 8 of the 64 pairs
# are reserved for what the registrar adds to each service (cluster, instance, shard and the like).
MOST_META_PAIRS = 56
LONGEST_META_KEY = 128
LONGEST_META_VALUE = 512

# Every key the registrar writes, except those that begin with one of the two prefixes below.
OWN_KEYS = frozenset(
    {
        "cluster",
        "cluster_uid",
        "instance",
        "kind",
        "managed_by",
        "metrics_path",
        "namespace",
        "node",
        "pod",
        "scheme",
        "shard_path",
        "zone",
    }
)
PARAM_PREFIX = "param_"
LABEL_PREFIX = "label_"

# Kubernetes, "Well-Known Labels, Annotations and Taints".
ZONE_LABEL = "topology.kubernetes.io/zone"

_NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9_]")


class LabelMeta(NamedTuple):
    """A Pod label that is copied to meta, and its meta key."""

    label: str
    key: str


def parse_labels(labels: Iterable[str]) -> tuple[LabelMeta, ...]:
    """Return each label with its meta key, which begins with `label_` and so never equals one of `OWN_KEYS`.

    Raises ValueError, worded for an operator, for an invalid label and for two labels with the same key.
    """
    chosen: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        if not is_label_key(label):
            raise ValueError(f"{label!r} is no label as Kubernetes has them")
        key = LABEL_PREFIX + _NOT_IN_A_KEY.sub("_", label)
        if len(key) > LONGEST_META_KEY:
            raise ValueError(f"{key!r} is over the {LONGEST_META_KEY} characters that Consul allows a key")
        if key in chosen:
            raise ValueError(f"{chosen[key]!r} and {label!r} would both be {key}")
        chosen[key] = label
    return tuple(LabelMeta(label, key) for key, label in chosen.items())


def label_meta(labels: Mapping[str, str], chosen: Iterable[LabelMeta]) -> dict[str, str]:
    """Return the meta of the chosen labels; a label that the object lacks is empty."""
    return {one.key: labels.get(one.label, "") for one in chosen}


def checked_meta(meta: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return meta sorted and without empty values; raises `Rejected` for meta over Consul's limits."""
    text = "".join(meta.values())
    # Nearly always all values together are shorter than the limit for one.
    is_plain = len(text) <= LONGEST_META_VALUE and text.isascii() and text.isprintable()
    if not is_plain or len(meta) > MOST_META_PAIRS:
        _check({key: value for key, value in meta.items() if value}, text)
    return tuple([shared_pair((key, meta[key])) for key in sorted(meta) if meta[key]])


def _check(meta: Mapping[str, str], text: str) -> None:
    """Raise `Rejected` for meta over Consul's limits; `text` is all values joined."""
    if len(meta) > MOST_META_PAIRS:
        raise Rejected(Reason.META_TOO_MANY, f"{len(meta)} pairs of meta are more than {MOST_META_PAIRS}")
    for key, value in sorted(meta.items()):
        size = len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
        if size > LONGEST_META_VALUE:
            raise Rejected(Reason.META_TOO_LONG, f"{key} is {size} bytes, Consul takes {LONGEST_META_VALUE}")
    if has_control(text):
        odd = min(key for key, value in meta.items() if has_control(value))
        raise Rejected(Reason.INVALID_META, f"{odd} has control characters")


@lru_cache(maxsize=4096)
def shared_pair(pair: tuple[str, str]) -> tuple[str, str]:
    """Return the same object for equal pairs, because tens of thousands of targets share most of theirs."""
    return pair
