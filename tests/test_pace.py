"""How much is handed to a registry at once."""

from itertools import count

import pytest

from k8s_consul_registrar.registrar.pace import MOST, SECONDS, batch_of


@pytest.mark.parametrize("rate", [20, 540, 2000])
def test_a_batch_takes_its_time_of_any_registry(rate: int) -> None:
    """As many are taken as the registry takes meanwhile, whatever its speed."""
    ticks = count()
    assert len(list(batch_of(iter(range(100_000)), lambda: next(ticks) / rate))) == rate * SECONDS


def test_a_batch_has_bounds() -> None:
    """A fast registry gets no more than memory should hold, and a slow one still gets something."""
    assert len(list(batch_of(iter(range(100_000)), lambda: 0.0))) == MOST
    ticks = count()
    assert list(batch_of(iter("ab"), lambda: next(ticks) * SECONDS)) == ["a"]


def test_batches_leave_nothing_out() -> None:
    """What one batch does not take is the next one's."""
    items = iter(range(2 * MOST + 1))
    batches = [list(batch_of(items, lambda: 0.0)) for _ in range(4)]
    assert [number for batch in batches for number in batch] == list(range(2 * MOST + 1))
    assert [len(batch) for batch in batches] == [MOST, MOST, 1, 0]
