"""Lost agents, and which services at their nodes may go: every rule by itself."""

from collections.abc import Callable, Sequence

import pytest

from k8s_consul_registrar.model import AgentHealth, Kind, Service, Undecodable
from k8s_consul_registrar.registrar.brake import BrakeRules, Memory
from k8s_consul_registrar.registrar.decide import Rules
from k8s_consul_registrar.registrar.orphans import Judge, OrphanJudgement, Stays, Watched, due, observe_agents
from k8s_consul_registrar.registrar.ownership import Identity, Policy
from k8s_consul_registrar.targets.service_names import RandomShards
from support.builders import make_node, make_pod, make_service, our_pod_service
from support.memory import NODES, PODS, MemoryCluster

OWN = "agent-2"
LOST = AgentHealth("agent-1", "serfHealth", "critical", 7)
LAB = Identity("lab")
AT_ONCE = BrakeRules(confirm=0, confirm_start=0, allow_mass=True)


def cluster_of(*names: str, uid: str = "") -> MemoryCluster:
    """Return a cluster whose list shows these Pods."""
    cluster = MemoryCluster()
    cluster.put_list([make_pod(name) for name in names])
    cluster.desired.learn_cluster_uid(uid)
    return cluster


def judged(
    cluster: MemoryCluster,
    services: Sequence[Service],
    here: Sequence[str] = (),
    *,
    who: Identity = LAB,
    rules: BrakeRules = AT_ONCE,
    memory: Memory | None = None,
    now: float = 0.0,
    policy: Policy = Policy.SYNC,
) -> OrphanJudgement:
    """Return the judgement over services at a lost agent's node."""
    decisions = Rules(who, RandomShards(), policy=policy)
    judge = Judge(cluster.desired, decisions, {our_pod_service(name).id for name in here})
    for service in services:
        judge.consider(service)
    return judge.judge(rules, memory or Memory(), now)


def names(judgement: OrphanJudgement) -> set[str]:
    """Return the Pods whose services may go."""
    return {service_id.rpartition("--")[2] for service_id in judgement.may_go}


@pytest.mark.parametrize("policy", [Policy.UPSERT_ONLY, Policy.OBSERVE])
def test_policy_that_removes_nothing_keeps_what_may_go(policy: Policy) -> None:
    """Services that our agent has by now, that were seen to go, and that the brake releases: all are counted."""
    cluster = cluster_of("here", "asks-not", "gone")
    cluster.put(make_pod("asks-not", annotations={}))
    cluster.put_list([make_pod("here"), make_pod("asks-not", annotations={})])
    services = [our_pod_service(name) for name in ("here", "asks-not", "gone")]
    assert names(judged(cluster, services, here=["here"])) == {"here", "asks-not", "gone"}
    judgement = judged(cluster, services, here=["here"], policy=policy)
    assert (names(judgement), dict(judgement.stays)) == (set(), {Stays.POLICY: 3})


def test_agent_is_lost_from_the_first_look_that_shows_it() -> None:
    """The time runs from the first look that showed it, while each later look shows the same."""
    first = observe_agents({}, [LOST], OWN, 100.0)
    later = observe_agents(first, [LOST], OWN, 160.0)
    assert later == {"agent-1": Watched(LOST, 100.0)}
    assert due(later, 60.0, 159.9) == []
    assert due(later, 60.0, 160.0) == [Watched(LOST, 100.0)]


def test_lost_agent_that_a_look_misses_starts_again() -> None:
    """Passing again or hidden, it is a new case when it is seen next."""
    seen = observe_agents({}, [LOST], OWN, 100.0)
    missed = observe_agents(seen, [], OWN, 130.0)
    again = observe_agents(missed, [LOST], OWN, 160.0)
    assert again == {"agent-1": Watched(LOST, 160.0)}


def test_lost_agent_that_came_back_between_two_looks_starts_again() -> None:
    """The check's version says that it was another state in between."""
    seen = observe_agents({}, [LOST], OWN, 100.0)
    again = observe_agents(seen, [LOST._replace(version=9)], OWN, 160.0)
    assert due(again, 60.0, 160.0) == []


@pytest.mark.parametrize(
    "seen",
    [
        LOST._replace(status="passing"),
        LOST._replace(status="warning"),
        LOST._replace(check="ping"),
        LOST._replace(node=OWN),
        LOST._replace(node=OWN.upper()),
    ],
    ids=["passing", "warning", "another check", "our own", "our own in capitals"],
)
def test_other_checks_and_our_own_agent_are_never_lost(seen: AgentHealth) -> None:
    """Only the agent's own check counts, only critical, and never our own agent's."""
    assert observe_agents({}, [seen], OWN, 100.0) == {}


def test_service_that_our_own_agent_holds_goes() -> None:
    """A service that our own agent holds too is not needed at the lost one."""
    assert names(judged(cluster_of("a"), [our_pod_service("a")], here=["a"])) == {"a"}


def test_desired_service_that_our_own_agent_lacks_stays() -> None:
    """Until our own agent has it, the lost one's is the only one there is."""
    judgement = judged(cluster_of("a"), [our_pod_service("a")])
    assert (names(judgement), judgement.stays) == (set(), {Stays.NOT_HERE: 1})


@pytest.mark.parametrize("is_here", [True, False])
@pytest.mark.parametrize(
    "service",
    [
        our_pod_service("a", managed_by="another-tool"),
        our_pod_service("a", cluster="other"),
        our_pod_service("a", instance="blue"),
        our_pod_service("a", cluster_uid="uid-2"),
        make_service("pod--shop--a", {"cluster": "lab"}),
        make_service("pod--shop--a"),
    ],
    ids=["another tool", "another cluster", "another instance", "another uid", "the original's", "bare"],
)
def test_service_that_is_not_proven_ours_stays(service: Service, is_here: bool) -> None:
    """It counts for nothing, whatever our own agent holds under its ID, and though no object asks for it."""
    here = ["a"] if is_here else []
    judgement = judged(cluster_of(uid="uid-1"), [service], here=here)
    assert (judgement.may_go, judgement.stays) == (frozenset(), {})


@pytest.mark.parametrize("here", [["a"], []])
def test_default_cluster_name_proves_nothing(here: list[str]) -> None:
    """Without a name of its own a cluster removes only what its UID proves."""
    unnamed = Identity("lab", has_default_name=True)
    bare, proven = our_pod_service("a"), our_pod_service("a", cluster_uid="uid-1")
    stays = judged(cluster_of(uid="uid-1"), [bare], here=here, who=unnamed)
    assert (names(stays), stays.stays) == (set(), {Stays.UNPROVEN: 1})
    assert names(judged(cluster_of(uid="uid-1"), [proven], here=here, who=unnamed)) == {"a"}


def test_service_of_an_absent_object_goes() -> None:
    """Its source is synced, and no object asks for it."""
    assert names(judged(cluster_of("b"), [our_pod_service("a")])) == {"a"}


def failed(cluster: MemoryCluster) -> None:
    """Let the source fail."""
    cluster.store.fail(PODS, "forbidden", "forbidden")


def listing(cluster: MemoryCluster) -> None:
    """Begin a new list."""
    cluster.store.start_listing(PODS, 1.0)


def catching_up(cluster: MemoryCluster) -> None:
    """Resume the watch behind the API server."""
    cluster.store.resume(PODS, "150")


def nameless(cluster: MemoryCluster) -> None:
    """Show an object without a name."""
    cluster.store.put(PODS, Undecodable(Kind.POD, None, "nameless"))


@pytest.mark.parametrize("spoil", [failed, listing, catching_up, nameless])
def test_source_that_proves_nothing_removes_nothing(spoil: Callable[[MemoryCluster], None]) -> None:
    """Objects that it does not show may exist; services that our own agent holds may go all the same."""
    cluster = cluster_of()
    spoil(cluster)
    judgement = judged(cluster, [our_pod_service("a"), our_pod_service("b")], here=["b"])
    assert (names(judgement), judgement.stays) == ({"b"}, {Stays.BLIND: 1})


def test_service_that_no_source_would_list_stays() -> None:
    """A kind or namespace that is not watched proves nothing of its objects."""
    cluster = MemoryCluster([NODES])
    cluster.put_list([make_node()], NODES)
    judgement = judged(cluster, [our_pod_service("a")])
    assert (names(judgement), judgement.stays) == (set(), {Stays.UNFOLLOWED: 1})


def test_service_of_a_rejected_object_stays() -> None:
    """The object is there; only what it asks for cannot be."""
    cluster = cluster_of()
    cluster.put(make_pod("a", ip=""))
    judgement = judged(cluster, [our_pod_service("a")])
    assert (names(judgement), judgement.stays) == (set(), {Stays.REJECTED: 1})


def test_mass_of_absences_waits_for_lists_that_agree() -> None:
    """The brake holds it as any other removal that is only inferred, and lets go when lists agree."""
    rules = BrakeRules(confirm=60, confirm_start=600)
    services = [our_pod_service(f"p{number}") for number in range(5)]
    now = 10.0
    cluster = MemoryCluster(clock=lambda: now)
    cluster.put_list([make_pod("other")])
    first = judged(cluster, services, rules=rules, now=now)
    assert (names(first), first.stays) == (set(), {Stays.HELD: 5})
    assert [one.due for one in first.held] == [610.0]
    now = 609.9
    cluster.put_list([make_pod("other")])
    assert names(judged(cluster, services, rules=rules, memory=first.memory, now=now)) == set()
    now = 610.0
    cluster.put_list([make_pod("other")])
    last = judged(cluster, services, rules=rules, memory=first.memory, now=now)
    assert len(last.may_go) == 5


def test_few_absences_among_many_services_are_no_mass() -> None:
    """The brake counts what is desired, whether our own agent holds it, and it goes as well, or not."""
    services = [our_pod_service(f"p{number}") for number in range(20)]
    kept = [f"p{number}" for number in range(3, 20)]
    judgement = judged(cluster_of(*kept), services, here=kept, rules=BrakeRules())
    assert (len(judgement.may_go), judgement.held) == (20, ())
    not_here = judged(cluster_of(*kept), services, rules=BrakeRules())
    assert (len(not_here.may_go), not_here.held) == (3, ())


def test_departures_that_were_seen_need_no_second_list() -> None:
    """A deleted Pod is a fact, however many are."""
    pods = [f"p{number}" for number in range(5)]
    cluster = cluster_of(*pods)
    for name in pods:
        cluster.remove(make_pod(name))
    judgement = judged(cluster, [our_pod_service(name) for name in pods], rules=BrakeRules())
    assert len(judgement.may_go) == 5
