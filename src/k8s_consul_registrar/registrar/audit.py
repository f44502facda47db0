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
            for service_id, proof in of_each.items():
                if service_id not in self._unanswered:
                    self._note(service_id, proof, place, is_answered=False)
            raise
        left = {*written.stale, *(failure.id for failure in written.failures)}
        for service_id, proof in of_each.items():
            if service_id not in left:
                self._note(service_id, proof, place)
        return written

    def _note(self, service_id: str, proof: Proof, place: str, *, is_answered: bool = True) -> None:
        self._unanswered.pop(service_id, None)
        if not is_answered:
            self._unanswered[service_id] = None
            if len(self._unanswered) > MOST_UNANSWERED:
                del self._unanswered[next(iter(self._unanswered))]
        removal = Removal(self._clock(), service_id, proof, self._leader, place, is_answered)
        self.removals.appendleft(removal)
        log.info(
            "service deregistered" if is_answered else "service may be deregistered",
            service=service_id,
            object="" if proof.key is None else str(proof.key),
            proof=proof.ground.value,
            generation=proof.generation,
            brake=proof.brake,
            leader=self._leader,
            **({"place": place} if place else {}),
        )
