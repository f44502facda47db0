"""Labels of a target that annotations may set, where the operator allows them. Pure."""

import re
from typing import NamedTuple

# What follows is the name of a label that the target itself gets from HTTP and file service discovery.
TARGET_PREFIX = "target_"
# Labels that annotations may not set: with them a Pod could be scraped at another address with the collector's
# credentials, or pass for another target.
_DECIDED_LABELS = frozenset({"__address__", "__scheme__", "__metrics_path__", "__name__", "job", "instance"})
_DECIDED_PREFIXES = ("__meta_", "__param_", "__tenant_", "__tmp")
LONGEST_LABEL = 60
_LABEL_NAME = re.compile(rf"(?=.{{1,{LONGEST_LABEL}}}$)_{{0,2}}[A-Za-z][A-Za-z0-9_]*")


class TargetLabel(NamedTuple):
    """A label of a target that an annotation sets, by what follows the prefix, and its meta key."""

    name: str
    annotation: str
    key: str


def parse_target_label(text: str) -> TargetLabel:
    """Return the label of a target that an annotation may set; raises ValueError, worded for an operator."""
    if not _LABEL_NAME.fullmatch(text):
        raise ValueError(
            f"{text[:80]!r} is no name of a label in Prometheus, of at most {LONGEST_LABEL} letters"
        )
    if text in _DECIDED_LABELS or text.startswith(_DECIDED_PREFIXES):
        raise ValueError(
            f"{text!r} decides what is scraped and where, which annotations of others may not set"
        )
    return TargetLabel(text, f"label-{text.strip('_')}", TARGET_PREFIX + text)
