"""`registrar.election`: contenders against one record, under every fault that networks and processes have."""

import itertools
import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from k8s_consul_registrar.registrar.election import CreateLease, ElectionTiming, ReadLease, UpdateLease
from support.election import Contender, Faults, Reign, World

TIMING = ElectionTiming()
HOSTILE = Faults(
    refused=0.1, lost_request=0.1, lost_answer=0.1, stalled=0.08, longest_delay=3.0, meddled=0.03
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(2, 4),
    faults=st.sampled_from(
        (HOSTILE, Faults(), replace(HOSTILE, stalled=0.4), replace(HOSTILE, longest_delay=12.0))
    ),
)
def test_never_two_lead(seed: int, count: int, faults: Faults) -> None:
    """Whatever is lost, late, refused, stopped, killed, cut off or set back: no two may write at once."""
    world = World(random.Random(seed), faults)
    contenders = [Contender(world, f"c{number}", TIMING) for number in range(count)]
    for each in contenders:
        world.at(world.pick.uniform(0, 5), each.start)
    for number in range(12):
        victim = world.pick.choice(contenders)
        ending = (victim.kill, victim.resign, victim.cut_off)[number % 3]
        world.at(world.pick.uniform(10, 250), ending)
        successor = Contender(world, f"n{number}", TIMING)
        world.at(world.pick.uniform(10, 250), successor.start)
        contenders.append(successor)
    world.run(300)
    assert world.reigns or faults != Faults()
    latest = Reign("nobody", 0, 0)
    for reign in sorted(world.reigns, key=lambda one: one.since):
        assert reign.who == latest.who or latest.until <= reign.since
        latest = max(latest, reign, key=lambda one: one.until)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_writes_follow_one_another_by_the_rules(seed: int) -> None:
    """Each holder's transitions go up by one, and no renewal repeats a time another has already seen."""
    world = World(random.Random(seed), HOSTILE)
    for number in range(3):
        Contender(world, f"c{number}", TIMING).start()
    world.run(400)
    records = [lease for _, lease in world.writes]
    for before, after in itertools.pairwise(records):
        if after.holder == before.holder:
            assert (after.transitions, after.acquired) == (before.transitions, before.acquired)
            assert after.renewed > before.renewed
        else:
            assert after.transitions == before.transitions + 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 4), is_orderly=st.booleans())
def test_takeover_takes_no_longer_than_promised(seed: int, count: int, is_orderly: bool) -> None:
    """Within lease duration and a stretched retry of a leader's death, and within the latter of a release."""
    world = World(random.Random(seed))
    contenders = [Contender(world, f"c{number}", TIMING) for number in range(count + 1)]
    for each in contenders:
        world.at(world.pick.uniform(0, 5), each.start)
    world.run(world.pick.uniform(20, 40))
    (leader,) = [each for each in contenders if each.is_leading]
    ended = world.time
    leader.resign() if is_orderly else leader.kill()
    world.run(ended + 60)
    (successor,) = [each for each in contenders if each is not leader and each.is_leading]
    begun = min(reign.since for reign in world.reigns if reign.who == successor.name and reign.since >= ended)
    requests = 4 * 2 * world.faults.longest_delay
    retry = TIMING.stretched(1)
    assert begun - ended <= (retry if is_orderly else TIMING.lease_duration + retry) + requests
    assert leader.is_done is is_orderly


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_healthy_leader_keeps_leading(seed: int) -> None:
    """Without faults one leads from first to last, at a request every retry period."""
    world = World(random.Random(seed))
    contenders = [Contender(world, f"c{number}", TIMING) for number in range(3)]
    for each in contenders:
        each.start()
    world.run(200)
    assert len({reign.who for reign in world.reigns}) == 1
    assert 95 <= len(world.writes) <= 101
    gaps = itertools.pairwise(world.reigns)
    assert all(before.until == after.since for before, after in gaps)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_requests_stay_few_whatever_is_answered(seed: int) -> None:
    """Even where everything clashes or fails, a contender asks no more than two or three times a retry period."""
    world = World(random.Random(seed), Faults(refused=0.5, meddled=1.0))
    contender = Contender(world, "c", TIMING)
    requests = 0
    send = contender._send

    def counted(action: ReadLease | CreateLease | UpdateLease) -> None:
        nonlocal requests
        requests += 1
        send(action)

    contender._send = counted  # type: ignore[method-assign,assignment] # counts what goes out
    contender.start()
    world.run(200)
    assert requests <= 300
