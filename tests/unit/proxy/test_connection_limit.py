"""The connection that gives way where there are too many, against a model; and stalled scrapes."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from k8s_consul_registrar.proxy.limits import (
    STALLED_AFTER,
    Admission,
    Concurrency,
    ConnectionLimit,
    Limits,
)

MOST = 6
IDENTITIES = st.sampled_from(["10.0.0.1", "10.0.0.2", "token-a"])


@dataclass(eq=False)
class Connection:
    """A connection as the model knows it."""

    identity: str
    is_trusted: bool = False
    is_busy: bool = False
    idle_since: int = 0
    is_open: bool = True


class ConnectionLimitModel(RuleBasedStateMachine):
    """Every operation of a proxy on its open connections, in any order."""

    connections: Bundle[Connection] = Bundle("connections")

    def __init__(self) -> None:
        super().__init__()
        self.limit: ConnectionLimit[Connection] = ConnectionLimit(MOST)
        self.open: list[Connection] = []
        self.now = 0

    def tick(self) -> int:
        """Return the next moment."""
        self.now += 1
        return self.now

    def candidates(self) -> set[int]:
        """Return the connections that may give way, by what the limit promises."""
        for is_trusted in (False, True):
            rank = [each for each in self.open if each.is_trusted is is_trusted]
            idle = [each for each in rank if not each.is_busy]
            if idle:
                sizes = Counter(each.identity for each in rank)
                most = max(sizes[each.identity] for each in idle)
                longest: dict[str, Connection] = {}
                for each in sorted(idle, key=lambda each: each.idle_since):
                    if sizes[each.identity] == most:
                        longest.setdefault(each.identity, each)
                return set(map(id, longest.values()))
        return set()

    @rule(target=connections, identity=IDENTITIES)
    def connect(self, identity: str) -> Connection | MultipleResults[Connection]:
        """Accept a connection as the proxy does: at the limit another one gives way, or it is denied."""
        if self.limit.is_full:
            first = self.limit.first_to_go()
            assert (set() if first is None else {id(first)}) <= self.candidates()
            assert (first is None) == (not self.candidates())
            if first is None:
                assert all(each.is_busy for each in self.open)
                return multiple()
            self.close(first)
        connection = Connection(identity, idle_since=self.tick())
        self.limit.enter(connection, identity)
        self.open.append(connection)
        return connection

    def close(self, connection: Connection) -> None:
        """Remove a connection."""
        self.limit.leave(connection)
        self.open.remove(connection)
        connection.is_open = False

    @rule(connection=connections)
    def begin(self, connection: Connection) -> None:
        """Begin a scrape."""
        if connection.is_open and not connection.is_busy:
            connection.is_busy = True
            self.limit.begin(connection)

    @rule(connection=connections)
    def end(self, connection: Connection) -> None:
        """End a scrape."""
        if connection.is_busy:
            connection.is_busy = False
            connection.idle_since = self.tick()
            self.limit.end(connection)

    @rule(connection=connections, identity=IDENTITIES, is_trusted=st.booleans())
    def move(self, connection: Connection, identity: str, is_trusted: bool) -> None:
        """Accept or deny the credentials of a connection, which ends idleness of another identity."""
        if connection.is_open:
            if (connection.identity, connection.is_trusted) != (identity, is_trusted):
                connection.idle_since = self.tick()
            connection.identity, connection.is_trusted = identity, is_trusted
        self.limit.move(connection, identity, is_trusted=is_trusted)

    @rule(connection=consumes(connections), twice=st.booleans())
    def leave(self, connection: Connection, twice: bool) -> None:
        """Close a connection; one that gave way before is closed a second time."""
        if connection.is_open:
            self.close(connection)
        if twice:
            self.limit.leave(connection)

    @invariant()
    def counts_agree(self) -> None:
        """Count the open connections, never more than allowed."""
        assert len(self.limit) == len(self.open) <= MOST


ConnectionLimitModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestConnectionLimit = ConnectionLimitModel.TestCase


class Scrape:
    """A scrape of one node that gives its place back when it must."""

    def __init__(self, limits: Limits, node: str = "a") -> None:
        self.limits = limits
        self.node = node
        self.runs = False
        self.gave_way = False

    def enter(self, now: float = 0.0) -> "Scrape":
        """Ask for a place."""
        self.runs |= self.limits.enter(self.node, self, now) is Admission.RUN
        return self

    def admitted(self) -> None:
        """Note the place."""
        self.runs = True

    def give_way(self) -> None:
        """Give the place back."""
        self.gave_way, self.runs = True, False
        self.limits.go_on(self)
        self.limits.leave(self.node)


def running(*scrapes: Scrape) -> list[bool]:
    """Return which scrapes run."""
    return [scrape.runs for scrape in scrapes]


def test_stalled_scrape_gives_way_to_one_that_comes_or_waits() -> None:
    """Keeps a stalled scrape while none wants its place; else the longest stalled of the node goes."""
    limits = Limits(Concurrency(per_node=2, overall=8))
    first, second = Scrape(limits).enter(), Scrape(limits).enter()
    limits.stall("a", second, 10.0)
    limits.stall("a", first, 10.5)
    limits.relieve(100.0)
    assert running(first, second) == [True, True]
    waiting = Scrape(limits).enter(10.0 + STALLED_AFTER / 2)
    assert running(waiting) == [False]  # none is stalled for long enough
    limits.relieve(10.0 + STALLED_AFTER)
    assert second.gave_way
    assert running(waiting) == [True]
    limits.stall("a", waiting, 20.0)
    limits.go_on(waiting)
    assert Scrape(limits).enter(50.0).runs
    assert first.gave_way
    assert running(waiting) == [True]


def test_stalled_scrape_of_another_node_gives_way_only_for_a_place_over_all() -> None:
    """Ends nothing of a node whose places no scrape waits for, unless all places are taken."""
    limits = Limits(Concurrency(per_node=1, overall=2))
    other, own = Scrape(limits, "b").enter(), Scrape(limits).enter()
    limits.stall("b", other, 0.0)
    waiting = Scrape(limits).enter(50.0)
    assert running(waiting) == [False]
    assert running(other) == [True]
    assert Scrape(limits, "c").enter(50.0).runs
    assert running(other) == [False]
    assert running(own) == [True]
