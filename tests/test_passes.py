"""A full pass that changes overtake: what it planned of them is out of date."""

import asyncio

import pytest

from builders import make_pod, our_pod_service
from k8s_consul_registrar.errors import ConsulError
from memory import PODS
from passes_lab import Lab

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture(params=[True, False], ids=["catalog", "agent"])
async def lab(request: pytest.FixtureRequest) -> Lab:
    """Return a lab that compared everything once."""
    made = Lab(checks_versions=request.param)
    made.cluster.put_list([make_pod(name) for name in NAMES])
    await made.passes.full()
    assert made.names == set(NAMES)
    return made


@pytest.mark.parametrize("read_first", [0, 4])
async def test_what_came_back_meanwhile_is_not_removed(lab: Lab, read_first: int) -> None:
    """It was gone when the pass began, whether it is read before or after it was registered anew."""
    lab.cluster.mirror.remove(PODS, make_pod("a"))
    async with lab.reading(read_first) as full:
        lab.cluster.mirror.put(PODS, make_pod("a", ip="10.1.1.1"))
        async with asyncio.timeout(5):
            while lab.consul.held["pod--shop--a"].address != "10.1.1.1":
                await asyncio.sleep(0.002)
    assert full.result().deregistered == 0
    assert lab.names == set(NAMES)
    assert ("deregister", "pod--shop--a") not in lab.consul.writes


@pytest.mark.parametrize("read_first", [0, 4])
async def test_what_moved_meanwhile_is_written_once(lab: Lab, read_first: int) -> None:
    """Its record is known as it was written, not as it was read before that."""
    async with lab.reading(read_first):
        lab.cluster.mirror.put(PODS, make_pod("b", ip="10.1.1.1"))
        async with asyncio.timeout(5):
            while lab.consul.held["pod--shop--b"].address != "10.1.1.1":
                await asyncio.sleep(0.002)
    assert not lab.passes.has_refused
    assert lab.consul.writes.count(("register", "pod--shop--b")) == 2
    assert lab.consul.held["pod--shop--b"].address == "10.1.1.1"


async def test_facts_outlast_a_full_pass_that_fails(lab: Lab) -> None:
    """What was gone when it began is still a fact to the next, though a pass over changes came between."""
    for name in NAMES[:4]:
        lab.cluster.mirror.remove(PODS, make_pod(name))
    async with lab.reading() as full:
        lab.cluster.mirror.put(PODS, make_pod("f"))
        await lab.until(*NAMES, "f")
        lab.consul.is_down = True
    assert isinstance(full.exception(), ConsulError)
    lab.consul.is_down = False
    await lab.passes.full()
    assert lab.names == {"e", "f"}


async def test_a_conflict_that_came_meanwhile_is_shown(lab: Lab) -> None:
    """The full pass knows nothing of it, and does not hide it either."""
    lab.consul.put_by_hand(our_pod_service("taken", cluster="other"))
    await lab.passes.full()
    async with lab.reading():
        lab.cluster.mirror.put(PODS, make_pod("taken"))
        async with asyncio.timeout(5):
            while not lab.status.conflicts:
                await asyncio.sleep(0.002)
    assert set(lab.status.conflicts) == {"pod--shop--taken"}


async def test_everything_is_there_only_when_nothing_is_owed(lab: Lab) -> None:
    """Not before the first comparison, nor while Consul refuses something or a pass did not get through."""
    fresh = Lab(checks_versions=lab.consul.checks_versions)
    fresh.cluster.put_list([make_pod("a")])
    await fresh.passes.partial()
    assert (fresh.names, fresh.passes.is_complete) == ({"a"}, False)
    complete = [lab.passes.is_complete]
    lab.consul.refused = {"pod--shop--f"}
    lab.cluster.mirror.put(PODS, make_pod("f"))
    await lab.passes.partial()
    complete.append(lab.passes.is_complete)
    lab.consul.refused = set()
    await lab.passes.partial(retries_refused=True)
    complete.append(lab.passes.is_complete)
    lab.consul.is_down = True
    lab.cluster.mirror.put(PODS, make_pod("g"))
    with pytest.raises(ConsulError):
        await lab.passes.partial()
    complete.append(lab.passes.is_complete)
    lab.consul.is_down = False
    await lab.passes.partial()
    complete.append(lab.passes.is_complete)
    assert complete == [True, False, True, False, True]
    assert lab.names == {*NAMES, "f", "g"}


async def test_a_refused_removal_of_what_is_known_to_be_gone_stays_a_fact(lab: Lab) -> None:
    """The next pass needs no second list for it; once it is done the fact is forgotten."""
    gone = {make_pod(name).key for name in NAMES[:4]}
    for name in NAMES[:4]:
        lab.cluster.mirror.remove(PODS, make_pod(name))
    lab.consul.refused = {f"pod--shop--{name}" for name in NAMES}
    await lab.passes.full()
    assert (lab.names, lab.cluster.known().departed) == (set(NAMES), gone)
    assert not lab.passes.is_complete
    lab.consul.refused = set()
    await lab.passes.full()
    assert (lab.names, lab.cluster.known().departed) == ({"e"}, frozenset())
    assert lab.passes.is_complete


async def test_a_pass_over_changes_forgets_a_fact_when_it_acted_on_it(lab: Lab) -> None:
    """A removal that Consul refuses is still owed, with what it is owed to."""
    lab.cluster.mirror.remove(PODS, make_pod("a"))
    lab.consul.refused = {"pod--shop--a"}
    await lab.passes.partial()
    assert (lab.names, lab.cluster.known().departed) == (set(NAMES), {make_pod("a").key})
    lab.consul.refused = set()
    await lab.passes.partial(retries_refused=True)
    assert (lab.names, lab.cluster.known().departed) == (set(NAMES) - {"a"}, frozenset())


async def test_facts_from_before_the_first_comparison_count_in_it() -> None:
    """Until then it is not known what stands in Consul of what went: a mass of it would have to wait."""
    lab = Lab(checks_versions=True)
    for name in NAMES:
        lab.consul.put_by_hand(our_pod_service(name))
    lab.cluster.put_list([make_pod(name) for name in NAMES])
    for name in NAMES[:4]:
        lab.cluster.mirror.remove(PODS, make_pod(name))
    await lab.passes.learn()
    await lab.passes.partial()
    assert lab.names == set(NAMES)
    report = await lab.passes.full()
    assert (lab.names, report.held) == ({"e"}, ())


async def test_what_was_seen_while_no_pass_could_be_made_is_not_forgotten(lab: Lab) -> None:
    """A look at the cluster takes the changes in; the next pass over changes has them."""
    lab.cluster.mirror.put(PODS, make_pod("f"))
    lab.passes.look()
    await lab.passes.partial()
    assert lab.names == {*NAMES, "f"}


async def test_nothing_overtakes_the_first_comparison() -> None:
    """What stands under an ID is not known before it, so what changes meanwhile waits for its end."""
    fresh = Lab(checks_versions=True)
    fresh.cluster.put_list([make_pod("a")])
    async with fresh.reading():
        fresh.cluster.mirror.put(PODS, make_pod("b"))
        await asyncio.sleep(0.05)
        assert fresh.consul.writes == []
    assert fresh.names == {"a"}
    await fresh.passes.partial()
    assert fresh.names == {"a", "b"}


async def test_what_was_overtaken_is_looked_at_once_more() -> None:
    """Somebody may have written there after us, while the rest was read; an agent says so when it is asked."""
    lab = Lab(checks_versions=False)
    lab.cluster.put_list([make_pod(name) for name in NAMES])
    await lab.passes.full()
    async with lab.reading():
        lab.cluster.mirror.put(PODS, make_pod("b", ip="10.1.1.1"))
        async with asyncio.timeout(5):
            while lab.consul.held["pod--shop--b"].address != "10.1.1.1":
                await asyncio.sleep(0.002)
        lab.consul.put_by_hand(our_pod_service("b", note="by hand"), is_noticed=False)
    repaired = lab.consul.held["pod--shop--b"]
    assert (repaired.address, repaired.value("note")) == ("10.1.1.1", "")


async def test_a_full_pass_leaves_nothing_running(lab: Lab) -> None:
    """Its wait for changes ends with it, and when it fails its read does."""
    async with lab.reading():
        pass
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    async with lab.reading() as full:
        lab.consul.failing_writes = 1
        lab.cluster.mirror.put(PODS, make_pod("f"))
        async with asyncio.timeout(5):
            await asyncio.wait({full})
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
    assert isinstance(full.exception(), ConsulError)


async def test_what_was_refused_is_owed_no_more_once_it_is_written(lab: Lab) -> None:
    """By a change of its own, without another try of all that is owed."""
    lab.consul.refused = {"pod--shop--f"}
    lab.cluster.mirror.put(PODS, make_pod("f"))
    await lab.passes.partial()
    lab.consul.refused = set()
    lab.cluster.mirror.put(PODS, make_pod("f", ip="10.1.1.1"))
    await lab.passes.partial()
    assert (lab.names, lab.passes.has_refused) == ({*NAMES, "f"}, False)


async def test_a_removal_whose_end_is_unknown_leaves_nothing_to_rely_on(lab: Lab) -> None:
    """It may have been made though no answer came, so what stands there is looked up."""
    lab.cluster.mirror.remove(PODS, make_pod("a"))
    lab.consul.is_down = True
    with pytest.raises(ConsulError):
        await lab.passes.partial()
    if lab.consul.checks_versions:
        assert lab.passes.entry("pod--shop--a") is None
    lab.consul.is_down = False
    await lab.passes.partial()
    assert lab.names == set(NAMES) - {"a"}
