"""Names in the plan: shards filled in, names of others left alone, IDs that clash reported."""

import random
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from builders import annotated, make_pod, make_service, our_pod_service
from k8s_consul_registrar.model import Kind, Pod, Rejection, Service, Source, Target
from k8s_consul_registrar.registrar.ledger import Entry
from k8s_consul_registrar.registrar.naming import is_of_a_registrar, refuse_name
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.targets.reasons import Reason
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.service_names import parse_name, parse_tag
from k8s_consul_registrar.targets.sharding import HashShards, RandomShards
from k8s_consul_registrar.targets.wanted import SourceState, Wanted
from planning import plan

LAB = Identity("lab")
PODS = Source(Kind.POD)
SEEN = {PODS: SourceState(listed_at=100.0, is_followed=True, objects=10)}
GROUPED = TargetRules(cluster="lab", pod_name=parse_name("{cluster}-pods", Kind.POD))
SHARDED = TargetRules(
    cluster="lab",
    pod_name=parse_name("{cluster}-{shard_path}", Kind.POD),
    tags=(parse_tag("z"), parse_tag("shard_path={shard_path}"), parse_tag("s={shard_path}")),
    longest_shard=2,
)


def services(entries: Iterable[Entry]) -> tuple[Service, ...]:
    """Return the services that are to be written."""
    return tuple(entry.service(LAB) for entry in entries)


def wanting(*pods: Pod, rules: TargetRules = GROUPED) -> Wanted:
    """Return what a cluster with these Pods wants."""
    claims: dict[str, list[Target]] = {}
    for pod in pods:
        verdict = resolve(pod, rules)
        assert isinstance(verdict, tuple), verdict
        for target in verdict:
            claims.setdefault(target.id, []).append(target)
    return Wanted(claims, {}, SEEN)


def foreign(name: str) -> Service:
    """Return a service that somebody registered by hand."""
    return make_service(f"hand-made-{name}", {"team": "x"}, name=name)


def reasons(rejections: tuple[Rejection, ...]) -> list[tuple[str, str]]:
    """Return which IDs were refused, and why."""
    return sorted((one.id, one.reason) for one in rejections)


def test_shard_is_filled_in_where_it_is_chosen() -> None:
    """Name and tags carry the shard the service gets, and follow it when it changes."""
    wanted = wanting(make_pod("a"), rules=SHARDED)
    (made,) = services(plan(wanted, [], LAB, shards=RandomShards(("s1",))).register)
    assert (made.name, made.tags) == ("lab-s1", ("s=s1", "shard_path=s1", "z"))
    assert plan(wanted, [made], LAB, shards=RandomShards(("s1", "s2"))).writes == 0
    (moved,) = services(plan(wanted, [made], LAB, shards=RandomShards(("s2",))).update)
    assert (moved.name, moved.tags, moved.value("shard_path")) == (
        "lab-s2",
        ("s=s2", "shard_path=s2", "z"),
        "s2",
    )


def test_hash_moves_a_service_to_its_own_shard() -> None:
    """With the hash a service on another shard is updated, and then at rest."""
    wanted, shards = wanting(make_pod("a")), HashShards(("s1", "s2"))
    (made,) = services(plan(wanted, [], LAB, shards=shards).register)
    other = {"s1": "s2", "s2": "s1"}[made.value("shard_path")]
    (held,) = services(plan(wanted, [], LAB, shards=HashShards((other,))).register)
    assert services(plan(wanted, [held], LAB, shards=shards).update) == (made,)
    assert plan(wanted, [made], LAB, shards=shards).writes == 0


def test_a_name_in_use_by_others_is_refused() -> None:
    """Wherever the other service stands in the read, and however its name is spelt, ours stays away."""
    wanted = wanting(make_pod("a"), make_pod("b"))
    (ours,) = services(plan(wanting(make_pod("c")), [], LAB).register)
    for held in ([foreign("LAB-pods"), ours], [ours, foreign("LAB-pods")]):
        made = plan(wanted, held, LAB)
        assert made.register == ()
        assert reasons(made.rejections) == [
            ("pod--shop--a", Reason.NAME_TAKEN),
            ("pod--shop--b", Reason.NAME_TAKEN),
        ]


def test_default_names_are_not_exempt() -> None:
    """A hand-made service that is called like a Pod's is no exception."""
    made = plan(wanting(make_pod("a"), rules=TargetRules()), [foreign("pod--shop--a")], LAB)
    assert (made.writes, reasons(made.rejections)) == (0, [("pod--shop--a", Reason.NAME_TAKEN)])


def test_a_name_we_have_stays_ours() -> None:
    """Who comes later with our name neither ends our monitoring nor keeps an address from changing."""
    (held,) = services(plan(wanting(make_pod("a")), [], LAB).register)
    assert plan(wanting(make_pod("a")), [held, foreign("lab-pods")], LAB).unchanged == 1
    made = plan(wanting(make_pod("a", ip="198.51.100.99")), [foreign("lab-pods"), held], LAB)
    assert [one.address for one in services(made.update)] == ["198.51.100.99"]


def test_renaming_onto_a_name_in_use_is_refused() -> None:
    """A service keeps what it has rather than take a name of others, and says so at every pass."""
    held = our_pod_service("a")
    free = plan(wanting(make_pod("a")), [held], LAB)
    assert [one.name for one in free.update] == ["lab-pods"]
    for _ in range(2):
        made = plan(wanting(make_pod("a")), [held, foreign("lab-pods")], LAB)
        assert (made.writes, reasons(made.rejections)) == (0, [("pod--shop--a", Reason.NAME_TAKEN)])


def test_registrars_share_names() -> None:
    """Services of another cluster, another instance or the original program keep nobody from a name."""
    others = [
        make_service("x", {"managed_by": "k8s-consul-registrar", "cluster": "other"}, name="lab-pods"),
        make_service("y", {**dict(our_pod_service("q").meta), "instance": "blue"}, name="lab-pods"),
        make_service("pod--shop--q", {"cluster": "other"}, name="lab-pods"),
    ]
    assert all(is_of_a_registrar(one) for one in others)
    assert len(services(plan(wanting(make_pod("a")), others, LAB).register)) == 1
    assert not is_of_a_registrar(make_service("web", {"cluster": "lab"}))
    assert not is_of_a_registrar(make_service("pod--a--b"))
    assert not is_of_a_registrar(make_service("pod--a--b", {"cluster": "lab", "managed_by": "consul-k8s"}))


def test_refusal_alone() -> None:
    """A free name and one that is held pass, a taken one is refused under its ID."""
    service = make_service("id", name="Web")
    key = make_pod().key
    assert refuse_name(service.id, service.name, key, "", frozenset({"other"})) is None
    assert refuse_name(service.id, service.name, key, "WEB", frozenset({"web"})) is None
    refusal = refuse_name(service.id, service.name, key, "old", frozenset({"web"}))
    assert refusal is not None
    assert (refusal.key, refusal.reason, refusal.id) == (key, Reason.NAME_TAKEN, "id")


def test_a_prefix_that_makes_ids_collide_is_a_conflict() -> None:
    """An ID that comes out as somebody else's is reported and never overwritten."""
    prefixed = TargetRules(id_prefix="web-")
    held = make_service("web-pod--shop--a", {"team": "x"}, name="shop")
    other = our_pod_service("b", cluster="other")
    made = plan(wanting(make_pod("a"), rules=prefixed), [held, other], LAB)
    assert (made.writes, [one.id for one in made.conflicts]) == (0, ["web-pod--shop--a"])
    same = plan(wanting(make_pod("b"), rules=TargetRules()), [other], LAB)
    assert [one.id for one in same.conflicts] == ["pod--shop--b"]
    apart = plan(wanting(make_pod("b"), rules=prefixed), [other], LAB)
    assert [one.id for one in apart.register] == ["web-pod--shop--b"]


def test_a_further_port_and_a_pod_named_like_it() -> None:
    """The Pod `web` with port 9090 beside its first and the Pod `web--9090` ask for one ID; one gets it."""
    several = make_pod("web", annotations=annotated(port="8080,9090"), created="2026-01-01T00:00:00Z")
    named = make_pod("web--9090", created="2026-02-01T00:00:00Z")
    made = plan(wanting(several, named), [], LAB)
    assert sorted(one.id for one in made.register) == ["pod--shop--web", "pod--shop--web--9090"]
    assert [(one.key, one.reason) for one in made.rejections] == [(named.key, Reason.ID_TAKEN)]
    again = plan(wanting(several, named), services(made.register), LAB)
    assert (again.writes, again.unchanged) == (0, 2)


def test_a_port_that_is_dropped_goes() -> None:
    """A further port that is no longer annotated is deregistered, the first stays."""
    both = make_pod("web", annotations=annotated(port="8080,9090"))
    held = services(plan(wanting(both), [], LAB).register)
    one = make_pod("web", annotations=annotated(port="8080"))
    made = plan(wanting(one), held, LAB)
    assert (made.unchanged, [gone.id for gone in made.deregister]) == (1, ["pod--shop--web--9090"])


@given(
    st.lists(st.sampled_from("abcdef").map(make_pod), unique_by=lambda pod: pod.key),
    st.lists(st.sampled_from(["lab-s1", "LAB-S2", "other", "z"]).map(foreign), unique_by=lambda one: one.id),
    st.lists(st.sampled_from("abcdef").map(our_pod_service), unique_by=lambda one: one.id),
    st.sampled_from([RandomShards(("s1", "s2")), HashShards(("s1", "s2"))]),
    st.randoms(),
)
def test_no_name_of_others_is_ever_taken(
    pods: list[Pod],
    others: list[Service],
    ours: list[Service],
    shards: RandomShards | HashShards,
    order: random.Random,
) -> None:
    """Whatever order Consul's services come in, nothing is written under a name that others use."""
    services = [*others, *ours]
    order.shuffle(services)
    made = plan(wanting(*pods, rules=SHARDED), services, LAB, shards=shards)
    taken = {one.name.lower() for one in others}
    assert all(one.name.lower() not in taken for one in (*made.register, *made.update))
    told = {*(one.id for one in (*made.register, *made.update)), *(one.id for one in made.rejections)}
    assert {f"pod--shop--{pod.name}" for pod in pods} == told
