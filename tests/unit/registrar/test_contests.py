"""A record that another writer of this registrar's identity keeps changing is left alone."""

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.model import UNSYNCED, Service
from k8s_consul_registrar.registrar.observed import AsDesired, Contests, Foreign, Observed, Unknown, observe
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from support.builders import make_pod, our_pod_service

LAB = Identity("lab")
ID = "pod--shop--a"


def written(version: int = 7) -> AsDesired:
    """Return what this registrar wrote."""
    resolved = resolve(make_pod("a"), TargetRules())
    assert isinstance(resolved, tuple)
    return AsDesired(resolved[0], "", "", version)


def seen(service: Service) -> Observed:
    """Return what a read shows."""
    return observe(service, LAB, "")


CHANGED = our_pod_service("a", scheme="https")


def change(contests: Contests, now: float, record: Service = CHANGED) -> Observed:
    """Read a record that this registrar wrote and another one changed."""
    return contests.compare(ID, written(), seen(record), LAB, now)


def test_contest_first_change_is_repaired() -> None:
    """A hand may have done it once."""
    contests = Contests(600)
    assert change(contests, 0) == seen(CHANGED)
    assert (contests.is_contested(ID, 0), len(contests)) == (False, 1)


def test_contest_second_change_is_left_alone() -> None:
    """And reported, until nothing has changed it for the quiet time."""
    contests = Contests(600)
    change(contests, 0)
    change(contests, 100)
    assert contests.is_contested(ID, 100)
    assert contests.is_contested(ID, 699)
    assert not contests.is_contested("another", 100)
    assert not contests.is_contested(ID, 700)
    assert len(contests) == 0


def test_contest_changes_far_apart_are_accidents() -> None:
    """Each begins a new count."""
    contests = Contests(600)
    for now in (0, 600, 1200, 1800):
        change(contests, now)
        assert not contests.is_contested(ID, now)


def test_contest_that_goes_on_stays_one() -> None:
    """Each further change begins the quiet time again."""
    contests = Contests(600)
    for now in (0, 500, 1000, 1500):
        change(contests, now)
    assert contests.is_contested(ID, 2099)
    assert not contests.is_contested(ID, 2100)


def test_contest_record_that_is_equal_is_as_desired() -> None:
    """A new version of the same is no change, and is what the next write replaces."""
    contests = Contests(600)
    same = contests.compare(ID, written(7), seen(replace(our_pod_service("a"), index=9)), LAB, 0)
    assert (same, len(contests)) == (written(9), 0)


@pytest.mark.parametrize(
    "service",
    [
        our_pod_service("a", cluster="other"),
        our_pod_service("a", managed_by="by hand"),
        replace(our_pod_service("a"), index=UNSYNCED),
    ],
    ids=["another cluster", "by hand", "not in the catalog"],
)
def test_contest_counts_only_writers_of_this_identity(service: Service) -> None:
    """A foreign record is a conflict already, and an agent that lost its catalog entry is no writer."""
    contests = Contests(600)
    for now in range(3):
        assert change(contests, now, service) == seen(service)
    assert len(contests) == 0


@pytest.mark.parametrize(
    "before", [None, Unknown(), Foreign("x"), seen(CHANGED)], ids=["absent", "unknown", "foreign", "other"]
)
def test_contest_needs_a_record_that_this_registrar_wrote(before: Observed) -> None:
    """A record that it did not know as desired cannot have been changed under it."""
    contests = Contests(600)
    assert contests.compare(ID, before, seen(CHANGED), LAB, 0) == seen(CHANGED)
    assert len(contests) == 0


def test_contest_record_that_is_gone_is_no_contest() -> None:
    """A removal is repaired each time: another writer of this identity would remove what it does not want."""
    contests = Contests(600)
    assert contests.compare(ID, written(), None, LAB, 0) is None
    assert len(contests) == 0


def test_contest_race_that_was_lost_counts_once_there_is_one() -> None:
    """A write that came too late proves nothing alone."""
    contests = Contests(600)
    contests.lost_race(ID, 0)
    assert len(contests) == 0
    change(contests, 1)
    contests.lost_race(ID, 2)
    assert contests.is_contested(ID, 2)


def test_contests_are_pruned() -> None:
    """A contest that is over is forgotten, even if the ID is never asked for again."""
    contests = Contests(600)
    change(contests, 0)
    contests.prune(599)
    assert len(contests) == 1
    contests.prune(600)
    assert len(contests) == 0
