"""The order of resource versions, and what a status proves."""

import pytest

from k8s_consul_registrar.kube.source_state import (
    CatchingUp,
    Failed,
    Listing,
    SourceState,
    SourceStatus,
    Synced,
    compare_versions,
    is_reached,
)


@pytest.mark.parametrize(
    ("one", "other", "order"),
    [
        ("9", "10", -1),
        ("10", "9", 1),
        ("10", "10", 0),
        ("a1", "a1", 0),
        ("a1", "a2", None),
        ("1", "a", None),
        ("01", "2", None),
        ("-1", "2", None),
        ("1.5", "2", None),
        ("\u0661", "2", None),
        ("", "2", None),
        ("1\n", "2", None),
        ("9" * 5000, "1" + "0" * 5000, -1),
    ],
)
def test_versions_compare_only_as_plain_numbers(one: str, other: str, order: int | None) -> None:
    """Every other text is equal to itself and in no order to another, and no length is too much."""
    assert compare_versions(one, other) == order


def test_version_is_reached_only_where_the_order_is_known() -> None:
    """An empty version reaches nothing, and nothing reaches an empty one."""
    assert is_reached("10", "9")
    assert is_reached("x", "x")
    assert not is_reached("9", "10")
    assert not is_reached("x", "9")
    assert not is_reached("", "")
    assert not is_reached("9", "")


@pytest.mark.parametrize(
    ("state", "proves_absence", "is_followed", "problem"),
    [
        (Listing(), False, True, ""),
        (CatchingUp("9"), False, True, ""),
        (Synced(), True, True, ""),
        (Failed(1.0, "gone", "unreachable"), False, False, "gone"),
    ],
)
def test_only_a_synced_source_proves_absence(
    state: SourceState, proves_absence: bool, is_followed: bool, problem: str
) -> None:
    """Never before the first list, and never with a nameless object."""
    status = SourceStatus(state, listed_at=5.0, list_began_at=4.0)
    assert (status.proves_absence, status.is_followed, status.problem) == (
        proves_absence,
        is_followed,
        problem,
    )
    assert not SourceStatus(state).proves_absence
    assert not SourceStatus(state).is_followed
    assert not SourceStatus(state, listed_at=5.0, has_nameless=True).proves_absence
