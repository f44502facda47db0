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
