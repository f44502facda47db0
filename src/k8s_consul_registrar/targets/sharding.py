"""Gives each service one of the shard paths: at random and for good, or by its ID."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol


class Shards(Protocol):
    """A way to choose among the shard paths on offer."""

    def choose(self, service_id: str, current: str) -> str:
        """Return the shard of a service that now has `current`; empty where there are no shards."""
        ...


@dataclass(frozen=True, slots=True)
class RandomShards:
    """Gives a new service a shard at random, and lets a service keep the one it has while it is on offer."""

    paths: tuple[str, ...] = ()
    pick: random.Random = field(default_factory=random.Random, compare=False, repr=False)

    def choose(self, service_id: str, current: str) -> str:  # noqa: ARG002 - chance knows no ID
        """Return `current` while it is still on offer, else one of the paths at random; empty for none."""
        if not self.paths or current in self.paths:
            return current if self.paths else ""
        return self.pick.choice(self.paths)


@dataclass(frozen=True, slots=True)
class HashShards:
    """Gives a service the shard that its ID alone decides, in whatever order the paths are given.

    This is rendezvous hashing (Thaler and Ravishankar, 1998): every shard bids for the ID and the highest
    bid wins, so that taking one shard away moves only the services it had.
    """

    paths: tuple[str, ...] = ()

    def choose(self, service_id: str, current: str) -> str:  # noqa: ARG002 - what a service has is no matter
        """Return the path that bids highest for this ID; empty for none."""
        return max(self.paths, key=lambda path: (_bid(path, service_id), path), default="")


def _bid(path: str, service_id: str) -> bytes:
    # Not hash(), which differs from one process to the next. NUL is in neither text.
    return blake2b(f"{path}\0{service_id}".encode(), digest_size=8).digest()


def parse_shard_paths(text: str) -> tuple[str, ...]:
    """Read a comma-separated list; spaces, empty entries and repeats are dropped, the order is kept."""
    entries: Sequence[str] = [entry.strip() for entry in text.split(",")]
    return tuple(dict.fromkeys(entry for entry in entries if entry))
