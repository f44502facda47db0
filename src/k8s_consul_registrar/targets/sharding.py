"""Gives each service one of the shard paths: any, and for good, or the one its ID decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol


class Shards(Protocol):
    """A way to choose among the shard paths on offer."""

    def choose(self, service_id: str, current: str) -> str:
        """Return the shard of a service that now has `current`; empty where there are no shards."""
        ...


@dataclass(frozen=True, slots=True)
class RandomShards:
    """Gives a new service any shard, and lets a service keep the one it has while it is on offer.

    Chance falls the same for the same ID: a Consul agent that comes back without its data takes its services
    out of the catalog before anybody can read what shards they had, and they must come back where they were.
    """

    paths: tuple[str, ...] = ()

    def choose(self, service_id: str, current: str) -> str:
        """Return `current` while it is still on offer, else one of the paths; empty for none."""
        return current if current in self.paths else HashShards(self.paths).choose(service_id, current)


@dataclass(frozen=True, slots=True)
class HashShards:
    """Gives a service the shard that its ID alone decides, in whatever order the paths are given.

    This is rendezvous hashing (Thaler and Ravishankar, 1998): every shard bids for the ID and the highest
    bid wins, so that taking one shard away moves only the services it had.
    """

    paths: tuple[str, ...] = ()

    def choose(self, service_id: str, current: str) -> str:  # noqa: ARG002 - what a service has is no matter
        """Return the path that bids highest for this ID; empty for none."""
        if len(self.paths) < 2:
            return self.paths[0] if self.paths else ""
        return max(self.paths, key=lambda path: (_bid(path, service_id), path))


def _bid(path: str, service_id: str) -> bytes:
    # Not hash(), which differs from one process to the next. NUL is in neither text.
    return blake2b(f"{path}\0{service_id}".encode(), digest_size=8).digest()


def parse_shard_paths(text: str) -> tuple[str, ...]:
    """Read a comma-separated list; spaces, empty entries and repeats are dropped, the order is kept."""
    entries: Sequence[str] = [entry.strip() for entry in text.split(",")]
    return tuple(dict.fromkeys(entry for entry in entries if entry))
