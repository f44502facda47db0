"""Targets that ask for one ID are settled without overwriting each other in turn."""

from builders import make_node, make_pod
from k8s_consul_registrar.model import Target
from k8s_consul_registrar.targets.claims import settle
from k8s_consul_registrar.targets.reasons import Reason
from k8s_consul_registrar.targets.resolve import TargetRules, resolve


def target(item: object) -> Target:
    """Return the one target of an item."""
    verdict = resolve(item, TargetRules())  # type: ignore[arg-type] # Pod or Node by the tests below
    assert isinstance(verdict, tuple)
    return verdict[0]


FIRST = target(make_pod("b--c", "a", created="2026-01-01T00:00:00Z"))
SECOND = target(make_pod("c", "a--b", created="2026-01-02T00:00:00Z"))


def test_two_pods_may_share_an_id() -> None:
    """Namespace a with Pod b--c and namespace a--b with Pod c ask for the same ID."""
    assert FIRST.id == SECOND.id


def test_older_pod_gets_a_free_id() -> None:
    """Where nobody holds the ID the older Pod gets it, the other is rejected by reason."""
    winner, losers = settle([SECOND, FIRST], None)
    assert winner == FIRST
    assert [(loser.key, loser.reason) for loser in losers] == [(SECOND.key, Reason.ID_TAKEN)]


def test_holder_keeps_the_id() -> None:
    """The younger Pod keeps an ID it holds."""
    winner, losers = settle([FIRST, SECOND], SECOND.key)
    assert winner == SECOND
    assert [loser.key for loser in losers] == [FIRST.key]


def test_ready_node_counts_before_older_holder() -> None:
    """Of two Nodes with one address the Ready one counts, though the other is older and holds the ID."""
    gone = target(make_node("gone", ready=False, created="2026-01-01T00:00:00Z"))
    here = target(make_node("here", ready=True, created="2026-02-01T00:00:00Z"))
    winner, losers = settle([gone, here], gone.key)
    assert winner == here
    assert losers[0].reason == Reason.ADDRESS_TAKEN


def test_older_of_two_ready_nodes_counts() -> None:
    """With both Ready the older one counts."""
    old = target(make_node("old", created="2026-01-01T00:00:00Z"))
    new = target(make_node("new", created="2026-02-01T00:00:00Z"))
    assert settle([new, old], new.key)[0] == old
