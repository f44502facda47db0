"""The decision about one service ID: desired and observed state in, an action out; and names of others. Pure."""

from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum, StrEnum
from typing import TypeAlias

import msgspec

from k8s_consul_registrar.errors import ConsulFiltered, ConsulForbidden, ConsulRefused, Reason
from k8s_consul_registrar.model import MANAGED_BY, Kind, ObjectKey, Rejection, Service, Target
from k8s_consul_registrar.registrar.observed import (
    AsDesired,
    Foreign,
    Observed,
    Other,
    Unknown,
    inherited_by,
)
from k8s_consul_registrar.registrar.ownership import Claim, Identity, Policy, is_of_a_registrar
from k8s_consul_registrar.targets.meta import keep_inherited
from k8s_consul_registrar.targets.scrape_config import is_proxied
from k8s_consul_registrar.targets.service_names import Shards

CONTESTED = "another writer with this registrar's identity, which keeps changing it"


class Kept(StrEnum):
    """Reason why a service that nothing asks for stays: fit for a metric's label."""

    REJECTED = "rejected"  # its object exists and is rejected
    BLIND = "blind"  # its source is not synced
    UNFOLLOWED = "unfollowed"  # no source would list its object
    UNPROVEN = "unproven"  # nothing proves it this registrar's to remove


class Standing(Enum):
    """State of the object behind a record that nothing asks for under its ID."""

    DEPARTED = "departed"  # it was seen to stop asking for this ID: a fact
    ABSENT = "absent"  # its source is synced and does not have it: an inference
    REJECTED = "rejected"  # it exists and is rejected
    STALE = "stale"  # its source is not synced, so its absence proves nothing
    UNWATCHED = "unwatched"  # no source would list it


class Desired(msgspec.Struct, frozen=True, gc=False):
    """Everything about one service ID that a decision needs from the cluster's side.

    `standing` is that of `holder`, the object behind the observed record; None where there is no such record.
    `shard` is the one that the service has or had. `is_contested` says that another writer of this
    registrar's identity keeps changing the record.
    """

    id: str
    claims: tuple[Target, ...] = ()
    holder: ObjectKey | None = None
    standing: Standing | None = None
    cluster_uid: str = ""
    shard: str = ""
    is_contested: bool = False


class NameStatus(Enum):
    """Answer to "may a service be given this name?"."""

    FREE = "free"
    TAKEN = "taken"
    UNCHECKED = "unchecked"


def comparable_name(name: str) -> str:
    """Return a name as Consul looks it up: case does not count.

    Source: agent/consul/state/catalog.go, the index `service` of the services, `Lowercase: true`.
    """
    return name.lower()


class Names(msgspec.Struct):
    """Knowledge of the names in the catalog, each as Consul compares them.

    `taken` belong to others at this registrar's own node. New names of the `checked` kinds are looked up in
    the whole catalog first: `looked_up` says which of them are taken.
    """

    checked: AbstractSet[Kind] = frozenset()
    taken: AbstractSet[str] = frozenset()
    looked_up: dict[str, bool] = {}

    def status(self, kind: Kind, name: str) -> NameStatus:
        """Return the answer for one name."""
        compared = comparable_name(name)
        if compared in self.taken or self.looked_up.get(compared, False):
            return NameStatus.TAKEN
        return (
            NameStatus.UNCHECKED
            if kind in self.checked and compared not in self.looked_up
            else NameStatus.FREE
        )


class Moves(msgspec.Struct):
    """The moves of Pods' services from the Pods' own addresses to the proxy, which wait until it serves Pods."""

    are_allowed: bool = True


class Rules(msgspec.Struct, frozen=True):
    """The settings that decisions depend on besides the two states."""

    identity: Identity
    shards: Shards
    names: Names = msgspec.field(default_factory=Names)
    moves: Moves = msgspec.field(default_factory=Moves)
    policy: Policy = Policy.SYNC


class Register(msgspec.Struct, frozen=True, gc=False):
    """Create a service where there is none."""

    entry: AsDesired
    losers: tuple[Rejection, ...] = ()


class Update(msgspec.Struct, frozen=True, gc=False):
    """Write a service over the record that was observed."""

    entry: AsDesired
    losers: tuple[Rejection, ...] = ()


class Deregister(msgspec.Struct, frozen=True, gc=False):
    """Remove the record that was observed; the catalog wants its name and version."""

    id: str
    name: str
    version: int


class InSync(msgspec.Struct, frozen=True, gc=False):
    """Write nothing: the record is as desired."""

    entry: AsDesired
    losers: tuple[Rejection, ...] = ()


class Nothing(msgspec.Struct, frozen=True, gc=False):
    """Write nothing: nothing asks for the ID, and nothing of this registrar's is under it."""


class Keep(msgspec.Struct, frozen=True, gc=False):
    """Leave a record that nothing asks for, or whose object may still exist; `losers` asked for its ID."""

    reason: Kept
    losers: tuple[Rejection, ...] = ()


class Infer(msgspec.Struct, frozen=True, gc=False):
    """Leave a record whose object is absent: that is an inference, for a resync and the brake to judge."""


class AwaitProxy(msgspec.Struct, frozen=True, gc=False):
    """Leave a service at its Pod's own address until the proxy, where `target` is, serves Pods."""

    target: Target
    losers: tuple[Rejection, ...] = ()


class Conflict(msgspec.Struct, frozen=True, gc=False):
    """Leave a record that an object asks for and that belongs to something else; `holder` describes it."""

    key: ObjectKey
    holder: str


class Reject(msgspec.Struct, frozen=True, gc=False):
    """Write nothing: the object that asks for the ID cannot have it."""

    rejection: Rejection
    losers: tuple[Rejection, ...] = ()


class LookUp(msgspec.Struct, frozen=True, gc=False):
    """Read the record first: what is under the ID is not known."""


class CheckName(msgspec.Struct, frozen=True, gc=False):
    """Look for the name in the whole catalog first."""

    name: str


Write: TypeAlias = Register | Update | Deregister


class Withheld(msgspec.Struct, frozen=True, gc=False):
    """Write nothing, though `write` is due: the policy does not allow it."""

    write: Write


Action: TypeAlias = (
    Write | Withheld | InSync | Nothing | Keep | AwaitProxy | Infer | Conflict | Reject | LookUp | CheckName
)


def decide(desired: Desired, observed: Observed, rules: Rules) -> Action:
    """Decide what to do about one service ID."""
    action = _decide(desired, observed, rules)
    match action:
        case Deregister() if rules.policy is not Policy.SYNC:
            return Withheld(action)
        case Register() | Update() if rules.policy is Policy.OBSERVE:
            return Withheld(action)
    return action


def _decide(desired: Desired, observed: Observed, rules: Rules) -> Action:
    if isinstance(observed, Unknown):
        return LookUp()
    if isinstance(observed, (AsDesired, Other)) and _is_of_another_cluster(desired, observed):
        # The record was read before the API server's address led to another cluster.
        observed = Foreign(f"managed_by={MANAGED_BY}, cluster_uid={observed.cluster_uid}")
    if not desired.claims:
        return _decide_unclaimed(desired, observed, rules)
    if isinstance(observed, Foreign):
        return Conflict(desired.claims[0].key, observed.holder)
    if observed is None:
        return _decide_absent(desired, rules)
    return _decide_claimed(desired, observed, rules)


def settle(claims: Sequence[Target], holder: ObjectKey | None) -> tuple[Target, tuple[Rejection, ...]]:
    """Choose the target that gets a service ID, and reject the others.

    Among Pods and endpoints the one that holds the ID in Consul keeps it, otherwise the older gets it: an ID that changed
    hands at every write would be worse than either. Among Nodes with one address only the `rank` decides
    (Ready, then older), since the holder may be the Node that is gone.
    """
    if len(claims) == 1:
        return claims[0], ()
    first = min(claims, key=lambda target: target.rank)
    if first.key.kind is not Kind.NODE and holder is not None:
        first = next((target for target in claims if target.key == holder), first)
    return first, tuple(_lost(target, first) for target in claims if target.key != first.key)


def _is_of_another_cluster(desired: Desired, observed: AsDesired | Other) -> bool:
    uids = observed.cluster_uid, desired.cluster_uid
    return all(uids) and uids[0] != uids[1]


def _lost(target: Target, first: Target) -> Rejection:
    if target.key.kind is Kind.NODE:
        detail = f"the address {target.address} counts for {first.key}"
        return Rejection(target.key, Reason.ADDRESS_TAKEN, detail)
    return Rejection(target.key, Reason.ID_TAKEN, f"the service ID {target.id} belongs to {first.key}")


def _decide_absent(desired: Desired, rules: Rules) -> Action:
    target, losers = settle(desired.claims, None)
    shard = rules.shards.choose(desired.id, desired.shard)
    entry = AsDesired(target, shard, desired.cluster_uid)
    return _if_name_is_free(Register(entry, losers), "", rules)


def _decide_claimed(desired: Desired, observed: AsDesired | Other, rules: Rules) -> Action:
    holder = desired.holder
    if holder is not None and holder.kind is not Kind.NODE and desired.standing in _MAY_EXIST:
        losers = tuple(
            Rejection(target.key, Reason.ID_TAKEN, f"{target.id} is held by {holder}, not seen to be gone")
            for target in desired.claims
        )
        return Keep(_MAY_EXIST[desired.standing], losers)
    target, losers = settle(desired.claims, holder)
    entry = _entry(target, desired, observed, rules)
    if _is_same_record(entry, observed, rules.identity):
        return InSync(entry, losers)
    if desired.is_contested:
        return Conflict(target.key, CONTESTED)
    if not rules.moves.are_allowed and _is_move(target, observed):
        return AwaitProxy(target, losers)
    update = Update(entry, losers)
    return update if entry.name == observed.name else _if_name_is_free(update, observed.name, rules)


def _is_move(target: Target, observed: AsDesired | Other) -> bool:
    """Return True if a Pod is scraped at its own address and asks to be scraped through the proxy."""
    was_proxied = observed.is_proxied if isinstance(observed, Other) else _is_proxied(observed.target)
    return _is_proxied(target) and not was_proxied


def _is_proxied(target: Target) -> bool:
    return any(key == "metrics_path" and is_proxied(text) for key, text in target.meta)


def _entry(target: Target, desired: Desired, observed: AsDesired | Other, rules: Rules) -> AsDesired:
    return AsDesired(
        keep_inherited(target, inherited_by(observed)) if target.awaits else target,
        rules.shards.choose(desired.id, observed.shard),
        desired.cluster_uid or observed.cluster_uid,
        observed.version,
    )


def _is_same_record(entry: AsDesired, observed: AsDesired | Other, identity: Identity) -> bool:
    """Return whether writing an entry would change nothing; targets can differ in what no record shows."""
    if isinstance(observed, AsDesired):
        is_moved = entry.target.address != observed.target.address  # the usual change, seen at once
        return not is_moved and (entry == observed or entry.service(identity) == observed.service(identity))
    return not observed.is_unsynced and hash(entry.service(identity)) == observed.digest


def _decide_unclaimed(desired: Desired, observed: AsDesired | Other | Foreign | None, rules: Rules) -> Action:
    if observed is None or isinstance(observed, Foreign):
        return Nothing()
    if desired.standing in _MAY_EXIST:
        return Keep(_MAY_EXIST[desired.standing])
    claim = observed.claim if isinstance(observed, Other) else Claim.OURS
    if not rules.identity.may_remove(claim, observed.cluster_uid, desired.cluster_uid):
        return Keep(Kept.UNPROVEN)
    if desired.standing is Standing.ABSENT:
        return Infer()
    return Deregister(desired.id, observed.name, observed.version)


# Standings in which the object behind a record may still exist and want it.
_MAY_EXIST = {
    Standing.REJECTED: Kept.REJECTED,
    Standing.STALE: Kept.BLIND,
    Standing.UNWATCHED: Kept.UNFOLLOWED,
}


def _if_name_is_free(write: Register | Update, held_name: str, rules: Rules) -> Action:
    """Return the write unless its name belongs to others; a name that a service has already is kept."""
    entry = write.entry
    name = entry.name
    if comparable_name(name) == comparable_name(held_name):
        return write
    match rules.names.status(entry.target.key.kind, name):
        case NameStatus.UNCHECKED:
            return CheckName(name)
        case NameStatus.TAKEN:
            detail = f"the service name {name} is used by a service that no registrar wrote"
            return Reject(Rejection(entry.target.key, Reason.NAME_TAKEN, detail, entry.id), write.losers)
        case NameStatus.FREE:
            return write


class NameGuard:
    """Keeps services from joining a name under which something else is looked up.

    A resync reports every foreign name at this registrar's own node. A new name of the `checked` kinds (those
    whose template is not the default, which contains the object's own name) is looked up once in the whole
    catalog, and the answer holds until the next resync. Where that look is denied or filtered, the resync's
    view decides, and `unchecked` receives the reason once. `names` has what is known.
    """

    def __init__(
        self,
        look: Callable[[str], Awaitable[bool]] | None = None,
        *,
        checked: AbstractSet[Kind] = frozenset(),
        unchecked: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._look = look
        self._unchecked = unchecked
        self.names = Names(checked if look is not None else frozenset())
        self._reading: set[str] = set()
        self._has_warned = False

    async def check(self, name: str) -> None:
        """Look a name up in the whole catalog; raises a `ConsulError` when Consul is unavailable."""
        compared = comparable_name(name)
        if self._look is None or compared in self.names.looked_up:
            return
        try:
            self.names.looked_up[compared] = await self._look(name)
        except (ConsulForbidden, ConsulFiltered, ConsulRefused) as error:
            self.names.looked_up[compared] = False
            if not self._has_warned:
                self._has_warned = True
                self._unchecked(str(error))

    # Called by a resync

    def begin(self) -> None:
        """Begin to collect the foreign names of a complete read."""
        self._reading = set()

    def saw(self, service: Service) -> None:
        """Note a foreign service of the read."""
        if service.name and not is_of_a_registrar(service):
            self._reading.add(comparable_name(service.name))

    def finish(self) -> None:
        """Replace the names of the last read, and look new names up again."""
        self.names.taken, self.names.looked_up = self._reading, {}
