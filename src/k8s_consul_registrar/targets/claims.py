"""Decides between targets that ask for the same service ID, so that they never overwrite each other."""

from collections.abc import Sequence

from k8s_consul_registrar.model import Kind, ObjectKey, Rejection, Target
from k8s_consul_registrar.targets.reasons import Reason


def settle(claims: Sequence[Target], holder: ObjectKey | None) -> tuple[Target, list[Rejection]]:
    """Choose the target that gets the ID, and reject the others by reason.

    Among Pods the one that holds the ID in Consul keeps it, else the older gets it: an ID that changed
    hands at every pass would be worse than either. Among Nodes with one address the `rank` alone decides
    (Ready, then older), since the holder may be the Node that is gone.
    """
    if len(claims) == 1:
        return claims[0], []
    first = min(claims, key=lambda target: target.rank)
    if first.key.kind is Kind.POD and holder is not None:
        first = next((target for target in claims if target.key == holder), first)
    return first, [_lost(target, first) for target in claims if target.key != first.key]


def _lost(target: Target, winner: Target) -> Rejection:
    if target.key.kind is Kind.NODE:
        return Rejection(
            target.key, Reason.ADDRESS_TAKEN, f"the address {target.address} counts for {winner.key}"
        )
    return Rejection(target.key, Reason.ID_TAKEN, f"the service ID {target.id} belongs to {winner.key}")
