"""Compares what the cluster wants with what Consul holds, and says what to write: pure."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property

from k8s_consul_registrar.model import UNSYNCED, Kind, ObjectKey, Rejection, Service, Target
from k8s_consul_registrar.registrar.absences import Absences
from k8s_consul_registrar.registrar.brake import BrakeRules, Held, Memory
from k8s_consul_registrar.registrar.ledger import Entry, zoned
from k8s_consul_registrar.registrar.naming import comparable_name, is_of_a_registrar, refuse_name
from k8s_consul_registrar.registrar.ownership import Claim, Identity, object_of
from k8s_consul_registrar.registrar.plan import Conflict, Kept, Plan
from k8s_consul_registrar.targets.claims import settle
from k8s_consul_registrar.targets.reasons import Reason
from k8s_consul_registrar.targets.sharding import Shards
from k8s_consul_registrar.targets.wanted import Wanted


class Planner:
    """Takes Consul's services one by one, keeps only what needs a write, and ends in a `Plan`.

    First `consider` every service there is under the wanted IDs (for a full comparison: every service
    there is), then run through `complete`, then take the `plan`. `recall` tells the shard that a service
    had which Consul has lost, `find` what we saw or wrote last under an ID; `taken_names` are those an
    earlier full comparison found taken.
    """

    def __init__(
        self,
        wanted: Wanted,
        identity: Identity,
        shards: Shards,
        recall: Callable[[str], str] = lambda _: "",
        taken_names: AbstractSet[str] = frozenset(),
        *,
        find: Callable[[str], Entry | None] = lambda _: None,
    ) -> None:
        self._wanted = wanted
        self._identity = identity
        self._shards = shards
        self._recall = recall
        self._find = find
        self._seen: set[str] = set()
        self._register: list[Entry] = []
        self._update: list[Entry] = []
        self._rename: list[tuple[Entry, str]] = []
        self._taken_names = set(taken_names)
        self._deregister: list[Service] = []
        self._conflicts: list[Conflict] = []
        self._rejections: list[Rejection] = []
        self._absences = Absences(wanted)
        self._kept: Counter[Kept] = Counter()
        self._kept_objects: set[ObjectKey] = set()
        self._unchanged = 0

    def consider(self, service: Service) -> Entry | None:
        """Compare one service that Consul holds; returns its entry when it is just as it should be."""
        claim = self._identity.claim(service, self._wanted.cluster_uid)
        claims = self._wanted.claims.get(service.id)
        if claim is Claim.FOREIGN and not is_of_a_registrar(service):
            self._taken_names.add(comparable_name(service.name))
        if not claims:
            if claim is not Claim.FOREIGN:
                self._unwanted(service, claim)
            return None
        self._seen.add(service.id)
        if claim is Claim.FOREIGN:
            self._conflict(service, claims[0])
            return None
        return self._keep_or_update(service, claims)

    def count(self, service: Service) -> None:
        """Count a service among what its source holds, and judge nothing else of it."""
        self._absences.count(service, object_of(service))

    def leave(self, ids: AbstractSet[str]) -> None:
        """Leave these IDs alone: what stands under them is not known yet, or is not what was considered."""
        if not ids:
            return
        self._seen |= ids
        self._update = [entry for entry in self._update if entry.id not in ids]
        self._rename = [(entry, name) for entry, name in self._rename if entry.id not in ids]
        self._deregister = [service for service in self._deregister if service.id not in ids]
        self._conflicts = [conflict for conflict in self._conflicts if conflict.id not in ids]
        self._absences.leave(ids)

    def complete(self) -> Iterator[Entry | None]:
        """Plan what Consul lacks, one service ID a step, so that a long plan can let others run between.

        Each step yields the entry that is to be registered, None where there is nothing to register.
        """
        for service_id, claims in self._wanted.claims.items():
            yield self._lacking(service_id, claims) if claims and service_id not in self._seen else None
        self._update.extend(
            entry for entry, held_name in self._rename if self._may_be_named(entry, held_name)
        )

    @property
    def taken_names(self) -> AbstractSet[str]:
        """The names, fit for comparison, of services that no registrar wrote."""
        return self._taken_names

    def plan(self, held: Sequence[Held] = (), memory: Memory | None = None) -> Plan:
        """Return the plan; `held` and `memory` are what `brake` returned, where absence was judged."""
        return Plan(
            register=tuple(self._register),
            update=tuple(self._update),
            deregister=tuple(self._deregister),
            unchanged=self._unchanged,
            conflicts=tuple(self._conflicts),
            rejections=tuple(self._rejections),
            held=tuple(held),
            kept=self._kept,
            kept_objects=frozenset(self._kept_objects),
            memory=memory or {},
        )

    def brake(self, rules: BrakeRules, memory: Memory) -> tuple[list[Held], Memory]:
        """Judge what a full comparison found absent: plan what may go, return what is held."""
        judged = self._absences.judge(rules, memory)
        self._deregister.extend(judged.released)
        return judged.held, judged.memory

    def _conflict(self, service: Service, target: Target) -> None:
        named = {key: service.value(key) for key in ("managed_by", "cluster", "instance", "cluster_uid")}
        holder = ", ".join(f"{key}={value}" for key, value in named.items() if value)
        self._conflicts.append(Conflict(service.id, target.key, holder or "a service without our meta"))

    def _lacking(self, service_id: str, claims: Sequence[Target]) -> Entry | None:
        target, losers = settle(claims, None)
        self._rejections.extend(losers)
        shard = self._shards.choose(service_id, self._recall(service_id))
        entry = Entry(target, shard, self._wanted.cluster_uid)
        if not self._may_be_named(entry):
            return None
        self._register.append(entry)
        return entry

    def _may_be_named(self, entry: Entry, held_name: str = "") -> bool:
        """Whether a name is free to be given; known only once every service was considered."""
        if not self._taken_names:
            return True
        refusal = refuse_name(entry.id, entry.name, entry.target.key, held_name, self._taken_names)
        if refusal is not None:
            self._rejections.append(refusal)
        return refusal is None

    def _keep_or_update(self, service: Service, claims: Sequence[Target]) -> Entry | None:
        holder = object_of(service)
        self._absences.count(service, holder)
        if holder is not None and self._is_still_held(holder, claims):
            self._rejections.extend(
                Rejection(
                    target.key, Reason.ID_TAKEN, f"{target.id} is held by {holder}, not seen to be gone"
                )
                for target in claims
            )
            self._keep(Kept.BLIND, holder)
            return None
        target, losers = settle(claims, holder)
        self._rejections.extend(losers)
        entry = Entry(
            zoned(target, service, self._find(service.id), self._identity),
            self._shards.choose(service.id, service.value("shard_path")),
            self._wanted.cluster_uid or service.value("cluster_uid"),
            max(service.index, 0),
        )
        if entry.service(self._identity) == service and service.index != UNSYNCED:
            self._unchanged += 1
            return entry
        if entry.name == service.name:
            self._update.append(entry)
        else:
            self._rename.append((entry, service.name))
        return None

    def _is_still_held(self, holder: ObjectKey, claims: Sequence[Target]) -> bool:
        """Whether an ID belongs to a Pod that does not claim it now, but that nothing shows to be gone."""
        if holder.kind is not Kind.POD or any(target.key == holder for target in claims):
            return False
        if holder in self._wanted.rejections:
            return True
        source = self._wanted.source_of(holder)
        return source is None or not self._wanted.sources[source].proves_absence

    def _unwanted(self, service: Service, claim: Claim) -> None:
        key = object_of(service)
        source = self._absences.count(service, key)
        if source is None:
            self._keep(Kept.UNFOLLOWED, key)
        elif self._is_rejected(service, key, source.kind):
            self._keep(Kept.REJECTED, key)
        elif not self._wanted.sources[source].proves_absence:
            self._keep(Kept.BLIND, key)
        elif not self._identity.may_remove(service, claim, self._wanted.cluster_uid):
            self._keep(Kept.UNPROVEN, key)
        elif key in self._wanted.departed:
            self._deregister.append(service)
        else:
            self._absences.add(source, service)

    @cached_property
    def _rejected_ids(self) -> AbstractSet[str]:
        return {one.id for one in self._wanted.rejections.values() if one.id}

    @cached_property
    def _nameless(self) -> AbstractSet[Kind]:
        return {key.kind for key, one in self._wanted.rejections.items() if not one.id}

    def _is_rejected(self, service: Service, key: ObjectKey | None, kind: Kind) -> bool:
        if key is None:
            # The original program's Node: any rejected Node without an address may be this one.
            return kind in self._nameless or service.id in self._rejected_ids
        return key in self._wanted.rejections or service.id in self._rejected_ids

    def _keep(self, why: Kept, key: ObjectKey | None) -> None:
        self._kept[why] += 1
        if key is not None:
            self._kept_objects.add(key)
