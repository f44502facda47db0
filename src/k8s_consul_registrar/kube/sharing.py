"""Lets equal parts of targets be one object in memory: tens of thousands of targets are much alike."""

from msgspec.structs import replace

from k8s_consul_registrar.model import Target

# Kept at most; what is shared beyond that is shared from a fresh table on.
LIMIT = 4096


class Sharing:
    """Remembers pairs of meta seen lately, and hands out the first of equal ones."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], tuple[str, str]] = {}

    def targets(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """Return equal targets that hold the pairs seen before."""
        if len(self._pairs) > LIMIT:
            self._pairs.clear()
        share = self._pairs.setdefault
        return tuple(
            replace(target, meta=tuple(share(pair, pair) for pair in target.meta)) for target in targets
        )
