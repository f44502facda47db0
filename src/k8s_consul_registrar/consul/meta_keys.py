"""Our meta keys under other names in Consul, for relabelling that already exists."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from msgspec.structs import replace

from k8s_consul_registrar.model import Service
from k8s_consul_registrar.targets.meta import (
    LABEL_PREFIX,
    LONGEST_META_KEY,
    LONGEST_META_VALUE,
    OWN_KEYS,
    PARAM_PREFIX,
)

# A service with renamed keys says so itself, so that it is known as ours whatever is set later.
MAPPING_KEY = "meta_keys"
# By this key a service is known as a registrar's, before anything is known of its other keys.
FIXED_KEYS = frozenset({"managed_by"})
# Consul takes no such key, so what stands behind it differs from all we would write.
ASIDE = ":"

# Consul's rules for a key: agent/structs/structs.go, validateMetaPair; `consul-` is its own.
_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_META_KEY}}}")
_RESERVED_PREFIX = "consul-"


@dataclass(frozen=True, slots=True)
class MetaKeys:
    """Which of our keys have another name in Consul: pairs of our name and Consul's, sorted.

    Beyond this value nobody knows of it: services are encoded as they leave for Consul and decoded as
    they come from it. No key is renamed to one of our own, so a key of ours found in Consul means what it
    always means, or nothing at all where it was renamed.
    """

    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The setting that says the same."""
        return ",".join(f"{ours}={theirs}" for ours, theirs in self.renamed)

    def wire(self, key: str) -> str:
        """Return the name that a key of ours has in Consul."""
        return dict(self.renamed).get(key, key)

    def encode(self, service: Service) -> Service:
        """Return a service as Consul is to hold it."""
        if not self.renamed and not _may_be_aside(service):
            return service
        names = dict(self.renamed)
        meta = [(names.get(key, key), value) for key, value in service.meta if not key.startswith(ASIDE)]
        if self.renamed:
            meta.append((MAPPING_KEY, self.text))
        return replace(service, meta=tuple(sorted(meta)))

    def decode(self, service: Service) -> Service:
        """Return a service that Consul holds, its keys under our names.

        One that was written under other settings is read by the names it states, and comes out unequal
        to anything we would write, so that it is written again. So does one in which somebody put a key of
        ours beside the name we gave it.
        """
        stated = service.value(MAPPING_KEY)
        if not stated and not self.renamed:
            return service
        keys = self if stated == self.text else _stated(stated)
        names = {theirs: ours for ours, theirs in keys.renamed}
        aside = dict(keys.renamed)
        meta = [
            (ASIDE + key if key in aside else names.get(key, key), value)
            for key, value in service.meta
            if key != MAPPING_KEY
        ]
        if keys is not self:
            meta.append((ASIDE + MAPPING_KEY, stated))
        return replace(service, meta=tuple(sorted(meta)))


def parse_meta_keys(entries: Iterable[str]) -> MetaKeys:
    """Read entries such as `cluster=cluster_name`; raises ValueError, fit for an operator."""
    renamed: dict[str, str] = {}
    for entry in entries:
        ours, _, theirs = (part.strip() for part in entry.partition("="))
        problem = _problem(ours, theirs)
        if not problem and ours in renamed:
            problem = "is renamed twice"
        if not problem and theirs in renamed.values():
            problem = f"would be {theirs}, as another key already is"
        if problem:
            raise ValueError(f"{entry!r}: {ours or 'the key'} {problem}")
        renamed[ours] = theirs
    keys = MetaKeys(tuple(sorted(renamed.items())))
    if len(keys.text) > LONGEST_META_VALUE:
        raise ValueError(f"is over the {LONGEST_META_VALUE} characters that Consul takes as a value of meta")
    return keys


def _may_be_aside(service: Service) -> bool:
    """Whether keys were set aside, as far as the first one tells: letters, with which ours begin, come later."""
    return bool(service.meta) and service.meta[0][0] < "A"


def _problem(ours: str, theirs: str) -> str:
    if ours in FIXED_KEYS:
        return "cannot be renamed: by it a service is known as a registrar's"
    if ours not in OWN_KEYS:
        return f"is none of {', '.join(sorted(OWN_KEYS - FIXED_KEYS))}"
    if not _KEY.fullmatch(theirs) or theirs.startswith(_RESERVED_PREFIX):
        return f"cannot be {theirs!r}: a key is letters, digits, '_' or '-', at most {LONGEST_META_KEY}"
    if theirs in OWN_KEYS or theirs == MAPPING_KEY:
        return f"cannot be {theirs}, which is a key of ours"
    if theirs.startswith((PARAM_PREFIX, LABEL_PREFIX)):
        return f"cannot be {theirs}: {PARAM_PREFIX}… and {LABEL_PREFIX}… come from Pods"
    return ""


@lru_cache(maxsize=16)
def _stated(text: str) -> MetaKeys:
    """Read what a service states; what is no mapping of ours renames nothing."""
    try:
        return parse_meta_keys(text.split(",") if text else ())
    except ValueError:
        return MetaKeys()
