"""Audit: makes every removal from Consul, and notes each with the proof that it may go."""

import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from k8s_consul_registrar.errors import ConsulError
from k8s_consul_registrar.model import Service, Written
from k8s_consul_registrar.registrar.brake import Proof
from k8s_consul_registrar.registrar.status import MOST_REMOVALS, Removal
from k8s_consul_registrar.telemetry import get_logger

# Removals without an answer that are remembered as logged: they are tried again until one is answered.
MOST_UNANSWERED = 10_000

log = get_logger("audit")


class Audit:
    """The one way to remove services; nothing else calls what removes them."""

    def __init__(
        self,
        removals: deque[Removal] | None = None,
        *,
        leader: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Make the audit; `leader` names this replica."""
        self.removals: deque[Removal] = deque(maxlen=MOST_REMOVALS) if removals is None else removals
        self._leader = leader
        self._clock = clock
        self._unanswered: dict[str, None] = {}

    def remover(
        self, proofs: Mapping[str, Proof] | Proof, *, place: str = ""
    ) -> Callable[[Callable[[Sequence[Service]], Awaitable[Written]], Sequence[Service]], Awaitable[Written]]:
        """Return `remove` with its proofs, for what does not know them."""
        return partial(self.remove, proofs=proofs, place=place)

    async def remove(
        self,
        write: Callable[[Sequence[Service]], Awaitable[Written]],
        services: Sequence[Service],
        proofs: Mapping[str, Proof] | Proof,
        *,
        place: str = "",
    ) -> Written:
        """Remove services by a write, each with its proof; raises what the write raises."""
        of_each = {one.id: proofs if isinstance(proofs, Proof) else proofs[one.id] for one in services}
        try:
            written = await write(services)
        except ConsulError:
            of_each = {one: proof for one, proof in of_each.items() if one not in self._unanswered}
            self._note(of_each, place, is_answered=False)
            self._unanswered |= dict.fromkeys(of_each)
            while len(self._unanswered) > MOST_UNANSWERED:
                del self._unanswered[next(iter(self._unanswered))]
            raise
        for service_id in (*written.stale, *(failure.id for failure in written.failures)):
            of_each.pop(service_id, None)
        self._note(of_each, place)
        for service_id in of_each if self._unanswered else ():
            self._unanswered.pop(service_id, None)
        return written

    def _note(self, of_each: Mapping[str, Proof], place: str, *, is_answered: bool = True) -> None:
        """Note removals, each with its proof."""
        now, where = self._clock(), {"place": place} if place else {}
        event = "service deregistered" if is_answered else "service may be deregistered"
        info = log.bind().info  # bound once: each call would look the level up
        for service_id, proof in of_each.items():
            self.removals.appendleft(Removal(now, service_id, proof, self._leader, place, is_answered))
            info(
                event,
                service=service_id,
                object="" if proof.key is None else str(proof.key),
                proof=proof.ground.value,
                generation=proof.generation,
                brake=proof.brake,
                leader=self._leader,
                **where,
            )
