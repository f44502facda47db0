"""Observed state: what Consul is known to hold under each service ID, and which records other writers change. Pure."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain, islice
from typing import TypeAlias

import msgspec

from k8s_consul_registrar.model import MANAGED_BY, UNSYNCED, Kind, ObjectKey, Service, Target
from k8s_consul_registrar.registrar.ownership import Claim, Identity, holder_of, kind_of, object_of
from k8s_consul_registrar.targets.meta import GIVERS, Inherited, inherited_in, with_shared_meta
from k8s_consul_registrar.targets.scrape_config import is_proxied
from k8s_consul_registrar.targets.service_names import sharded_name, sharded_tags

# Repairs of a record that another writer changed: the first change may be an accident, the second shows a
# writer at work.
LAST_REPAIRED = 1


class AsDesired(msgspec.Struct, frozen=True, gc=False):
    """A service that is as its target wants it: the whole record can be built from target, shard and cluster UID.

    The target is the store's own value, so this costs a few words, not a copy of a service. `version` is
    the record's `Service.index`.
    """

    target: Target
    shard: str
    cluster_uid: str
    version: int = 0

    @property
    def id(self) -> str:
        """The service ID."""
        return self.target.id

    @property
    def name(self) -> str:
        """The service name."""
        return sharded_name(self.target.name, self.shard)

    def service(self, identity: Identity) -> Service:
        """Build the record: the owner's meta is added to the target's, and the shard filled in."""
        target, shard = self.target, self.shard
        added = _added_meta(identity.cluster, self.cluster_uid, identity.instance, shard)
        return Service(
            id=target.id,
            name=sharded_name(target.name, shard),
            address=target.address,
            port=target.port,
            meta=tuple(sorted((*target.meta, *added))),
            tags=sharded_tags(target.tags, shard),
            index=self.version,
            ready=target.ready,
        )


@lru_cache(maxsize=256)
def _added_meta(cluster: str, cluster_uid: str, instance: str, shard: str) -> tuple[tuple[str, str], ...]:
    added = {
        "cluster": cluster,
        "cluster_uid": cluster_uid,
        "instance": instance,
        "managed_by": MANAGED_BY,
        "shard_path": shard,
    }
    return tuple((key, value) for key, value in added.items() if value)


class Other(msgspec.Struct, frozen=True, gc=False):
    """A service that is this registrar's to update or adopt, and is not known to be as desired.

    `digest` is the record's hash in this process, `key` its object (None for a Node of the original
    program), `version` its `Service.index`. `service` is the whole record where nothing asks for the ID, so
    that it can be shown. `is_proxied` is True for a Pod that is scraped through the proxy.
    """

    digest: int
    kind: Kind | None
    key: ObjectKey | None
    claim: Claim
    name: str
    shard: str
    cluster_uid: str
    inherited: Inherited = Inherited()
    version: int = 0
    is_unsynced: bool = False
    is_proxied: bool = False
    service: Service | None = None


class Foreign(msgspec.Struct, frozen=True, gc=False):
    """A service that is not proven to be this registrar's; `holder` describes its owner."""

    holder: str


class Unknown(msgspec.Struct, frozen=True, gc=False):
    """An ID whose record must be looked up: a write had no answer, or the record changed underneath it.

    Shard and inherited meta are those of the record that was last known.
    """

    shard: str = ""
    inherited: Inherited = Inherited()


# None stands for absent, once Consul was read completely.
Observed: TypeAlias = AsDesired | Other | Foreign | Unknown | None


def observe(service: Service, identity: Identity, cluster_uid: str, *, keep: bool = False) -> Other | Foreign:
    """Reduce a record of Consul's to what decisions need; with `keep` the whole record stays with it."""
    claim = identity.claim(service, cluster_uid)
    if claim is Claim.FOREIGN:
        return Foreign(holder_of(service))
    meta = dict(service.meta)
    return Other(
        digest=hash(service),
        kind=kind_of(service),
        key=object_of(service),
        claim=claim,
        name=service.id if service.name == service.id else service.name,
        shard=meta.get("shard_path", ""),
        cluster_uid=meta.get("cluster_uid", ""),
        inherited=inherited_in(service.meta, meta.get("namespace", "")),
        version=max(service.index, 0),
        is_unsynced=service.index == UNSYNCED,
        is_proxied=is_proxied(meta.get("metrics_path", "")),
        service=with_shared_meta(service) if keep else None,
    )


def inherited_by(record: Observed) -> Inherited:
    """Return what a record has of its Namespace and Node."""
    if isinstance(record, AsDesired):
        return inherited_in(record.target.meta, record.target.key.namespace)
    return record.inherited if isinstance(record, (Other, Unknown)) else Inherited()


def with_known_meta(record: Observed, before: Observed) -> Observed:
    """Return a fresh record with what was last known of its Namespace and Node, whatever another writer made of it."""
    if not isinstance(record, Other):
        return record
    fresh, known = record.inherited, inherited_by(before)
    parts = [(known.name(one) == fresh.name(one) and known.of(one)) or fresh.of(one) for one in GIVERS]
    inherited = Inherited(fresh.namespace, fresh.node, tuple(chain.from_iterable(parts)))
    return record if inherited == fresh else msgspec.structs.replace(record, inherited=inherited)


def object_behind(record: Observed) -> ObjectKey | None:
    """Return the object that a record stands for, None if there is none."""
    if isinstance(record, AsDesired):
        return record.target.key
    return record.key if isinstance(record, Other) else None


class _Records:
    """Records by service ID, with an index from objects to the IDs of their `Other` records."""

    def __init__(self) -> None:
        self.by_id: dict[str, AsDesired | Other | Foreign | Unknown] = {}
        self.by_object: dict[ObjectKey, tuple[str, ...]] = {}
        self.registered = 0
        self.others = 0

    def put(self, service_id: str, record: Observed) -> None:
        before = self.by_id.get(service_id)
        self.others += isinstance(record, Other) - isinstance(before, Other)
        if isinstance(before, AsDesired):
            self.registered -= 1
        elif isinstance(before, Other) and before.key is not None:
            rest = tuple(one for one in self.by_object[before.key] if one != service_id)
            if rest:
                self.by_object[before.key] = rest
            else:
                del self.by_object[before.key]
        if record is None:
            self.by_id.pop(service_id, None)
            return
        self.by_id[service_id] = record
        if isinstance(record, AsDesired):
            self.registered += 1
        elif isinstance(record, Other) and record.key is not None:
            self.by_object[record.key] = (*self.by_object.get(record.key, ()), service_id)


class ObservedState:
    """The record under each service ID, as last read or written; one event loop's.

    Until the first complete read (`is_complete`) an ID that is missing here says nothing; afterwards it is
    absent. A read replaces everything at its end (`begin_read`, `read`, `finish_read`), except IDs that were
    written meanwhile: what it shows of them is older than what is known.
    """

    def __init__(self) -> None:
        self._records = _Records()
        self._reading: _Records | None = None
        self._touched: set[str] = set()
        self._in_flight: set[str] = set()
        self._lost_shards: dict[str, str] = {}
        self.is_complete = False
        self.is_filtered = False  # True if the last read left out what the token may not see
        # Moves with every change, of claims too, for caches of what is shown.
        self.generation = 0
        self._changed: deque[str] = deque(maxlen=20_000)

    def get(self, service_id: str) -> Observed:
        """Return what is known under an ID."""
        return self._records.by_id.get(service_id)

    def is_absent(self, service_id: str) -> bool:
        """Return True if nothing is under an ID, as far as is known; a filtered read proves it of none."""
        is_proven = self.is_complete and not self.is_filtered
        return is_proven and service_id not in self._records.by_id and service_id not in self._in_flight

    def shard(self, service_id: str) -> str:
        """Return the shard that a service has or had, empty if unknown."""
        record = self._records.by_id.get(service_id)
        shard = "" if record is None or isinstance(record, Foreign) else record.shard
        return shard or self._lost_shards.get(service_id, "")

    def ids_of(self, key: ObjectKey) -> tuple[str, ...]:
        """Return the IDs of an object's records that are not known to be as desired."""
        return self._records.by_object.get(key, ())

    @property
    def registered(self) -> int:
        """Number of services known to be as desired."""
        return self._records.registered

    @property
    def others(self) -> int:
        """Number of services of this registrar's that are not known to be as desired."""
        return self._records.others

    def ids(self) -> Iterator[str]:
        """Yield every ID with a record; stays valid while records change."""
        return iter(tuple(self._records.by_id))

    # Changes

    def changed(self, service_id: str) -> None:
        """Note that the claims on an ID, or its record, changed."""
        self.generation += 1
        self._changed.append(service_id)

    def all_changed(self) -> None:
        """Note that any ID may have changed."""
        self.generation += 1
        self._changed.clear()

    def changed_since(self, generation: int) -> set[str] | None:
        """Return the IDs that changed since a generation, None if not all of them are known."""
        count = self.generation - generation
        return set(islice(reversed(self._changed), count)) if count <= len(self._changed) else None

    # Writes

    def begin_write(self, ids: Iterable[str]) -> None:
        """Note that writes of these IDs have begun."""
        self._in_flight.update(ids)
        if self._reading is not None:
            self._touched.update(self._in_flight)

    def end_write(self, ids: Collection[str]) -> None:
        """Note that these writes have ended; `put` or `doubt` says how."""
        self._in_flight.difference_update(ids)
        if self._reading is not None:
            self._touched.update(ids)

    def put(self, service_id: str, record: Observed) -> None:
        """Note what is under an ID now; None is absent."""
        self.changed(service_id)
        self._records.put(service_id, record)
        if self._reading is not None:
            self._touched.add(service_id)

    def restate(self, was: Target, now: Target) -> bool:
        """Take over a target if all that is new is that its Pod is being deleted, so that its record stays as it is."""
        record = self.get(now.id)
        is_ending = now.is_terminating and now == msgspec.structs.replace(was, is_terminating=True)
        if not (is_ending and isinstance(record, AsDesired) and record.target is was):
            return False
        self.put(now.id, AsDesired(now, record.shard, record.cluster_uid, record.version))
        return True

    def doubt(self, service_id: str) -> None:
        """Note that an ID must be looked up before the next write; its shard is remembered."""
        self.put(service_id, Unknown(self.shard(service_id), inherited_by(self.get(service_id))))

    def lose(self, service_id: str) -> None:
        """Note that nothing is under the ID of a desired service; its shard is remembered."""
        if shard := self.shard(service_id):
            self._lost_shards[service_id] = shard
        self.put(service_id, None)

    # Reads of everything

    def begin_read(self) -> None:
        """Begin a read of everything Consul holds."""
        self._reading = _Records()
        self._touched = set(self._in_flight)

    def read(self, service_id: str, record: Observed) -> None:
        """Note a record of the read that is under way."""
        assert self._reading is not None
        self._reading.put(service_id, record)

    def finish_read(
        self,
        lost_shards: Mapping[str, str] | None = None,
        is_desired: Callable[[str], bool] = lambda _: True,
    ) -> set[str]:
        """Replace everything by the records read; return the IDs that were written meanwhile and are kept as they are.

        Desired services that Consul has lost since the last read keep their shards.
        """
        assert self._reading is not None
        touched, reading = self._touched, self._reading
        for service_id in touched:
            reading.put(service_id, self._records.by_id.get(service_id))
        lost = {one for one in chain(self._records.by_id, self._lost_shards) if one not in reading.by_id}
        shards = {one: self.shard(one) for one in lost if is_desired(one)}
        self._records, self._reading, self._touched = reading, None, set()
        self._lost_shards = {one: shard for one, shard in shards.items() if shard} | dict(lost_shards or {})
        self.is_complete = True
        for service_id in (*lost, *self._lost_shards):
            self.changed(service_id)
        return touched

    def drop_read(self) -> None:
        """Forget a read that failed: it was not complete, so it proves nothing."""
        self._reading, self._touched = None, set()

    def expire(self) -> None:
        """Treat every ID as unknown until the next complete read: another replica may have written."""
        self.drop_read()
        self.is_complete = False
        self.all_changed()


class _Contest(msgspec.Struct, frozen=True):
    changes: int
    latest: float


class Contests:
    """Counts changes by other writers of records that this registrar wrote, by service ID.

    Two writers of one identity (the overlap of a rollout, a cluster with a cloned UID, replicas without an
    election) would overwrite each other in turn for as long as they run. So a record that was repaired once
    and is changed again is left alone, and reported, until nothing changed it for `quiet` seconds.
    """

    def __init__(self, quiet: float) -> None:
        self._quiet = quiet
        self._contests: dict[str, _Contest] = {}

    def __len__(self) -> int:
        return len(self._contests)

    def is_contested(self, service_id: str, now: float) -> bool:
        """Return True if a record must not be touched."""
        contest = self._contests.get(service_id)
        if contest is None or now - contest.latest >= self._quiet:
            self._contests.pop(service_id, None)
            return False
        return contest.changes > LAST_REPAIRED

    def compare(
        self, service_id: str, before: Observed, record: Observed, identity: Identity, now: float
    ) -> Observed:
        """Return what a fresh read shows, as desired if it is; count it if another writer changed it.

        Only records of this registrar's own identity count: a manual edit is no writer.
        """
        if not isinstance(before, AsDesired) or not isinstance(record, Other):
            return record
        if hash(before.service(identity)) == record.digest and not record.is_unsynced:
            return AsDesired(before.target, before.shard, before.cluster_uid, record.version)
        if record.claim is Claim.OURS and not record.is_unsynced:
            self._count(service_id, now)
        return record

    def prune(self, now: float) -> None:
        """Forget records that have not changed for long."""
        self._contests = {one: it for one, it in self._contests.items() if now - it.latest < self._quiet}

    def lost_race(self, service_id: str, now: float) -> None:
        """Count a write that came too late: another one was made after the record was read."""
        if service_id in self._contests:
            self._count(service_id, now)

    def _count(self, service_id: str, now: float) -> None:
        contest = self._contests.get(service_id)
        changes = 1 if contest is None or now - contest.latest >= self._quiet else contest.changes + 1
        self._contests[service_id] = _Contest(changes, now)
