"""What is known of Consul, ID by ID."""

from collections.abc import Callable

import pytest

from builders import our_pod_service
from k8s_consul_registrar.model import Kind, ObjectKey, Target
from k8s_consul_registrar.registrar.ledger import Entry, Ledger


def entry(name: str = "a") -> Entry:
    """Return what stands in Consul for a Pod."""
    service = our_pod_service(name)
    key = ObjectKey(Kind.POD, "shop", name)
    return Entry(Target(key, service.id, service.name, service.address, 9102, ()), "s1", "")


@pytest.mark.parametrize(
    "change",
    [
        lambda ledger: ledger.note(entry()),
        lambda ledger: ledger.keep(entry()),
        lambda ledger: ledger.doubt(entry().id),
        lambda ledger: ledger.forget(entry().id),
    ],
    ids=["note", "keep", "doubt", "forget"],
)
def test_its_generation_moves_with_every_change(change: Callable[[Ledger], None]) -> None:
    """Whoever keeps what was made of the entries sees by it that something else stands there now."""
    ledger = Ledger()
    ledger.note(entry())
    before = ledger.generation
    change(ledger)
    assert ledger.generation > before


def test_an_id_is_free_while_nothing_is_known_or_feared_there() -> None:
    """A service of ours takes it, as does a doubt, until it is forgotten."""
    ledger = Ledger()
    assert ledger.is_free(entry().id)
    ledger.note(entry())
    assert not ledger.is_free(entry().id)
    ledger.doubt(entry().id)
    assert not ledger.is_free(entry().id)
    assert ledger.shard(entry().id) == "s1"
    ledger.forget(entry().id)
    assert ledger.is_free(entry().id)


def test_what_may_stand_there_is_not_known_to() -> None:
    """A write whose end is unknown leaves nothing to rely on, but for the shard."""
    ledger = Ledger()
    ledger.note(entry())
    ledger.doubt(entry().id)
    assert (ledger.get(entry().id), ledger.is_uncertain(entry().id), len(ledger)) == (None, True, 0)
    ledger.doubt(entry().id, "s2")
    assert ledger.shard(entry().id) == "s2"


def test_it_takes_over_what_another_knows_better() -> None:
    """Of the IDs asked for alone, and whatever is known: that it stands, may stand, is kept, or is gone."""
    ledger, other = Ledger(), Ledger()
    for name in ("stands", "doubted", "kept", "gone", "untouched"):
        ledger.note(entry(name))
    stands = entry("stands").at(7)
    other.note(stands)
    other.doubt(entry("doubted").id, "s9")
    other.keep(entry("kept"))
    ledger.take_over(other, [entry(name).id for name in ("stands", "doubted", "kept", "gone")])
    assert ledger.get(stands.id) == stands
    assert (ledger.is_uncertain(entry("doubted").id), ledger.shard(entry("doubted").id)) == (True, "s9")
    assert (ledger.get(entry("kept").id), ledger.kept(entry("kept").id)) == (None, entry("kept"))
    assert ledger.is_free(entry("gone").id)
    assert ledger.get(entry("untouched").id) == entry("untouched")
