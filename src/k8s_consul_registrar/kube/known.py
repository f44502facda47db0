"""What the mirror knows of one source."""

from dataclasses import dataclass, field

from k8s_consul_registrar.model import ObjectKey, Rejection, Target
from k8s_consul_registrar.targets.wanted import SourceState

Verdict = tuple[Target, ...] | Rejection


@dataclass(slots=True)
class Known:
    """What is known of one source.

    `unseen` are, while a list arrives, the objects of `verdicts` that it has not shown yet; None between
    lists. `listed_objects` and `is_list_opaque` count for nothing before that list is complete.
    """

    verdicts: dict[ObjectKey, Verdict] = field(default_factory=dict)
    objects: int = 0
    listed_at: float | None = None
    is_followed: bool = False
    is_opaque: bool = False
    problem: str = ""
    unseen: set[ObjectKey] | None = None
    listed_objects: int = 0
    is_list_opaque: bool = False

    def state(self) -> SourceState:
        """Return what others need to know of it, as a value."""
        objects = self.listed_objects if self.listed_at is None else self.objects
        return SourceState(self.listed_at, self.is_followed, objects, self.is_opaque, self.problem)
