"""The lag from an event to Consul: what counts, from when, and that nothing piles up."""

from k8s_consul_registrar.kube.dirty import Dirty
from k8s_consul_registrar.registrar.lag import Lag


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        """Return the time it is."""
        return self.now


def test_the_first_of_several_events_counts() -> None:
    """A service that changed again before it was written waits since its first change."""
    clock, seen = Clock(), list[float]()
    lag = Lag(seen.append, clock)
    lag.heard({"a": 1.0, "b": 2.0})
    lag.heard({"a": 5.0})
    clock.now = 6.0
    lag.written(["a", "b", "nobody-asked"])
    lag.written(["a"])
    assert seen == [5.0, 4.0]
    assert len(lag) == 0


def test_what_needs_no_write_is_forgotten() -> None:
    """Only what is still owed to Consul keeps its moment, so memory follows that and not the changes."""
    seen = list[float]()
    lag = Lag(seen.append, Clock())
    lag.heard({f"s{number}": 0.0 for number in range(1000)})
    lag.still_owed({"s7", "else"})
    assert len(lag) == 1
    lag.written(f"s{number}" for number in range(1000))
    assert seen == [0.0]


def test_only_events_carry_a_moment() -> None:
    """What a list told is dirty without one, and taking what is dirty leaves nothing behind."""
    dirty = Dirty()
    dirty.mark("a", None)
    dirty.mark("b", 1.0)
    dirty.mark("b", 2.0)
    dirty.mark("", 3.0)
    assert dirty.take() == ({"a", "b"}, {"b": 1.0})
    assert dirty.take() == (set(), {})
