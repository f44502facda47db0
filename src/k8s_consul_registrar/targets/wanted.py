"""What a cluster wants scraped, as far as it is known: the value that is compared with Consul."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from k8s_consul_registrar.model import ObjectKey, Rejection, Source, Target


@dataclass(frozen=True, slots=True)
class SourceState:
    """How much is known of one source.

    `listed_at` is when its last complete list ended, in seconds of a monotonic clock, None before the
    first. `is_followed` says that nothing has failed since. `objects` is how many that list showed, or the
    first list so far. `is_opaque` says that it held an item whose very name could not be read, so that
    absence from it proves nothing.
    """

    listed_at: float | None = None
    is_followed: bool = False
    objects: int = 0
    is_opaque: bool = False
    problem: str = ""

    @property
    def proves_absence(self) -> bool:
        """Whether what is missing here is missing in the cluster."""
        return self.listed_at is not None and self.is_followed and not self.is_opaque


@dataclass(frozen=True, slots=True)
class Wanted:
    """Everything known of the cluster at one moment.

    `claims` are the targets by the service ID they ask for; more than one may ask for the same.
    `departed` are objects seen to stop asking (deleted, annotation taken away, phase Succeeded): facts,
    where absence from a list is only an inference. `heard` says when an event first told of a service ID's
    change, in seconds of a monotonic clock, for those that changed by events since it was last asked.
    """

    claims: Mapping[str, Sequence[Target]] = field(default_factory=dict)
    rejections: Mapping[ObjectKey, Rejection] = field(default_factory=dict)
    sources: Mapping[Source, SourceState] = field(default_factory=dict)
    departed: AbstractSet[ObjectKey] = frozenset()
    cluster_uid: str = ""
    heard: Mapping[str, float] = field(default_factory=dict)

    def source_of(self, key: ObjectKey) -> Source | None:
        """Find the source an object would be listed by, None where none is followed."""
        for source in (Source(key.kind), Source(key.kind, key.namespace)):
            if source in self.sources:
                return source
        return None
