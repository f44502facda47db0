"""What objects ask for, by service ID: the targets, the rejections, and which IDs changed since somebody looked."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from k8s_consul_registrar.kube.dirty import Dirty
from k8s_consul_registrar.kube.known import Verdict
from k8s_consul_registrar.model import ObjectKey, Rejection, Target


class Asked:
    """The verdicts of all sources together; `claims` and `rejections` change under the reader."""

    def __init__(self) -> None:
        self.claims: dict[str, tuple[Target, ...]] = {}
        self.rejections: dict[ObjectKey, Rejection] = {}
        # The last copy handed out; None once it is out of date.
        self._rejections_copy: Mapping[ObjectKey, Rejection] | None = None
        self._dirty = Dirty()

    def take(self) -> tuple[AbstractSet[str], Mapping[str, float]]:
        """Return the service IDs that changed since this was last called, and when an event told of each."""
        return self._dirty.take()

    def rejected(self) -> Mapping[ObjectKey, Rejection]:
        """Return the rejections as a value that later changes do not touch."""
        if self._rejections_copy is None:
            self._rejections_copy = dict(self.rejections)
        return self._rejections_copy

    def replace(self, key: ObjectKey, before: Verdict, after: Verdict, at: float | None) -> None:
        """Put one verdict of an object in place of another; `at` is when an event told, None for a list."""
        if isinstance(before, Rejection):
            del self.rejections[key]
            self._rejections_copy = None
            self._dirty.mark(before.id, at)
        else:
            self._unclaim(key, before, at)
        if isinstance(after, Rejection):
            self.rejections[key] = after
            self._rejections_copy = None
            self._dirty.mark(after.id, at)
        else:
            self._claim(after, at)

    def _unclaim(self, key: ObjectKey, targets: tuple[Target, ...], at: float | None) -> None:
        for target in targets:
            self._dirty.mark(target.id, at)
            rest = tuple(one for one in self.claims[target.id] if one.key != key)
            if rest:
                self.claims[target.id] = rest
            else:
                del self.claims[target.id]

    def _claim(self, targets: tuple[Target, ...], at: float | None) -> None:
        for target in targets:
            self._dirty.mark(target.id, at)
            others = self.claims.get(target.id, ())
            # The usual case of one target and one claim shares one tuple, for its memory.
            alone = targets if len(targets) == 1 else (target,)
            self.claims[target.id] = (*others, target) if others else alone
