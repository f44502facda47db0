"""What a pass is to write to Consul, and what it leaves alone and why: a value."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from k8s_consul_registrar.model import ObjectKey, Rejection, Service
from k8s_consul_registrar.registrar.brake import Held, Memory
from k8s_consul_registrar.registrar.ledger import Entry


class Kept(StrEnum):
    """Why a service of ours that nothing asks for stays: fit for a metric's label."""

    REJECTED = "rejected"  # its object is there, and is rejected
    BLIND = "blind"  # its source is not listed completely, or not followed since
    UNFOLLOWED = "unfollowed"  # no source of ours would list its object
    UNPROVEN = "unproven"  # nothing proves it ours to remove


@dataclass(frozen=True, slots=True)
class Conflict:
    """A service ID we want that is held by something not proven ours; `holder` says by what."""

    id: str
    key: ObjectKey
    holder: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write to Consul, and what was left alone and why.

    `rejections` are the losers of IDs that several targets ask for. `kept_objects` are the objects whose
    services stay for want of proof. `memory` is what the brake wants back at the next full pass.
    """

    register: tuple[Entry, ...] = ()
    update: tuple[Entry, ...] = ()
    deregister: tuple[Service, ...] = ()
    unchanged: int = 0
    conflicts: tuple[Conflict, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    held: tuple[Held, ...] = ()
    kept: Counter[Kept] = field(default_factory=Counter)
    kept_objects: frozenset[ObjectKey] = frozenset()
    memory: Memory = field(default_factory=dict)

    @property
    def writes(self) -> int:
        """How many services would be written or removed."""
        return len(self.register) + len(self.update) + len(self.deregister)
