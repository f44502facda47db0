"""The first sync: what Consul lacks is written while the lists still stream, each service once."""

import asyncio
import time

import pytest
from msgspec.structs import replace

from builders import make_pod, make_service, our_pod_service
from k8s_consul_registrar.errors import ConsulError
from k8s_consul_registrar.registrar.status import PassReport
from memory import PODS
from passes_lab import Lab

NAMES = [f"p{number}" for number in range(20)]
MOST_NEWS = 500


@pytest.fixture(params=[True, False], ids=["catalog", "agent"])
def lab(request: pytest.FixtureRequest) -> Lab:
    """Return a lab that knows nothing yet, and whose list has begun."""
    made = Lab(checks_versions=request.param)
    made.cluster.mirror.start_listing(PODS)
    return made


def see(lab: Lab, *names: str, ip: str = "10.0.0.1") -> None:
    """Let Pods arrive, as a part of the list."""
    for name in names:
        lab.cluster.mirror.put(PODS, make_pod(name, ip=ip))


async def first_pass(lab: Lab) -> asyncio.Task[PassReport]:
    """Return a pass that has begun to write five Pods, and gives way after each."""
    lab.consul.gives_way = True
    await lab.passes.learn()
    see(lab, *NAMES[:5])
    writing = asyncio.create_task(lab.passes.partial())
    await asyncio.sleep(0)
    return writing


def registered(lab: Lab) -> list[str]:
    """Return the Pods that were written, in order."""
    return [service_id.removeprefix("pod--shop--") for verb, service_id in lab.consul.writes]


async def test_what_arrives_while_writing_is_written_by_the_same_pass(lab: Lab) -> None:
    """The writes neither wait for the list nor for each other's pass."""
    writing = await first_pass(lab)
    for name in NAMES[5:]:
        await asyncio.sleep(0)
        see(lab, name)
    report = await writing
    assert report.registered == len(NAMES)
    assert sorted(registered(lab)) == sorted(NAMES)
    assert lab.passes.registered == len(NAMES)


async def test_what_changes_while_it_is_written_is_written_again(lab: Lab) -> None:
    """It is over what stands in Consul by then, not beside it."""
    writing = await first_pass(lab)
    while not registered(lab):
        await asyncio.sleep(0)
    written = registered(lab)[0]
    waiting = next(name for name in NAMES[:5] if name != written)
    see(lab, written, waiting, ip="10.9.9.9")
    report = await writing
    assert (report.registered, report.updated) == ((5, 2) if lab.consul.checks_versions else (7, 0))
    moved = {service_id for service_id, one in lab.consul.held.items() if one.address == "10.9.9.9"}
    assert moved == {f"pod--shop--{name}" for name in (written, waiting)}
    assert not lab.passes.has_refused


async def test_what_vanishes_while_it_is_written_goes(lab: Lab) -> None:
    """A full pass finds it, when its list has ended."""
    writing = await first_pass(lab)
    lab.cluster.mirror.remove(PODS, make_pod("p0"))
    await writing
    lab.cluster.mirror.finish_listing(PODS, 1.0)
    await lab.passes.full()
    assert lab.names == set(NAMES[1:5])


async def test_a_consul_that_fails_in_the_middle_loses_nothing(lab: Lab) -> None:
    """What was not written is written later; what may have been is left to the comparison."""
    await lab.passes.learn()
    see(lab, *NAMES[:5])
    lab.consul.failing_writes = 1
    with pytest.raises(ConsulError):
        await lab.passes.partial()
    lab.passes.look()
    see(lab, *NAMES[5:10])
    await lab.passes.partial()
    assert len(registered(lab)) == 9, "all but the one that was under way"
    lab.cluster.mirror.finish_listing(PODS, 1.0)
    await lab.passes.full()
    assert lab.names == set(NAMES[:10])
    assert not lab.passes.has_refused


async def test_what_is_refused_of_a_first_sync_is_told(lab: Lab) -> None:
    """By the pass that wrote it, and it is owed after that."""
    lab.consul.refused = {f"pod--shop--{name}" for name in NAMES[:2]}
    writing = await first_pass(lab)
    report = await writing
    assert (report.registered, report.refused) == (3, 2)
    assert lab.passes.has_refused


async def test_what_stands_there_already_is_left_to_the_comparison(lab: Lab) -> None:
    """Nothing is written under an ID of which nothing more is known."""
    see(lab, *NAMES[:3])
    await lab.passes.learn()
    await lab.passes.partial()
    await lab.passes.learn()
    lab.consul.writes.clear()
    see(lab, *NAMES[:5], ip="10.9.9.9")
    await lab.passes.partial()
    assert sorted(registered(lab)) == NAMES[3:5]


async def test_names_that_others_look_up_are_kept_away_from_at_once(lab: Lab) -> None:
    """They are known before the first write; what another cluster's registrar wrote takes no name."""
    lab.consul.put_by_hand(make_service("by-hand", name="POD--shop--p0"))
    theirs = replace(our_pod_service("theirs", cluster="other"), name="pod--shop--p1")
    lab.consul.put_by_hand(theirs)
    await lab.passes.learn()
    see(lab, *NAMES[:3])
    await lab.passes.partial()
    assert sorted(registered(lab)) == NAMES[1:3]


async def test_a_comparison_that_is_due_does_not_wait_for_a_stream_of_news(lab: Lab) -> None:
    """Once the lists are complete, a pass ends with what it has begun, however much goes on arriving."""
    writing = await first_pass(lab)
    lab.cluster.mirror.finish_listing(PODS, 1.0)
    arrived = 0
    while not writing.done() and arrived < MOST_NEWS:
        see(lab, f"n{arrived}")
        arrived += 1
        await asyncio.sleep(0)
    await writing
    assert arrived < MOST_NEWS
    assert lab.cluster.needs_full_pass()


async def test_the_end_of_a_list_is_written_with_the_rest_of_it(lab: Lab) -> None:
    """What has arrived by then does not wait until it is planned whole."""
    writing = await first_pass(lab)
    see(lab, *NAMES[5:])
    lab.cluster.mirror.finish_listing(PODS, 1.0)
    assert (await writing).registered == len(NAMES)
    assert lab.consul.register_calls == 1


async def test_a_long_pass_shows_that_it_is_alive(lab: Lab) -> None:
    """Filling a slow agent may take longer than a loop may stand still."""
    await lab.passes.learn()
    see(lab, *NAMES)
    assert lab.status.ticked_at == 0.0
    before = time.monotonic()
    await lab.passes.partial()
    assert lab.status.ticked_at >= before


async def test_where_nothing_is_missing_nothing_is_asked_of_consul(lab: Lab) -> None:
    """A registry that has nothing to write does not hear of it."""
    await lab.passes.learn()
    lab.consul.is_down = True
    assert (await lab.passes.partial()).writes == 0
