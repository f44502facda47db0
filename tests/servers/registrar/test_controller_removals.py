"""Removals by the running controller: facts go at once, absences wait for a read that confirms them."""

import pytest

from k8s_consul_registrar.model import Drift, Kind, Source, Undecodable
from k8s_consul_registrar.registrar.brake import BrakeRules
from support.builders import make_pod, make_service, our_pod_service
from support.controller_lab import HELD, ControllerLab
from support.memory import PODS

on_both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])
NAMES = "abcdefghij"
STRICT = BrakeRules()


@on_both
@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
async def test_pods_that_the_first_list_shows_as_finished_go_at_once(
    checks_versions: bool, phase: str
) -> None:
    """They are seen, so this is a fact, however many they are: their IPs may be another Pod's by now."""
    lab = ControllerLab(checks_versions=checks_versions, brake=STRICT)
    for name in NAMES:
        lab.consul.put_by_hand(our_pod_service(name))
    lab.cluster.put_list([make_pod(name, phase=phase if name < "g" else "Running") for name in NAMES])
    async with lab.running():
        await lab.until(*"ghij")
        await lab.until_so(lambda: lab.desired.departures == 0)
    assert lab.value("brake_held_services") == 0


@on_both
async def test_pods_that_a_later_list_shows_without_annotation_go_at_once(checks_versions: bool) -> None:
    """A listed object that asks for nothing is a fact as well."""
    lab = ControllerLab(checks_versions=checks_versions, brake=STRICT)
    async with lab.running():
        await lab.synced(*NAMES)
        lab.cluster.put_list([make_pod(name, annotations={}) for name in NAMES])
        await lab.until()
    assert lab.value("brake_held_services") == 0


@on_both
async def test_deletions_seen_in_events_are_never_braked(checks_versions: bool) -> None:
    """Everything may go, if it was seen to go."""
    lab = ControllerLab(checks_versions=checks_versions, brake=STRICT)
    async with lab.running():
        await lab.synced(*NAMES)
        for name in NAMES:
            lab.cluster.remove(make_pod(name))
        await lab.until()
        await lab.until_so(lambda: lab.desired.departures == 0)
    assert lab.cluster.reads == []


@on_both
@pytest.mark.parametrize("per_namespace", [1, 2, 3])
async def test_absence_that_is_small_in_each_namespace_is_a_mass_in_sum(
    checks_versions: bool, per_namespace: int
) -> None:
    """A wrong cluster shows every namespace as empty: nothing goes on the first list after a start."""
    sources = [Source(Kind.POD, f"team-{number}") for number in range(20)]
    lab = ControllerLab(checks_versions=checks_versions, sources=sources, brake=STRICT)
    for source in sources:
        for number in range(per_namespace):
            lab.consul.put_by_hand(our_pod_service(f"web-{number}", source.namespace))
    before = set(lab.consul.held)
    async with lab.running():
        for source in sources:
            lab.cluster.put_list([], source)
        await lab.until_so(lambda: lab.status.has_synced)
        await lab.resynced()
        assert lab.value("brake_held_services") == len(before)
    assert set(lab.consul.held) == before


@on_both
async def test_nothing_inferred_goes_until_every_source_of_the_kind_was_listed(checks_versions: bool) -> None:
    """One absent Pod of a listed namespace stays while another namespace is not listed yet."""
    first, second = Source(Kind.POD, "shop"), Source(Kind.POD, "other")
    lab = ControllerLab(checks_versions=checks_versions, sources=(first, second), brake=STRICT)
    for name in NAMES:
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        lab.cluster.put_list([make_pod(name) for name in NAMES[1:]], first)
        await lab.until_so(lambda: lab.value("resyncs_total") >= 1)
        await lab.resynced()
        assert lab.names_held == {*NAMES}
        lab.cluster.put_list([], second)
        await lab.until(*NAMES[1:])


@on_both
async def test_held_mass_removal_goes_once_later_reads_agree(checks_versions: bool) -> None:
    """The brake has what is absent confirmed again when its wait is over, by itself."""
    lab = ControllerLab(checks_versions=checks_versions, brake=HELD)
    for name in NAMES:
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        lab.cluster.put_list([make_pod("z")])
        await lab.until_so(lambda: lab.value("brake_held_services") == len(NAMES))
        await lab.resynced()
        assert lab.names_held == {*NAMES, "z"}
        lab.clock.skip(HELD.confirm_start + 1)
        await lab.until("z")
        await lab.until_so(lambda: lab.value("brake_held_services") == 0)


@on_both
async def test_pod_that_comes_back_while_it_is_held_stays(checks_versions: bool) -> None:
    """It is desired again; the others go when their wait is over."""
    lab = ControllerLab(checks_versions=checks_versions, brake=HELD)
    for name in NAMES:
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        lab.cluster.put_list([make_pod("z")])
        await lab.until_so(lambda: lab.value("brake_held_services") == len(NAMES))
        lab.cluster.put(make_pod("a"))
        lab.clock.skip(HELD.confirm_start + 1)
        await lab.until("a", "z")
    assert ("deregister", "pod--shop--a") not in lab.consul.writes


@on_both
async def test_absence_is_confirmed_by_name_before_it_counts(checks_versions: bool) -> None:
    """The list lacked a Pod that the API server shows: its service stays until it is really gone."""
    lab = ControllerLab(checks_versions=checks_versions, brake=HELD)
    async with lab.running():
        await lab.synced(*NAMES)
        kept = make_pod("a")
        lab.cluster.put_list([make_pod(name) for name in NAMES[1:]])
        lab.cluster.objects[kept.key] = kept
        await lab.until_so(lambda: kept.key in lab.cluster.reads)
        await lab.resynced()
        assert "a" in lab.names_held
        del lab.cluster.objects[kept.key]
        lab.clock.skip(HELD.confirm_start + 1)
        await lab.until(*NAMES[1:])


@on_both
async def test_absence_that_cannot_be_confirmed_removes_nothing(checks_versions: bool) -> None:
    """While the API server does not answer reads by name, absence stays an inference."""
    lab = ControllerLab(checks_versions=checks_versions, brake=HELD)
    async with lab.running():
        await lab.synced(*NAMES)
        lab.cluster.is_down = True
        lab.cluster.put_list([make_pod(name) for name in NAMES[1:]])
        await lab.until_so(lambda: make_pod("a").key in lab.cluster.reads)
        await lab.resynced()
        assert lab.names_held == {*NAMES}
        lab.cluster.is_down = False
        lab.clock.skip(31)
        await lab.until(*NAMES[1:])


@on_both
async def test_more_absences_than_are_asked_by_name_wait_for_a_new_list(checks_versions: bool) -> None:
    """A list that began after Consul was read confirms them all; the first one only raises the question."""
    lab = ControllerLab(checks_versions=checks_versions, brake=BrakeRules(allow_mass=True))
    names = [f"p{number}" for number in range(150)]
    async with lab.running():
        await lab.synced(*names)
        lab.cluster.put_list([])
        await lab.until_so(lambda: PODS in [source for source, _ in lab.cluster.relists])
        assert len(lab.consul.held) == 150
        lab.cluster.put_list([])
        await lab.until()
    assert lab.cluster.reads == []


@on_both
async def test_held_mass_of_many_goes_by_a_list_after_its_wait(checks_versions: bool) -> None:
    """The brake asks for a list when its wait is over, and its end is a reason to judge again."""
    lab = ControllerLab(checks_versions=checks_versions, brake=HELD)
    names = [f"p{number}" for number in range(150)]
    async with lab.running():
        await lab.synced(*names)
        lab.cluster.put_list([make_pod("z")])
        await lab.until_so(lambda: bool(lab.cluster.relists))
        lab.cluster.put_list([make_pod("z")])
        await lab.until_so(lambda: lab.value("brake_held_services") == 150)
        await lab.until_so(lambda: lab.cluster.relists[-1][1] > lab.clock())
        lab.clock.skip(lab.cluster.relists[-1][1] - lab.clock() + 1)
        lab.cluster.put_list([make_pod("z")])
        await lab.until("z")


@on_both
async def test_source_with_a_nameless_object_removes_nothing_it_infers(checks_versions: bool) -> None:
    """An object that the list lacks may be the nameless one; departures seen in events go once a list is whole."""
    lab = ControllerLab(checks_versions=checks_versions, brake=STRICT)
    async with lab.running():
        await lab.synced(*"abcdef")
        lab.cluster.store.put(PODS, Undecodable(Kind.POD, None, "nameless"))
        for name in "abcd":
            lab.cluster.remove(make_pod(name))
        lab.cluster.put(make_pod("z"))
        await lab.until_so(lambda: "z" in lab.names_held)
        lab.cluster.put_list([make_pod(name) for name in "efz"])
        await lab.until(*"efz")
        await lab.until_so(lambda: lab.desired.departures == 0)
    assert lab.value("brake_held_services") == 0


@on_both
async def test_departures_seen_beside_a_failing_service_do_not_pile_up(checks_versions: bool) -> None:
    """Jobs come and go while one service is refused for good: nothing of them is remembered."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("good")
        lab.consul.refused = {"pod--shop--bad"}
        lab.cluster.put(make_pod("bad"))
        await lab.until_so(lambda: "pod--shop--bad" in lab.status.refused)
        for step in range(5):
            jobs = [make_pod(f"job-{step}-{number}") for number in range(100)]
            for job in jobs:
                lab.cluster.put(job)
            await lab.until("good", *(job.name for job in jobs))
            for job in jobs:
                lab.cluster.remove(job)
            await lab.until("good")
            await lab.until_so(lambda: lab.desired.departures == 0)
        assert len(lab.queue) <= 1


@on_both
async def test_pod_gone_back_and_gone_during_a_resync_loses_its_service(checks_versions: bool) -> None:
    """The second departure is of another generation than the one that the resync saw."""
    lab = ControllerLab(checks_versions=checks_versions, brake=STRICT)
    async with lab.running():
        await lab.synced(*"abcde")
        lab.consul.write_seconds = 0.02
        reads = lab.consul.reads
        lab.consul.may_read_on.clear()
        lab.cluster.remove(make_pod("a"))
        lab.consul.foreign = Drift.CHANGED
        await lab.until_so(lambda: lab.consul.reads > reads)
        lab.cluster.put(make_pod("a", ip="10.1.1.1"))
        await lab.until_so(
            lambda: "a" in lab.names_held and lab.consul.held["pod--shop--a"].address == "10.1.1.1"
        )
        lab.cluster.remove(make_pod("a"))
        lab.consul.may_read_on.set()
        await lab.until(*"bcde")
        await lab.until_so(lambda: lab.desired.departures == 0)
        await lab.resynced()
    assert lab.names_held == {*"bcde"}


async def test_pod_that_comes_back_behind_writes_of_its_batch_stays() -> None:
    """A removal is decided again right before it is sent: registrations of the same batch go first."""
    lab = ControllerLab(brake=STRICT)
    async with lab.running():
        await lab.synced("a", "b")

        def come_back() -> None:
            lab.cluster.put(make_pod("a"))
            lab.consul.before_write = lambda: None

        lab.consul.before_write = come_back
        lab.cluster.put_list([make_pod("a", phase="Succeeded"), make_pod("b"), make_pod("c")])
        await lab.until("a", "b", "c")
        await lab.until_so(lambda: lab.controller.is_complete)
    assert ("deregister", "pod--shop--a") not in lab.consul.writes


async def test_pod_that_comes_back_behind_a_look_of_its_batch_stays() -> None:
    """Another record of the batch is looked up first, and meanwhile what was decided may be old."""
    lab = ControllerLab(brake=STRICT)
    async with lab.running():
        await lab.synced("a", "b", "c")
        lab.consul.before_lookup = lambda: lab.cluster.put(make_pod("a"))
        lab.observed.doubt("pod--shop--b")
        for name in "ab":
            lab.cluster.remove(make_pod(name))
        await lab.until("a", "c")
        await lab.until_so(lambda: lab.controller.is_complete)
    assert ("deregister", "pod--shop--a") not in lab.consul.writes


@on_both
async def test_removal_that_consul_refuses_is_owed_until_it_is_made(checks_versions: bool) -> None:
    """It stays a fact: no second list and no brake, however many there are."""
    lab = ControllerLab(checks_versions=checks_versions, brake=STRICT)
    async with lab.running():
        await lab.synced(*"abcde")
        lab.consul.refused = {f"pod--shop--{name}" for name in "abcd"}
        for name in "abcd":
            lab.cluster.remove(make_pod(name))
        await lab.until_so(lambda: len(lab.status.refused) == 4)
        await lab.resynced()
        assert (lab.names_held, lab.desired.departures) == ({*"abcde"}, 4)
        assert not lab.controller.is_complete
        lab.consul.refused = set()
        await lab.until("e")
        await lab.until_so(lambda: lab.controller.is_complete)
    assert lab.desired.departures == 0


@on_both
async def test_deletions_before_the_first_sync_count_as_facts(checks_versions: bool) -> None:
    """Until Consul was read it is not known what is there of them; a mass of them does not wait."""
    lab = ControllerLab(checks_versions=checks_versions, brake=STRICT)
    for name in "abcde":
        lab.consul.put_by_hand(our_pod_service(name))
    lab.consul.is_down = True
    lab.cluster.put_list([make_pod(name) for name in "abcde"])
    async with lab.running():
        await lab.until_so(lambda: lab.consul.reads > 0)
        for name in "abcd":
            lab.cluster.remove(make_pod(name))
        lab.consul.is_down = False
        await lab.until("e")
    assert lab.value("brake_held_services") == 0


@on_both
async def test_service_of_a_rejected_pod_stays(checks_versions: bool) -> None:
    """The object is there; only what it asks for cannot be. It goes when the object goes."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a", "b")
        lab.cluster.put(make_pod("a", ip=""))
        await lab.resynced()
        assert lab.names_held == {"a", "b"}
        assert lab.value("kept_services", why="rejected") == 1
        lab.cluster.remove(make_pod("a"))
        await lab.until("b")


@on_both
async def test_source_that_fails_keeps_its_services(checks_versions: bool) -> None:
    """A failing source changes nothing that is registered, and shows in the metrics."""
    lab = ControllerLab(checks_versions=checks_versions)
    async with lab.running():
        await lab.synced("a")
        lab.consul.put_by_hand(our_pod_service("gone"))
        lab.cluster.store.fail(PODS, "403", "forbidden")
        await lab.resynced()
        assert lab.value("source_followed", kind="pod") == 0
        assert lab.value("kept_services", why="blind") == 1
        assert lab.status.readiness() == ""
        lab.cluster.put_list([make_pod("a")])
        await lab.until("a")
        await lab.until_so(lambda: lab.value("source_followed", kind="pod") == 1)


@on_both
async def test_conflict_ends_when_a_list_lacks_its_object(checks_versions: bool) -> None:
    """Nothing asks for the ID any more; the service stays as it is."""
    lab = ControllerLab(checks_versions=checks_versions)
    lab.consul.put_by_hand(our_pod_service("a", cluster="other"))
    async with lab.running():
        lab.cluster.put_list([make_pod("a"), make_pod("b")])
        await lab.until_so(lambda: lab.value("conflicts") == 1)
        lab.cluster.put_list([make_pod("b")])
        await lab.until_so(lambda: lab.value("conflicts") == 0)
        assert lab.names_held == {"a", "b"}


@on_both
async def test_foreign_services_are_never_touched(checks_versions: bool) -> None:
    """Another cluster's, another instance's and unmarked services stay, whatever the lists say."""
    lab = ControllerLab(checks_versions=checks_versions, brake=BrakeRules(allow_mass=True))
    others = [
        our_pod_service("theirs", cluster="other"),
        our_pod_service("blue", instance="blue"),
        our_pod_service("tool", managed_by="another-tool"),
        make_service("by-hand"),
    ]
    for one in others:
        lab.consul.put_by_hand(one)
    before = dict(lab.consul.held)
    async with lab.running():
        lab.cluster.put_list([make_pod("a")])
        await lab.until_so(lambda: lab.status.has_synced)
        lab.cluster.put_list([])
        await lab.until_so(lambda: "pod--shop--a" not in lab.consul.held)
        await lab.resynced()
    assert lab.consul.held == before


async def test_service_that_acls_hide_for_a_while_goes_once_it_is_seen_again() -> None:
    """A list that ACLs filter ends no departure: the service of a Pod deleted meanwhile goes as a fact, unbraked."""
    lab = ControllerLab()
    async with lab.running():
        await lab.synced("web-1", "web-2")
        lab.consul.hidden = {"pod--shop--web-2"}
        await lab.resynced()
        lab.cluster.remove(make_pod("web-2"))
        await lab.resynced()
        assert (lab.names_held, lab.desired.departures) == ({"web-1", "web-2"}, 1)
        lab.consul.hidden = set()
        await lab.resynced()
        await lab.until("web-1")


async def test_service_that_is_hidden_before_its_removal_is_written_goes_later() -> None:
    """A look that may not see the record ends no departure either."""
    lab = ControllerLab()
    async with lab.running():
        await lab.synced("web-1", "web-2")
        lab.observed.doubt("pod--shop--web-2")
        lab.consul.hidden = {"pod--shop--web-2"}
        lab.cluster.remove(make_pod("web-2"))
        await lab.until_so(lambda: "pod--shop--web-2" in lab.consul.lookups)
        await lab.resynced()
        assert lab.desired.departures == 1
        lab.consul.hidden = set()
        await lab.resynced()
        await lab.until("web-1")
        assert lab.desired.departures == 0


async def test_wanted_service_that_acls_hide_is_a_conflict_and_comes_back() -> None:
    """It is neither created a second time nor forgotten: what the token may not see may be anything."""
    lab = ControllerLab()
    async with lab.running():
        await lab.synced("web-1", "web-2")
        before = lab.consul.held["pod--shop--web-2"]
        lab.consul.hidden = {"pod--shop--web-2"}
        await lab.resynced()
        await lab.until_so(lambda: lab.value("conflicts") == 1)
        assert lab.consul.held["pod--shop--web-2"] is before
        lab.consul.hidden = set()
        await lab.resynced()
        await lab.until_so(lambda: lab.value("conflicts") == 0)
        assert lab.consul.held["pod--shop--web-2"] is before


@on_both
async def test_every_removal_is_noted_with_its_proof(checks_versions: bool) -> None:
    """An event, an object that a list shows, and an absence that a read confirmed, with what the brake said of it."""
    lab = ControllerLab(checks_versions=checks_versions, brake=HELD)
    for name in ("finished", "gone", *NAMES):
        lab.consul.put_by_hand(our_pod_service(name))
    async with lab.running():
        finished = make_pod("finished", phase="Succeeded")
        lab.cluster.put_list([finished, *(make_pod(name) for name in NAMES)])
        await lab.until(*NAMES)
        lab.cluster.remove(make_pod("a"))
        await lab.until(*NAMES[1:])
        noted = {one.id.removeprefix("pod--shop--"): one for one in lab.status.removals}
        assert {name: (one.proof.ground, one.proof.brake) for name, one in noted.items()} == {
            "a": ("event", "not asked"),
            "finished": ("list", "not asked"),
            "gone": ("confirmed absence", "no mass removal"),
        }
        assert all(one.proof.generation for name, one in noted.items() if name != "finished")
        assert {one.leader for one in noted.values()} == {"lab-1"}
        assert {one.proof.key for one in noted.values()} == {make_pod(name).key for name in noted}
        lab.cluster.put_list([make_pod("z")])
        await lab.until_so(lambda: lab.value("brake_held_services") == len(NAMES) - 1)
        lab.clock.skip(HELD.confirm_start + 1)
        await lab.until("z")
        assert lab.status.removals[0].proof.brake == "held for 60 s"
