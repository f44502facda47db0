"""The brake holds mass removals that are only inferred, in one source or in all sources of a kind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.model import Kind, Source
from k8s_consul_registrar.registrar.brake import (
    LEAST,
    SHARE,
    Absence,
    BrakeRules,
    Ground,
    Judgement,
    Memory,
    SourceAbsences,
    judge,
)

PODS, NODES = Source(Kind.POD), Source(Kind.NODE)
RULES = BrakeRules(confirm=60, confirm_start=600)
# Every source was judged once since the start.
RUNNING = Memory(judged=frozenset({PODS, NODES}))
START = Memory()


def gone(
    count: int,
    held: int,
    at: float = 0.0,
    *,
    first: int = 0,
    is_empty: bool = False,
    is_proven: bool = False,
    is_unselected: bool = False,
    prefix: str = "s",
) -> SourceAbsences:
    """Return a source that lacks `count` of `held` services, which reads begun at `at` confirm."""
    absence = Absence(at, is_proven, is_unselected)
    return SourceAbsences({f"{prefix}{first + one}": absence for one in range(count)}, held, is_empty)


def pods(found: SourceAbsences, memory: Memory = RUNNING, now: float = 0.0) -> Judgement:
    """Judge the Pods alone."""
    return judge({PODS: found}, memory, RULES, now)


def wait_of(judgement: Judgement) -> float:
    """Return how long reads must agree on the first removal that is held."""
    return judgement.held[0].due - judgement.held[0].since


def test_brake_few_absences_go_at_once() -> None:
    """Two services, or no more than 30 % of a source, are no mass removal; not even at a start."""
    for memory in (RUNNING, START):
        assert pods(gone(2, 2), memory).released == {"s0", "s1"}
        assert len(pods(gone(30, 100), memory).released) == 30


def test_brake_mass_removal_waits_for_a_later_read() -> None:
    """31 of 100 wait until a read 60 s later agrees; the same read judged again is no second one."""
    first = pods(gone(31, 100, 1000), now=1001)
    assert first.released == frozenset()
    assert [(held.source, len(held.ids), held.since, held.due) for held in first.held] == [
        (PODS, 31, 1000, 1060)
    ]
    again = pods(gone(31, 100, 1000), first.memory, now=5000)
    assert not again.released
    early = pods(gone(31, 100, 1059), again.memory, now=1059)
    assert not early.released
    late = pods(gone(31, 100, 1060), early.memory, now=1060)
    assert (len(late.released), late.held) == (31, ())


def test_brake_service_that_comes_back_starts_again() -> None:
    """Later reads count from the start for it, and for it alone."""
    first = pods(gone(40, 100, 0))
    some_back = pods(gone(35, 100, 30), first.memory)
    all_gone = pods(gone(40, 100, 60), some_back.memory)
    assert all_gone.released == {f"s{number}" for number in range(35)}
    assert [set(held.ids) for held in all_gone.held] == [{"s35", "s36", "s37", "s38", "s39"}]


def test_brake_source_that_recovers_forgets() -> None:
    """A read without an absence clears what was held."""
    first = pods(gone(40, 100, 0))
    back = pods(gone(0, 100, 30), first.memory)
    assert back.memory.sources == {}
    assert not pods(gone(40, 100, 60), back.memory).released


def test_brake_first_judgement_of_a_mass_removal_waits_longer() -> None:
    """After a start ten minutes must pass, whatever later reads would need."""
    first = pods(gone(40, 100, 0), START)
    assert wait_of(first) == 600
    assert not pods(gone(40, 100, 599), first.memory).released
    assert len(pods(gone(40, 100, 600), first.memory).released) == 40


def test_brake_source_judged_once_is_no_longer_at_its_start() -> None:
    """Each source has a first judgement of its own, and one without absences is one."""
    first = pods(gone(0, 100), START)
    both = judge({PODS: gone(40, 100), NODES: gone(40, 100, prefix="n")}, first.memory, RULES, 0)
    assert {held.source: held.due for held in both.held} == {PODS: 60, NODES: 600}


def test_brake_source_that_shows_nothing_waits_longer() -> None:
    """While three or more are held, at any time; also for the rest of a source whose others went as facts."""
    assert wait_of(pods(gone(3, 3, is_empty=True))) == 600
    assert wait_of(pods(gone(2, 10, is_empty=True))) == 600
    assert pods(gone(2, 2, is_empty=True)).released == {"s0", "s1"}


def test_brake_mass_removal_that_grows_worse_never_waits_less() -> None:
    """Removals held for the long wait keep it when the next read shows a mere mass removal."""
    empty = pods(gone(100, 100, 0, is_empty=True))
    partly = pods(gone(90, 100, 60), empty.memory)
    assert (partly.released, wait_of(partly)) == (frozenset(), 600)
    later = pods(gone(95, 100, 120), partly.memory)
    assert wait_of(later) == 600
    assert not pods(gone(95, 100, 599), later.memory).released
    assert len(pods(gone(95, 100, 600), later.memory).released) == 90


def test_brake_wait_becomes_longer_when_the_source_is_empty() -> None:
    """Reads agree since the first one, but for ten minutes now."""
    partly = pods(gone(90, 100, 0))
    empty = pods(gone(100, 100, 30, is_empty=True), partly.memory)
    assert not pods(gone(100, 100, 599, is_empty=True), empty.memory).released
    assert len(pods(gone(100, 100, 600, is_empty=True), empty.memory).released) == 90


@pytest.mark.parametrize(("namespaces", "each"), [(50, 2), (12, 2), (3, 1)])
@pytest.mark.parametrize("memory", [START, "running"])
def test_brake_small_absences_of_many_namespaces_are_a_mass_removal(
    namespaces: int, each: int, memory: Memory | str
) -> None:
    """A wrong kubeconfig shows every namespace empty: each loses little, the kind everything."""
    sources = [Source(Kind.POD, f"team-{number}") for number in range(namespaces)]
    before = memory if isinstance(memory, Memory) else Memory(judged=frozenset(sources))

    def judged(at: float, known: Memory) -> Judgement:
        found = {one: gone(each, each, at, is_empty=True, prefix=one.namespace) for one in sources}
        return judge(found, known, RULES, at)

    first = judged(0, before)
    assert first.released == frozenset()
    assert {held.due for held in first.held} == {600}
    early = judged(599, first.memory)
    assert early.released == frozenset()
    assert len(judged(600, early.memory).released) == namespaces * each


def test_brake_absences_of_part_of_many_namespaces_count_together() -> None:
    """Eight of 24 are too many though no namespace loses more than one; seven are not."""
    sources = [Source(Kind.POD, f"team-{number}") for number in range(12)]
    known = Memory(judged=frozenset(sources))
    for lost, released in ((7, 7), (8, 0)):
        found = {one: gone(int(number < lost), 2, prefix=one.namespace) for number, one in enumerate(sources)}
        judgement = judge(found, known, RULES, 0)
        assert len(judgement.released) == released
        assert all(wait == 60 for wait in (held.due - held.since for held in judgement.held))


def test_brake_large_absence_of_one_namespace_is_held_though_small_in_its_kind() -> None:
    """Each source is judged alone as well."""
    large, small = Source(Kind.POD, "large"), Source(Kind.POD, "small")
    known = Memory(judged=frozenset({large, small}))
    judgement = judge({large: gone(1, 1000), small: gone(4, 10, prefix="x")}, known, RULES, 0)
    assert (judgement.released, [held.source for held in judgement.held]) == (frozenset({"s0"}), [small])


def test_brake_kinds_are_judged_apart() -> None:
    """Pods that stay make the loss of all Nodes no smaller."""
    judgement = judge({PODS: gone(1, 1000), NODES: gone(5, 5, prefix="n")}, RUNNING, RULES, 0)
    assert (judgement.released, [held.source for held in judgement.held]) == (frozenset({"s0"}), [NODES])


def test_brake_removals_in_small_portions_are_a_mass_removal() -> None:
    """Inferred removals of the last ten minutes count as absent and as held."""
    first = pods(gone(30, 100, 0), now=0)
    assert len(first.released) == 30
    second = pods(gone(1, 70, 10, first=30), first.memory, now=10)
    assert (second.released, second.held[0].ids) == (frozenset(), ("s30",))
    much_later = pods(gone(1, 70, 600, first=30), first.memory, now=600)
    assert much_later.released == {"s30"}


def test_brake_removals_of_one_namespace_count_for_its_kind() -> None:
    """Portions of different sources add up."""
    one, other = Source(Kind.POD, "one"), Source(Kind.POD, "other")
    known = Memory(judged=frozenset({one, other}))
    first = judge({one: gone(2, 5), other: gone(0, 5)}, known, RULES, 0)
    assert len(first.released) == 2
    second = judge({one: gone(0, 3), other: gone(2, 5, prefix="o")}, first.memory, RULES, 10)
    assert second.released == frozenset()


def test_brake_releases_nothing_of_a_kind_that_is_not_listed_yet() -> None:
    """Not even one service, until each source of the kind was listed or has failed for long."""
    judgement = judge(
        {PODS: gone(1, 100), NODES: gone(1, 100, prefix="n")}, START, RULES, 0, unready=[Kind.POD]
    )
    assert (judgement.released, judgement.held) == (frozenset({"n0"}), ())
    assert judgement.memory.judged == {NODES}
    after = judge({PODS: gone(40, 100, 5)}, judgement.memory, RULES, 5)
    assert wait_of(after) == 600


def test_brake_absences_that_are_not_confirmed_count() -> None:
    """Two that are confirmed do not slip through while forty others wait; and the source is not known yet."""
    found = SourceAbsences(gone(2, 100).absent, 100, unconfirmed=40)
    first = pods(found, START)
    assert (first.released, wait_of(first)) == (frozenset(), 600)
    assert wait_of(pods(gone(42, 100), first.memory)) == 600


def test_brake_source_that_is_not_judged_keeps_its_memory() -> None:
    """One that proves nothing for a while neither starts again nor counts as judged."""
    first = pods(gone(40, 100, 0), START)
    meanwhile = judge({NODES: gone(0, 10)}, first.memory, RULES, 60)
    assert meanwhile.memory.sources == first.memory.sources
    assert len(pods(gone(40, 100, 600), meanwhile.memory).released) == 40


def test_brake_absence_proven_at_a_start_waits_less() -> None:
    """Asked for by name in the same cluster, or on a Node that is deleted; but not where nothing is left."""
    assert wait_of(pods(gone(40, 100, is_proven=True), START)) == 60
    assert wait_of(pods(gone(40, 40, is_proven=True, is_empty=True), START)) == 600


def test_brake_absence_proven_later_waits_less_from_then_on() -> None:
    """The Node of an absent Pod is deleted meanwhile."""
    first = pods(gone(40, 100, 0), START)
    later = pods(gone(40, 100, 60, is_proven=True), first.memory)
    assert len(later.released) == 40


def test_brake_object_that_is_no_longer_selected_waits_however_few() -> None:
    """A selector that was changed by mistake is put right within ten minutes."""
    first = pods(gone(1, 1000, 0, is_unselected=True))
    assert wait_of(first) == 600
    assert not pods(gone(1, 1000, 599, is_unselected=True), first.memory).released
    assert pods(gone(1, 1000, 600, is_unselected=True), first.memory).released == {"s0"}


def test_brake_holds_what_is_over_the_quota_apart_and_for_the_long_wait() -> None:
    """A single one too; beside what is absent, which goes by its own wait."""
    absent = {"gone": Absence(0), "over": Absence(0, is_unselected=True, ground=Ground.QUOTA)}
    first = judge({PODS: SourceAbsences(absent, 100)}, RUNNING, RULES, 0)
    assert first.released == {"gone"}
    (held,) = first.held
    assert (held.ids, held.ground, held.due) == (("over",), Ground.QUOTA, 600)
    many = {f"gone-{number}": Absence(0) for number in range(40)} | {"over": absent["over"]}
    second = judge({PODS: SourceAbsences(many, 100)}, RUNNING, RULES, 0)
    assert [(one.ground, len(one.ids), one.due) for one in second.held] == [
        (Ground.ABSENCE, 40, 60),
        (Ground.QUOTA, 1, 600),
    ]


def test_brake_mass_removal_can_be_allowed() -> None:
    """The operator may say that one is meant; a source that is not listed yet is waited for all the same."""
    allowed = BrakeRules(allow_mass=True)
    found = {PODS: gone(100, 100, is_empty=True)}
    assert len(judge(found, START, allowed, 0).released) == 100
    assert not judge(found, START, allowed, 0, unready=[Kind.POD]).released


def test_brake_held_removal_is_due_no_earlier_than_now() -> None:
    """A read that is overdue is asked for at once, not in the past."""
    first = pods(gone(40, 100, 0))
    assert pods(gone(40, 100, 30), first.memory, now=1000).held[0].due == 1000


_FOUND = st.builds(
    gone,
    st.integers(0, 10),
    st.integers(10, 20),
    is_empty=st.booleans(),
    is_proven=st.booleans(),
    is_unselected=st.booleans(),
)


@given(st.dictionaries(st.sampled_from([PODS, NODES, Source(Kind.POD, "a")]), _FOUND), st.booleans())
def test_brake_releases_or_remembers_each_absence(
    found: dict[Source, SourceAbsences], is_running: bool
) -> None:
    """Each absence goes or is held, and a mass removal never goes by its first read."""
    judgement = judge(found, RUNNING if is_running else START, RULES, 0)
    for source, one in found.items():
        held = judgement.memory.sources.get(source)
        kept = set() if held is None else set(held.since)
        assert kept | (judgement.released & one.absent.keys()) == one.absent.keys()
        is_mass = len(one.absent) >= LEAST and len(one.absent) > SHARE * one.held
        if is_mass or (one.is_empty and one.absent):
            assert kept == one.absent.keys()
