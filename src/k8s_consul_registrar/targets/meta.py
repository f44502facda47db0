"""A service's meta: our own keys, the labels taken over, and what Consul takes."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from k8s_consul_registrar.targets.reasons import Reason, Rejected, has_control
from k8s_consul_registrar.targets.service_names import is_label_key

# Consul's limits on meta: agent/structs/structs.go, validateMetaPair and metaMaxKeyPairs. Of the 64 pairs,
# some are kept for what is added to each service (cluster, instance, shard and the like).
MOST_META_PAIRS = 56
LONGEST_META_KEY = 128
LONGEST_META_VALUE = 512

# Every key that is ours to write; beside them there are only those that begin with one of the two prefixes.
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
    """A label that is taken over, and the meta key it gets."""

    label: str
    key: str


def parse_labels(labels: Iterable[str]) -> tuple[LabelMeta, ...]:
    """Give each label its meta key, `label_` before it, so that it never is one of ours.

    Raises ValueError, fit for an operator, for what is no label, and for two labels that get one key.
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
    """Return the meta of the chosen labels that an object has."""
    return {one.key: labels.get(one.label, "") for one in chosen}


def checked_meta(meta: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Sort meta and leave out what is empty; raises `Rejected` for more than Consul takes."""
    text = "".join(meta.values())
    # Nearly always all of it together is shorter than any one may be.
    is_plain = len(text) <= LONGEST_META_VALUE and text.isascii() and text.isprintable()
    if not is_plain or len(meta) > MOST_META_PAIRS:
        _check({key: value for key, value in meta.items() if value}, text)
    return tuple([shared_pair((key, meta[key])) for key in sorted(meta) if meta[key]])


def _check(meta: Mapping[str, str], text: str) -> None:
    """Raise `Rejected` for what Consul does not take; `text` is all values together."""
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
    """Return one object for equal pairs that Consul takes: tens of thousands of targets are much alike."""
    return pair
