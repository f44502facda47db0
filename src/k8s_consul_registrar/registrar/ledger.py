"""What Consul holds of ours, in short: enough to make each service again without reading or copying it."""

from collections.abc import Container, Iterable, Iterator

import msgspec

from k8s_consul_registrar.model import Service, Target
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.targets.service_names import sharded_name
from k8s_consul_registrar.targets.zones import keep_zone


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A service as a target, its shard and the cluster's UID make it; `version` is its `Service.index`.

    The target is the cluster's own value, so an entry costs a few words, not a copy of a service.
    """

    target: Target
    shard: str
    cluster_uid: str
    version: int = 0

    @property
    def id(self) -> str:
        """The service's ID."""
        return self.target.id

    @property
    def name(self) -> str:
        """The service's name."""
        return sharded_name(self.target.name, self.shard)

    def at(self, version: int) -> "Entry":
        """Return the same at another version."""
        return Entry(self.target, self.shard, self.cluster_uid, version)

    def service(self, identity: Identity) -> Service:
        """Make the service."""
        return identity.service(self.target, self.shard, self.cluster_uid, self.version)


def zoned(target: Target, service: Service, last: Entry | None, identity: Identity) -> Target:
    """Give a target whose zone is not known now the one its service had: by `last`, else by Consul."""
    if target.is_zone_known:
        return target
    return keep_zone(target, service if last is None else last.service(identity))


class Ledger:
    """The entries known to stand in Consul, and the IDs of which only a look at Consul can tell more."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._uncertain: dict[str, str] = {}
        self._kept: dict[str, Entry] = {}
        # Moves with every change, for whoever keeps what was made of the entries.
        self.generation = 0

    def __len__(self) -> int:
        """Return how many services of ours are known to stand in Consul."""
        return len(self._entries)

    def get(self, service_id: str) -> Entry | None:
        """Return what stands under an ID, None where nothing of ours is known to."""
        return self._entries.get(service_id)

    def unclaimed(self, claimed: Container[str]) -> Iterator[Entry]:
        """Yield what stands in Consul though nobody in `claimed` asks for it; good while both change."""
        for entries in (self._entries, self._kept):
            for service_id in tuple(entries):
                if service_id not in claimed and (entry := entries.get(service_id)) is not None:
                    yield entry

    def find(self, service_id: str) -> Entry | None:
        """Return what stands under an ID, asked for or kept."""
        return self._entries.get(service_id) or self._kept.get(service_id)

    def kept(self, service_id: str) -> Entry | None:
        """Return what stands under an ID though nobody asks for it."""
        return self._kept.get(service_id)

    def keep(self, entry: Entry) -> None:
        """Note what stands in Consul though nobody asks for it, until the brake lets it go."""
        self.generation += 1
        self._kept[entry.id] = entry

    def is_uncertain(self, service_id: str) -> bool:
        """Whether something stands, or may stand, under an ID that is not known here."""
        return service_id in self._uncertain

    def is_free(self, service_id: str) -> bool:
        """Whether nothing is known, or feared, to stand under an ID."""
        return service_id not in self._entries and service_id not in self._uncertain

    def shard(self, service_id: str) -> str:
        """Return the shard a service has or had, so that one that was lost gets it back; empty for none."""
        entry = self._entries.get(service_id)
        return self._uncertain.get(service_id, "") if entry is None else entry.shard

    def note(self, entry: Entry) -> None:
        """Note what stands in Consul under an ID."""
        self.generation += 1
        self._kept.pop(entry.id, None)
        self._entries[entry.id] = entry
        self._uncertain.pop(entry.id, None)

    def doubt(self, service_id: str, shard: str = "") -> None:
        """Note that what stands under an ID has to be looked up: another's, or a write whose end is unknown."""
        self.generation += 1
        self._uncertain[service_id] = shard or self.shard(service_id)
        self._entries.pop(service_id, None)

    def take_over(self, other: "Ledger", ids: Iterable[str]) -> None:
        """Note of these IDs what another ledger knows, in place of what is noted here."""
        for service_id in ids:
            self.forget(service_id)
            if (entry := other.get(service_id)) is not None:
                self.note(entry)
            elif other.is_uncertain(service_id):
                self.doubt(service_id, other.shard(service_id))
            if (kept := other.kept(service_id)) is not None:
                self.keep(kept)

    def forget(self, service_id: str) -> None:
        """Note that nothing stands under an ID."""
        self.generation += 1
        self._kept.pop(service_id, None)
        self._entries.pop(service_id, None)
        self._uncertain.pop(service_id, None)
