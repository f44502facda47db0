"""Quota: what Consul holds stays, then the oldest object comes first, at a cost that no namespace's size changes."""

import time
from collections.abc import Iterable
from itertools import count

from structlog.testing import capture_logs

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.model import NodeAddress, Pod, Source
from k8s_consul_registrar.registrar.brake import Ground, Proof
from k8s_consul_registrar.registrar.decide import (
    Action,
    Deregister,
    InSync,
    Nothing,
    Register,
    Reject,
    Rules,
    Update,
    Withheld,
    decide,
)
from k8s_consul_registrar.registrar.observed import AsDesired, observe
from k8s_consul_registrar.registrar.ownership import Identity, Policy
from k8s_consul_registrar.registrar.quota import LimitedState, Quota
from k8s_consul_registrar.targets.service_names import RandomShards
from support.builders import make_node, make_pod, our_pod_service
from support.memory import NODES, PODS, MemoryCluster

RULES = Rules(Identity("lab"), RandomShards())


def pod(name: str, age: int = 0, namespace: str = "shop") -> Pod:
    """Return a Pod; a higher age is an older one."""
    return make_pod(name, namespace, created=f"2026-11-22T10:00:{59 - age:02}Z")


class World:
    """A cluster, a limited state of Consul, and the quota between them."""

    def __init__(
        self,
        limit: int,
        *held: str,
        sources: Iterable[Source] = (PODS,),
        removes: bool = False,
        rules: Rules = RULES,
    ) -> None:
        self.now = 0.0
        self.rules = rules
        self.observed = LimitedState()
        self.cluster = MemoryCluster(tuple(sources), observed=self.observed)
        self.quota = Quota(
            limit, self.observed, self.cluster.desired, {}, removes=removes, clock=lambda: self.now
        )
        self.versions = count(1)
        self.read(*held)

    def read(self, *held: str) -> None:
        """Read everything that Consul holds."""
        self.observed.begin_read()
        for name in held:
            self.observed.read(f"pod--shop--{name}", observe(our_pod_service(name), RULES.identity, ""))
        self.observed.finish_read()

    def decide(self, name: str, namespace: str = "shop") -> Action:
        """Decide one Pod's service."""
        service_id = f"pod--{namespace}--{name}"
        record = self.observed.get(service_id)
        asked = self.cluster.desired.ask(service_id, record)
        return self.quota.apply(decide(asked, record, self.rules), asked, record, self.rules)

    async def over(self) -> list[str]:
        """Return the Pods whose services are too many."""
        return [one.key.name for one in await self.quota.find_over(self.rules)]

    async def release(self) -> list[str]:
        """Let go all that are too many, as the brake does in the end; return them."""
        over = await self.quota.find_over(self.rules)
        for one in over:
            self.quota.release(one.id, Proof(Ground.QUOTA, key=one.key))
        return [one.key.name for one in over]

    def leaving(self, names: Iterable[str]) -> set[str]:
        """Return which of these Pods' services are to be removed."""
        return {name for name in names if isinstance(self.decide(name), Deregister)}

    def write(self, name: str, namespace: str = "shop") -> bool:
        """Register a Pod's service if it may be; return whether it was."""
        action = self.decide(name, namespace)
        if isinstance(action, Register):
            entry = action.entry
            self.observed.put(entry.id, AsDesired(entry.target, "", "", next(self.versions)))
        return isinstance(action, Register)

    def remove(self, name: str) -> None:
        """Delete a Pod, and its service."""
        self.cluster.remove(pod(name))
        self.observed.put(f"pod--shop--{name}", None)

    def admitted(self) -> set[str]:
        """Return the Pods that have a place now."""
        return {one.rpartition("--")[2] for one in self.quota.admitted()}


def test_quota_takes_the_oldest_objects_whatever_the_order_of_the_list() -> None:
    """Nothing new is registered before everything was listed, so the order decides nothing."""
    for order in ("abcd", "dcba", "cadb"):
        world = World(2)
        world.cluster.start_list([pod(name, ord(name) - 97) for name in order[:3]])
        assert isinstance(world.decide(order[0]), Nothing)
        world.cluster.put_list([pod(name, ord(name) - 97) for name in order])
        assert world.admitted() == {*"abcd"}, "each is decided again"
        assert {name for name in order if world.write(name)} == {"c", "d"}
        rejection = world.decide("a")
        assert isinstance(rejection, Reject)
        assert rejection.rejection.reason == Reason.NAMESPACE_FULL
        assert "shop has 2 targets" in rejection.rejection.detail
        assert set(world.quota.blocked) == {"pod--shop--a", "pod--shop--b"}


def test_quota_keeps_what_consul_holds_before_older_objects() -> None:
    """However many it holds, and also where the limit is lower now."""
    world = World(2, "young", "younger", "youngest")
    world.cluster.put_list([pod("young", 3), pod("younger", 2), pod("youngest", 1), pod("old", 9)])
    world.admitted()
    assert isinstance(world.decide("old"), Reject)
    assert not isinstance(world.decide("youngest"), Reject)
    assert set(world.quota.blocked) == {"pod--shop--old"}


def test_quota_gives_a_free_place_to_the_oldest_that_waits() -> None:
    """As soon as Consul has removed a service, and no sooner."""
    world = World(1)
    world.cluster.put_list([pod("a", 9), pod("b", 2), pod("c", 5)])
    world.admitted()
    assert [world.write(name) for name in "abc"] == [True, False, False]
    world.cluster.remove(pod("a", 9))
    assert world.admitted() == set(), "Consul still holds it"
    world.observed.put("pod--shop--a", None)
    assert world.admitted() == {"c"}
    assert world.write("c")
    assert isinstance(world.decide("b"), Reject)
    world.cluster.remove(pod("b"))
    assert world.admitted() == set()
    assert world.quota.blocked == {}


def test_quota_counts_each_namespace_by_itself_and_no_node() -> None:
    """Nodes have no namespace, and no limit."""
    world = World(1, sources=(PODS, NODES))
    world.cluster.put_list([pod("a"), pod("a", namespace="pay"), pod("b", namespace="pay")])
    world.cluster.put_list(
        [make_node("n1"), make_node("n2", addresses=(NodeAddress("InternalIP", "192.0.2.11"),))], NODES
    )
    world.admitted()
    assert world.write("a")
    assert [world.write(name, "pay") for name in "ab"] == [True, False]
    for service_id in [one for one in world.cluster.desired.claims if one.startswith("node--")]:
        asked = world.cluster.desired.ask(service_id, None)
        assert isinstance(world.quota.apply(decide(asked, None, RULES), asked, None, RULES), Register)


def test_quota_counts_a_write_that_is_under_way_and_one_of_unknown_end() -> None:
    """Its place is not given away twice, after a read of everything either."""
    world = World(1)
    world.cluster.put_list([pod("a", 9), pod("b")])
    world.admitted()
    assert isinstance(world.decide("a"), Register)
    world.observed.begin_write(["pod--shop--a"])
    world.cluster.put(pod("older", 20))
    world.read()
    assert isinstance(world.decide("older"), Reject)
    world.observed.end_write(["pod--shop--a"])
    world.observed.doubt("pod--shop--a")
    world.admitted()
    assert isinstance(world.decide("older"), Reject)


def test_quota_forgets_blocked_objects_that_are_gone() -> None:
    """However many came and went, or changed, while the namespace was full."""
    world = World(1)
    world.cluster.put_list([pod("a", 9), pod("b", 5)])
    world.admitted()
    assert world.write("a")
    for number in range(500):
        world.cluster.put(make_pod("b", created=pod("b", 5).created, ip=f"198.51.100.{number % 250}"))
        world.cluster.put(pod(f"new-{number}", 6))
        world.admitted()
        world.cluster.remove(pod(f"new-{number}", 6))
    world.remove("a")
    assert world.admitted() == {"b"}
    assert world.quota.blocked == {}
    (queue,) = world.quota._waiting.values()
    assert (len(queue.ranks), len(queue._heap) < 40) == (0, True)


def test_quota_counts_again_after_more_changes_than_are_remembered() -> None:
    """Places and blocked objects are those of this moment, as if it had seen each change."""
    world = World(2)
    world.cluster.put_list([pod(name, 9 - at) for at, name in enumerate("abcd")])
    world.admitted()
    assert [world.write(name) for name in "abcd"] == [True, True, False, False]
    world.cluster.remove(pod("c"))
    world.remove("a")
    for _ in range(20_000):
        world.observed.changed("pod--shop--b")
    assert world.admitted() == {"d"}
    assert world.quota.blocked == {}
    assert world.write("d")


def test_quota_tells_of_full_namespaces_once_a_minute() -> None:
    """One line for all of them."""
    world = World(1)
    world.cluster.put_list([pod(name) for name in "abcd"])
    with capture_logs() as logs:
        for second in range(0, 121, 10):
            world.now = float(second)
            world.admitted()
    assert len(logs) == 3
    assert (logs[0]["blocked"], logs[0]["namespaces"], logs[0]["limit"]) == (3, "shop", 1)


def test_quota_costs_the_same_in_a_large_namespace() -> None:
    """The time of a thousand changes beside 10,000 targets, most of them blocked, is about that beside 50."""

    def seconds(size: int) -> float:
        world = World(size // 10)
        world.cluster.put_list([pod(f"web-{number}", number % 60) for number in range(size)])
        for service_id in world.quota.admitted():
            world.write(service_id.removeprefix("pod--shop--"))
        started = time.process_time()
        for number in range(1000):
            world.cluster.put(pod(f"new-{number}"))
            assert not world.write(f"new-{number}")
            world.remove(f"new-{number}")
            world.admitted()
        return time.process_time() - started

    assert min(seconds(10_000) for _ in range(2)) < 5 * min(seconds(50) for _ in range(3)) + 0.1


def crowd(limit: int = 2, *, removes: bool = True, rules: Rules = RULES) -> World:
    """Return a namespace with five registered Pods, `a` the oldest."""
    world = World(limit, *"abcde", removes=removes, rules=rules)
    world.cluster.put_list([pod(name, 40 - at) for at, name in enumerate("abcde")])
    world.admitted()
    return world


async def test_quota_finds_the_youngest_that_are_too_many() -> None:
    """Only where it may remove, and never before the brake released them."""
    world = crowd()
    assert await world.over() == ["e", "d", "c"]
    assert world.leaving("abcde") == set()
    assert await crowd(removes=False).over() == []
    assert await crowd(5).over() == []
    assert await World(2, *"abc", removes=True).over() == [], "nothing was listed"


async def test_quota_removes_what_was_released_and_blocks_it_from_then_on() -> None:
    """Its place is not given back to it while the namespace is full, and the oldest that waits comes first."""
    world = crowd()
    assert await world.release() == ["e", "d", "c"]
    assert world.leaving("abcde") == {*"cde"}
    for name in "edc":
        proof = world.quota.proof(f"pod--shop--{name}")
        assert proof is not None
        assert proof.ground is Ground.QUOTA
        world.observed.put(f"pod--shop--{name}", None)
        assert world.admitted() == {name}, "it is decided again"
        assert isinstance(world.decide(name), Reject)
    assert set(world.quota.blocked) == {f"pod--shop--{name}" for name in "cde"}
    assert await world.over() == []
    world.remove("a")
    assert world.admitted() == {"c"}


async def test_quota_removes_no_more_than_are_too_many_now() -> None:
    """Others that went meanwhile count: of those released the oldest stay, and are decided again."""
    world = crowd()
    await world.release()
    world.remove("a")
    assert world.admitted() == {"c"}
    assert world.leaving("bcde") == {"d", "e"}
    world.cluster.remove(pod("b"))
    assert world.leaving("cde") == {"e"}, "a removal that is due counts as made"
    world.cluster.put(pod("b", 39))
    world.read(*"bcde")
    assert world.leaving("bcde") == {"e"}


async def test_quota_keeps_what_was_released_over_a_read_of_consul() -> None:
    """A service that the read does not show has left: another program removed it, and it is not registered again."""
    world = crowd()
    await world.release()
    world.read(*"abcd")
    world.admitted()
    assert world.leaving("abcd") == {"c", "d"}
    assert isinstance(world.decide("e"), Reject)


async def test_quota_lets_a_service_that_nothing_asks_for_go_by_its_own_rules() -> None:
    """It pushes none out that is asked for, and its proof is not the quota's."""
    world = crowd(4)
    world.read(*"abcdefg")
    assert await world.release() == ["e"], "of the five that are asked for"
    world.cluster.remove(pod("e"))
    assert isinstance(world.decide("e"), Deregister)
    assert world.quota.proof("pod--shop--e") is None


async def test_quota_removes_nothing_that_is_not_proven_ours_or_that_the_policy_keeps() -> None:
    """The rules of any other removal hold."""
    unproven = crowd(rules=Rules(Identity("lab", has_default_name=True), RandomShards()))
    assert await unproven.over() == []
    kept = crowd(rules=Rules(Identity("lab"), RandomShards(), policy=Policy.UPSERT_ONLY))
    assert await kept.release() == ["e", "d", "c"]
    action = kept.decide("e")
    assert isinstance(action, Withheld)
    assert isinstance(action.write, Deregister)
    assert isinstance(kept.decide("a"), InSync | Update)


async def test_quota_counts_each_namespace_that_is_over_by_itself() -> None:
    """Two Pods too many in one take nothing from the other."""
    world = World(1, removes=True)
    pods = [pod(name, 9 - at, of) for of in ("shop", "pay") for at, name in enumerate("abc")]
    world.cluster.put_list(pods)
    world.observed.begin_read()
    for one in (*pods[:3], pods[3]):
        service = our_pod_service(one.name, one.namespace)
        world.observed.read(service.id, observe(service, RULES.identity, ""))
    world.observed.finish_read()
    assert await world.over() == ["c", "b"]
    assert {one.key.namespace for one in await world.quota.find_over(RULES)} == {"shop"}
