"""Strategies that give each service one of the shard paths."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol


class Shards(Protocol):
    """A strategy for choosing a service's shard path."""

    def choose(self, service_id: str, current: str) -> str:
        """Return the shard of a service whose shard is `current` now; empty if there are no shards."""
        ...


@dataclass(frozen=True, slots=True)
class RandomShards:
    """Spreads new services evenly and lets each keep its shard as long as that path is configured.

    The choice depends on the ID alone, not on chance: when a Consul agent restarts without its data, its
    services leave the catalog before their shards can be read, and they must return to the same shards.
    """

    paths: tuple[str, ...] = ()

    def choose(self, service_id: str, current: str) -> str:
        """Return `current` if it is still configured, otherwise one of the paths; empty if there are none."""
        return current if current in self.paths else HashShards(self.paths).choose(service_id, current)


@dataclass(frozen=True, slots=True)
class HashShards:
    """Gives each service the shard that its ID determines, independent of the order of the paths.

    This is rendezvous hashing (Thaler and Ravishankar, 1998): every shard bids for the ID and the highest bid
    wins, so removing a shard moves only the services that were on it.
    """

    paths: tuple[str, ...] = ()

    def choose(self, service_id: str, current: str) -> str:  # noqa: ARG002 - the ID alone decides
        """Return the path with the highest bid for this ID; empty if there are none."""
        if len(self.paths) < 2:
            return self.paths[0] if self.paths else ""
        return max(self.paths, key=lambda path: (_bid(path, service_id), path))


def _bid(path: str, service_id: str) -> bytes:
    # Not hash(), which differs between processes. Neither text can contain NUL.
    return blake2b(f"{path}\0{service_id}".encode(), digest_size=8).digest()


def parse_shard_paths(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list in order, without spaces, empty entries and repeats."""
    entries: Sequence[str] = [entry.strip() for entry in text.split(",")]
    return tuple(dict.fromkeys(entry for entry in entries if entry))
