"""Gives each service one of the shard paths, and lets it keep the one it has."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Shards:
    """The shard paths on offer; without any, services carry none."""

    paths: tuple[str, ...] = ()
    pick: random.Random = field(default_factory=random.Random, compare=False, repr=False)

    def choose(self, current: str) -> str:
        """Return `current` while it is still on offer, else one of the paths at random; empty for none."""
        if not self.paths or current in self.paths:
            return current if self.paths else ""
        return self.pick.choice(self.paths)


def parse_shard_paths(text: str) -> tuple[str, ...]:
    """Read a comma-separated list; spaces, empty entries and repeats are dropped, the order is kept."""
    entries: Sequence[str] = [entry.strip() for entry in text.split(",")]
    return tuple(dict.fromkeys(entry for entry in entries if entry))
