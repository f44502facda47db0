"""Full reads of Consul are bounded: a burst, then one a gap, then a share of time."""

import pytest

from k8s_consul_registrar.registrar.budget import Budget, BudgetRules

RULES = BudgetRules(burst=2, gap=30, share=0.02)


def test_a_burst_is_allowed_and_then_one_a_gap() -> None:
    """Two reads in a row, the third after half a minute."""
    budget = Budget(RULES, 0)
    for _ in range(2):
        assert budget.wait(0) == 0
        budget.spend(0, 0.1)
    assert budget.wait(0) == pytest.approx(30)
    assert budget.wait(15) == pytest.approx(15)
    assert budget.wait(30) == 0
    budget.spend(30, 0.1)
    assert budget.wait(31) == pytest.approx(29)


def test_slow_reads_are_spread_wider() -> None:
    """A read of 2 s may take 2 % of wall time: the next one waits 100 s."""
    budget = Budget(BudgetRules(burst=1, gap=30, share=0.02), 0)
    budget.spend(2, 2)
    assert budget.wait(2) == pytest.approx(100)


def test_an_urgent_read_waits_less() -> None:
    """Two seconds instead of thirty after a quick read, and ten instead of a hundred after one of two."""
    budget = Budget(BudgetRules(burst=1, gap=30, share=0.02), 0)
    budget.spend(0, 0.1)
    assert budget.wait(0, is_urgent=True) == pytest.approx(2)
    assert budget.wait(0) == pytest.approx(30)
    budget.spend(5, 2)
    assert budget.wait(5, is_urgent=True) == pytest.approx(10)
    assert budget.wait(5) == pytest.approx(100)
    assert budget.wait(15, is_urgent=True) == 0


def test_rest_earns_no_more_than_a_burst() -> None:
    """After a long rest there are two reads, not twenty."""
    budget = Budget(RULES, 0)
    budget.spend(10_000, 0.1)
    budget.spend(10_000, 0.1)
    assert budget.wait(10_000) > 0


def test_no_gap_is_no_bound() -> None:
    """Without a gap every read is allowed."""
    budget = Budget(BudgetRules(burst=1, gap=0, share=1), 0)
    budget.spend(0, 0)
    assert budget.wait(0) == 0
