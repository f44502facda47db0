"""The brake holds mass removals that are only inferred."""

from k8s_consul_registrar.model import Kind, Source
from k8s_consul_registrar.registrar.brake import Absence, BrakeRules, Judgement, SourceMemory, judge_absence

PODS = Source(Kind.POD)
RULES = BrakeRules(confirm=60, confirm_start=600)
KNOWN = SourceMemory()


def absence(count: int, held: int, at: float, *, is_empty: bool = False) -> Absence:
    """Return an absence of the first `count` services of `held`."""
    return Absence(PODS, frozenset(f"s{number}" for number in range(count)), held, is_empty, at)


def judged(given: Absence, memory: SourceMemory | None, rules: BrakeRules = RULES) -> Judgement:
    """Judge with the tests' rules."""
    return judge_absence(given, memory, rules)


def test_a_few_go_at_once() -> None:
    """Two services, or no more than 30 % of a source, are no mass removal."""
    assert judged(absence(2, 2, 0), KNOWN).released == {"s0", "s1"}
    assert len(judged(absence(30, 100, 0), KNOWN).released) == 30


def test_a_mass_removal_waits_for_a_second_list() -> None:
    """31 of 100 wait until a list 60 s later agrees; the same list judged again is no second list."""
    first = judged(absence(31, 100, 1000), KNOWN)
    assert first.released == frozenset()
    assert first.held is not None
    assert (len(first.held.ids), first.held.due) == (31, 1060)
    again = judged(absence(31, 100, 1000), first.memory)
    assert not again.released
    early = judged(absence(31, 100, 1059), again.memory)
    assert not early.released
    late = judged(absence(31, 100, 1060), early.memory)
    assert len(late.released) == 31
    assert late.held is None


def test_the_rest_of_an_empty_source_waits_too() -> None:
    """Of ten held eight are known to be gone; that the list shows nothing makes the other two no small matter."""
    first = judged(absence(2, 10, 0, is_empty=True), KNOWN)
    assert first.held is not None
    assert first.held.wait == RULES.confirm_start


def test_what_comes_back_starts_anew() -> None:
    """An ID that a list shows again is forgotten, so later lists count from the start for it."""
    first = judged(absence(40, 100, 0), KNOWN)
    some_back = judged(absence(35, 100, 30), first.memory)
    all_gone = judged(absence(40, 100, 60), some_back.memory)
    assert all_gone.released == {f"s{number}" for number in range(35)}
    assert all_gone.held is not None
    assert set(all_gone.held.ids) == {"s35", "s36", "s37", "s38", "s39"}


def test_a_recovered_source_forgets() -> None:
    """A list without a mass absence clears what was held."""
    first = judged(absence(40, 100, 0), KNOWN)
    back = judged(absence(0, 100, 30), first.memory)
    assert back.memory == SourceMemory()
    assert not judged(absence(40, 100, 60), back.memory).released


def test_first_list_after_a_start_waits_longer() -> None:
    """A mass removal that the first list infers waits ten minutes, whatever later lists would owe."""
    first = judged(absence(40, 100, 0), None)
    assert first.held is not None
    assert first.held.wait == 600
    assert not judged(absence(40, 100, 599), first.memory).released
    assert len(judged(absence(40, 100, 600), first.memory).released) == 40


def test_an_empty_source_waits_longer() -> None:
    """A source that shows nothing while three or more are held waits ten minutes at any time."""
    empty = judged(absence(3, 3, 0, is_empty=True), KNOWN)
    assert empty.held is not None
    assert empty.held.wait == 600
    assert judged(absence(2, 2, 0, is_empty=True), KNOWN).released == {"s0", "s1"}


def test_growing_worse_never_shortens_the_wait() -> None:
    """What was held for the long wait keeps it when the next list is merely a mass absence."""
    empty = judged(absence(100, 100, 0, is_empty=True), KNOWN)
    partly = judged(absence(90, 100, 60), empty.memory)
    assert not partly.released
    assert partly.held is not None
    assert partly.held.wait == 600


def test_mass_removal_can_be_allowed() -> None:
    """The operator may say that a mass removal is meant."""
    allowed = judged(absence(100, 100, 0, is_empty=True), None, BrakeRules(allow_mass=True))
    assert len(allowed.released) == 100


def test_waits_of_zero_still_need_a_later_list() -> None:
    """Without a wait the second list is still asked for."""
    rules = BrakeRules(confirm=0, confirm_start=0)
    first = judged(absence(40, 100, 5), KNOWN, rules)
    assert not first.released
    assert len(judged(absence(40, 100, 5.1), first.memory, rules).released) == 40
