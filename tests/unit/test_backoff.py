"""Delays between retries grow, are spread, and are capped."""

import random
from itertools import islice

from k8s_consul_registrar.backoff import delays


def test_delays_double_up_to_the_cap_within_their_upper_half() -> None:
    """Each delay lies between half and all of 1, 2, 4, 5, 5 seconds."""
    for seed in range(20):
        drawn = list(islice(delays(1, 5, pick=random.Random(seed)), 5))
        for delay, most in zip(drawn, (1, 2, 4, 5, 5), strict=True):
            assert most / 2 <= delay <= most


def test_two_daemons_do_not_keep_step() -> None:
    """Without a given source of chance two sequences differ."""
    assert list(islice(delays(1, 5), 5)) != list(islice(delays(1, 5), 5))
