"""Which agents count as lost, and which services at their nodes may go: every rule by itself."""

from collections.abc import Sequence
from typing import Any

import pytest

from builders import make_service, our_pod_service
from k8s_consul_registrar.model import AgentHealth, Kind, ObjectKey, Rejection, Service, Source, Target
from k8s_consul_registrar.registrar.brake import BrakeRules, Memory
from k8s_consul_registrar.registrar.orphans import Judge, Stays, Verdict, Watched, due, observe
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.targets.reasons import Reason
from k8s_consul_registrar.targets.wanted import SourceState, Wanted

OWN = "agent-2"
LOST = AgentHealth("agent-1", "serfHealth", "critical", 7)
PODS = Source(Kind.POD)
FOLLOWED = SourceState(listed_at=10.0, is_followed=True, objects=5)
LAB = Identity("lab")
AT_ONCE = BrakeRules(confirm=0, confirm_start=0, allow_mass=True)


def claim(name: str) -> Target:
    """Return what a Pod asks for."""
    service = our_pod_service(name)
    return Target(ObjectKey(Kind.POD, "shop", name), service.id, service.name, service.address, 9102, ())


def wanting(*names: str, state: SourceState = FOLLOWED, uid: str = "", **changes: Any) -> Wanted:
    """Return a cluster that wants these Pods' services."""
    claims = {one.id: (one,) for one in map(claim, names)}
    fields: dict[str, Any] = {"sources": {PODS: state}, "cluster_uid": uid, **changes}
    return Wanted(claims, **fields)


def judged(
    wanted: Wanted,
    services: Sequence[Service],
    here: Sequence[str] = (),
    *,
    who: Identity = LAB,
    rules: BrakeRules = AT_ONCE,
    memory: Memory | None = None,
) -> Verdict:
    """Return the verdict over services at a lost agent's node."""
    judge = Judge(wanted, who, {our_pod_service(name).id for name in here})
    for service in services:
        judge.consider(service)
    return judge.verdict(rules, memory or {})


def names(verdict: Verdict) -> set[str]:
    """Return which Pods' services may go."""
    return {service_id.rpartition("--")[2] for service_id in verdict.may_go}


def test_an_agent_counts_as_lost_from_the_first_look_that_shows_it() -> None:
    """The time runs from when we first saw it, and only while each look shows the same."""
    first = observe({}, [LOST], OWN, 100.0)
    later = observe(first, [LOST], OWN, 160.0)
    assert later == {"agent-1": Watched(LOST, 100.0)}
    assert due(later, 60.0, 159.9) == []
    assert due(later, 60.0, 160.0) == [Watched(LOST, 100.0)]


def test_a_look_that_misses_it_starts_the_time_anew() -> None:
    """Passing again or hidden, it is a new case when it shows up next."""
    seen = observe({}, [LOST], OWN, 100.0)
    missed = observe(seen, [], OWN, 130.0)
    again = observe(missed, [LOST], OWN, 160.0)
    assert again == {"agent-1": Watched(LOST, 160.0)}


def test_coming_back_between_two_looks_starts_the_time_anew() -> None:
    """The check's version says that it was another state in between."""
    seen = observe({}, [LOST], OWN, 100.0)
    again = observe(seen, [LOST._replace(version=9)], OWN, 160.0)
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
def test_what_is_never_lost(seen: AgentHealth) -> None:
    """Only the agent's own check counts, only critical, and never our own agent's."""
    assert observe({}, [seen], OWN, 100.0) == {}


def test_what_our_agent_has_goes() -> None:
    """A service that our own agent holds too is not needed at the lost one."""
    assert names(judged(wanting("a"), [our_pod_service("a")], here=["a"])) == {"a"}


def test_what_is_wanted_and_not_here_stays() -> None:
    """Until our own agent has it, the lost one's is the only one there is."""
    verdict = judged(wanting("a"), [our_pod_service("a")])
    assert (names(verdict), verdict.stays) == (set(), {Stays.NOT_HERE: 1})


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
def test_what_is_not_proven_ours_stays(service: Service, is_here: bool) -> None:
    """Whatever stands here under the same ID, and though nobody wants it: it counts for nothing."""
    here = ["a"] if is_here else []
    verdict = judged(wanting(uid="uid-1"), [service], here=here)
    assert (verdict.may_go, verdict.stays) == (frozenset(), {})


@pytest.mark.parametrize("here", [["a"], []])
def test_the_default_name_proves_nothing(here: list[str]) -> None:
    """Without a name of its own a cluster removes only what its UID proves."""
    unnamed = Identity("lab", has_default_name=True)
    bare, proven = our_pod_service("a"), our_pod_service("a", cluster_uid="uid-1")
    stays = judged(wanting(uid="uid-1"), [bare], here=here, who=unnamed)
    assert (names(stays), stays.stays) == (set(), {Stays.UNPROVEN: 1})
    assert names(judged(wanting(uid="uid-1"), [proven], here=here, who=unnamed)) == {"a"}


def test_what_is_known_to_be_gone_goes() -> None:
    """Its source is listed completely and followed, and nobody claims it."""
    assert names(judged(wanting("b"), [our_pod_service("a")])) == {"a"}


@pytest.mark.parametrize(
    "state",
    [
        SourceState(problem="forbidden"),
        SourceState(listed_at=10.0, is_followed=False),
        SourceState(listed_at=None, is_followed=True),
        SourceState(listed_at=10.0, is_followed=True, is_opaque=True),
    ],
    ids=["denied", "not followed", "not listed", "with a nameless item"],
)
def test_a_source_that_proves_nothing_removes_nothing(state: SourceState) -> None:
    """What it does not show may be there; what our agent has may go all the same."""
    verdict = judged(wanting(state=state), [our_pod_service("a"), our_pod_service("b")], here=["b"])
    assert (names(verdict), verdict.stays) == ({"b"}, {Stays.BLIND: 1})


def test_what_no_source_lists_stays() -> None:
    """A kind or namespace that is not followed proves nothing of its objects."""
    verdict = judged(wanting(sources={Source(Kind.NODE): FOLLOWED}), [our_pod_service("a")])
    assert (names(verdict), verdict.stays) == (set(), {Stays.UNFOLLOWED: 1})


def test_what_a_rejected_object_has_stays() -> None:
    """The object is there; only what it asks for cannot be."""
    key = ObjectKey(Kind.POD, "shop", "a")
    rejections = {key: Rejection(key, Reason.NO_IP, "no IP", "pod--shop--a")}
    verdict = judged(wanting(rejections=rejections), [our_pod_service("a")])
    assert (names(verdict), verdict.stays) == (set(), {Stays.REJECTED: 1})


def test_a_mass_of_what_seems_gone_waits_for_another_list() -> None:
    """The brake holds it as any other removal that is only inferred, and lets go when lists agree."""
    rules = BrakeRules(confirm=60, confirm_start=600)
    services = [our_pod_service(f"p{number}") for number in range(5)]
    first = judged(wanting(), services, rules=rules)
    assert (names(first), first.stays) == (set(), {Stays.HELD: 5})
    assert [one.due for one in first.held] == [610.0]
    again = SourceState(listed_at=609.9, is_followed=True, objects=5)
    assert names(judged(wanting(state=again), services, rules=rules, memory=first.memory)) == set()
    agreed = SourceState(listed_at=610.0, is_followed=True, objects=5)
    last = judged(wanting(state=agreed), services, rules=rules, memory=first.memory)
    assert len(last.may_go) == 5


def test_the_brake_counts_what_is_wanted() -> None:
    """A few of many that are gone are no mass, whether our agent has the many, and they go as well, or not."""
    services = [our_pod_service(f"p{number}") for number in range(20)]
    kept = [f"p{number}" for number in range(3, 20)]
    verdict = judged(wanting(*kept), services, here=kept, rules=BrakeRules())
    assert (len(verdict.may_go), verdict.held) == (20, ())
    not_here = judged(wanting(*kept), services, rules=BrakeRules())
    assert (len(not_here.may_go), not_here.held) == (3, ())


def test_a_departure_that_was_seen_needs_no_second_list() -> None:
    """A deleted Pod is a fact, however many are."""
    services = [our_pod_service(f"p{number}") for number in range(5)]
    departed = frozenset(ObjectKey(Kind.POD, "shop", f"p{number}") for number in range(5))
    verdict = judged(wanting(departed=departed), services, rules=BrakeRules())
    assert len(verdict.may_go) == 5
