"""The registrar's status for its probes."""

import time

from k8s_consul_registrar.registrar.status import HANG, RegistrarStatus


def test_liveness_of_a_loop_that_hangs_is_lost() -> None:
    """The kubelet restarts a registrar whose loop has not turned for long, and no other."""
    now = time.monotonic()
    assert RegistrarStatus(ticked_at=now).is_alive()
    assert RegistrarStatus(ticked_at=now - HANG / 2).is_alive()
    assert not RegistrarStatus(ticked_at=now - HANG - 1).is_alive()
