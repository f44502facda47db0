"""`registrar.election`: each rule of client-go's, and where ours are stricter."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from k8s_consul_registrar.model import Lease
from k8s_consul_registrar.registrar.election import (
    NEVER,
    CreateLease,
    Done,
    Election,
    ElectionTiming,
    ReadLease,
    UpdateLease,
    Wait,
    asked,
    micro_time,
    next_action,
    on_conflict,
    on_failure,
    on_read,
    on_written,
    resigned,
)
from support.election import EPOCH

TIMING = ElectionTiming()
WALL = datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)
STAMP = "2026-11-22T10:00:00.000000Z"
NEW = Election("me", TIMING)
OTHERS = Lease("other", 15, STAMP, STAMP, 3, "7", b"{}")
OURS = replace(OTHERS, holder="me")


def leading(started: float = 100.0) -> Election:
    """Return a contender that renewed by a request begun at `started`."""
    return on_written(NEW, OURS, started)


@pytest.mark.parametrize(
    ("duration", "deadline", "retry"),
    [(10, 10, 2), (9, 10, 2), (15, 2.4, 2), (15, 10, 0), (15, 10, -1), (15, float("nan"), 2)],
)
def test_times_under_which_two_could_lead_are_refused(duration: int, deadline: float, retry: float) -> None:
    """client-go's condition: lease duration > renew deadline > 1.2 retry periods > 0."""
    with pytest.raises(ValueError, match="must be"):
        ElectionTiming(duration, deadline, retry)


def test_defaults_are_client_go_s() -> None:
    """15, 10 and 2 seconds."""
    assert (TIMING.lease_duration, TIMING.renew_deadline, TIMING.retry_period) == (15, 10, 2)
    assert (TIMING.stretched(0), TIMING.stretched(1)) == (2, 2.4)


def test_first_thing_is_to_read() -> None:
    """Nothing is written over what was not read."""
    assert next_action(NEW, 0, WALL) == ReadLease()
    assert not NEW.is_leading(0)


def test_without_a_record_one_is_created() -> None:
    """The first holder's record, with both times and no transition."""
    found = on_read(NEW, None, 100, 0.5)
    assert next_action(found, 100, WALL) == CreateLease(Lease("me", 15, STAMP, STAMP, 0))


def test_record_someone_holds_is_waited_for() -> None:
    """The next look comes after a stretched retry period, and not after the moment the record expires."""
    found = on_read(NEW, OTHERS, 100, 0.5)
    assert next_action(found, 100, WALL) == Wait(102.2)
    assert next_action(found, 102.2, WALL) == ReadLease()
    again = on_read(found, OTHERS, 114, 0.5)
    assert next_action(again, 114, WALL) == Wait(115)


def test_expiry_is_judged_by_when_we_saw_the_record_change() -> None:
    """Times in a record say nothing: an ancient renewal counts as fresh when first seen."""
    ancient = replace(OTHERS, renewed="1999-01-01T00:00:00.000000Z", acquired="1999-01-01T00:00:00.000000Z")
    found = on_read(NEW, ancient, 100, 0)
    assert isinstance(next_action(found, 100, WALL), Wait)
    almost = on_read(found, ancient, 114.9, 0)
    assert next_action(almost, 114.9, WALL) == Wait(115)
    assert isinstance(next_action(on_read(almost, ancient, 115, 0), 115, WALL), UpdateLease)


def test_every_renewal_restarts_the_wait() -> None:
    """A record that changed is held for its whole duration from when that was seen."""
    found = on_read(NEW, OTHERS, 100, 0)
    renewed = on_read(found, replace(OTHERS, renewed="2026-11-22T10:00:02.000000Z"), 114, 0)
    assert renewed.free_at == 129


def test_label_is_no_renewal() -> None:
    """A new version with the same record does not keep a dead leader's lease alive."""
    found = on_read(NEW, OTHERS, 100, 0)
    labelled = on_read(found, replace(OTHERS, version="8", origin=b"labelled"), 114, 0)
    assert labelled.free_at == 115
    taken = next_action(on_read(labelled, replace(OTHERS, version="8"), 115, 0), 115, WALL)
    assert isinstance(taken, UpdateLease)
    assert taken.lease.version == "8"


@pytest.mark.parametrize(("duration", "held"), [(30, 30), (1, 1), (0, 15), (-5, 15)])
def test_holder_s_own_duration_counts(duration: int, held: float) -> None:
    """Replicas whose settings differ agree on the record's duration; without a sensible one ours is used."""
    assert on_read(NEW, replace(OTHERS, duration=duration), 100, 0).free_at == 100 + held


def test_takeover_counts_a_transition() -> None:
    """Holder, duration and both times are ours, the version and the rest are those read."""
    expired = on_read(on_read(NEW, OTHERS, 100, 0), OTHERS, 115, 0)
    action = next_action(expired, 115, WALL + timedelta(seconds=20))
    at = "2026-11-22T10:00:20.000000Z"
    assert action == UpdateLease(Lease("me", 15, at, at, 4))
    assert isinstance(action, UpdateLease)
    assert (action.lease.version, action.lease.origin) == ("7", b"{}")


def test_released_record_is_taken_at_once() -> None:
    """An empty holder means free, whatever the record says else."""
    released = on_read(NEW, replace(OTHERS, holder="", duration=1), 100, 1)
    action = next_action(released, 100, WALL)
    assert isinstance(action, UpdateLease)
    assert (action.lease.holder, action.lease.transitions) == ("me", 4)


def test_renewal_keeps_acquisition_and_transitions() -> None:
    """Only the time of renewal moves; it is asked for one retry period after the last began."""
    election = leading(100)
    assert next_action(election, 100.5, WALL) == Wait(102)
    action = next_action(election, 102, WALL + timedelta(seconds=2))
    assert action == UpdateLease(replace(OURS, renewed="2026-11-22T10:00:02.000000Z"))


@pytest.mark.parametrize("back", [0, 1, 3600])
def test_renewal_differs_from_the_last_though_the_clock_was_set_back(back: float) -> None:
    """Others see a renewal by its text alone, so no text comes twice."""
    action = next_action(leading(100), 102, WALL - timedelta(seconds=back))
    assert isinstance(action, UpdateLease)
    assert action.lease.renewed == "2026-11-22T10:00:00.000001Z"


@pytest.mark.parametrize("text", ["", "yesterday", "9999-12-31T23:59:59.999999Z"])
def test_impossible_renewal_time_is_replaced(text: str) -> None:
    """A record edited by hand does not stop its holder."""
    election = on_written(NEW, replace(OURS, renewed=text), 100)
    action = next_action(election, 102, WALL)
    assert isinstance(action, UpdateLease)
    assert action.lease.renewed == STAMP


def test_deadline_counts_from_the_start_of_the_request() -> None:
    """An answer read late prolongs nothing, and one read after the deadline gives no leadership at all."""
    election = leading(started=100)
    assert election.is_leading(109.999)
    assert not election.is_leading(110)
    assert election.writes_until == 110


def test_leader_looks_up_at_its_deadline() -> None:
    """While the next try lies behind the deadline, the wait ends at it."""
    failing = on_failure(asked(leading(100), UpdateLease(OURS)), 109, 0.5)
    assert next_action(failing, 109, WALL) == Wait(110)
    assert next_action(failing, 110, WALL) == Wait(111)


def test_error_ends_no_leadership_before_the_deadline() -> None:
    """The leader tries again a plain retry period after the request began, and reads first."""
    action = next_action(leading(100), 102, WALL)
    failing = on_failure(asked(leading(100), action), 102, 1.0)
    assert failing.is_leading(109)
    assert next_action(failing, 103, WALL) == Wait(104)
    assert next_action(failing, 104, WALL) == ReadLease()


def test_contender_s_retries_are_stretched() -> None:
    """Who waits for the lease does not ask in step with the others."""
    assert next_action(on_failure(NEW, 100, 1.0), 100, WALL) == Wait(102.4)


def test_renewal_whose_answer_was_lost_is_found_out_by_reading() -> None:
    """The write may have been done: reading finds our own record, and the renewal goes over that version."""
    failing = on_failure(asked(leading(100), UpdateLease(OURS)), 102, 0)
    written = replace(OURS, renewed="2026-11-22T10:00:02.000000Z", version="8")
    found = on_read(failing, written, 104, 0)
    assert found.writes_until == 110
    action = next_action(found, 104, WALL + timedelta(seconds=4))
    assert isinstance(action, UpdateLease)
    assert action.lease.version == "8"


def test_conflict_ends_leadership_at_once() -> None:
    """Another writer replaced our record; only a record read since then can say that we may go on."""
    election = on_conflict(leading(100), 102, 0)
    assert not election.is_leading(102)
    assert next_action(election, 102, WALL) == ReadLease()
    lost = on_read(election, replace(OTHERS, version="9"), 102, 0)
    assert isinstance(next_action(lost, 102, WALL), Wait)
    kept = on_read(election, replace(OURS, version="9"), 102, 0)
    assert isinstance(next_action(kept, 102, WALL), UpdateLease)
    assert not kept.is_leading(102)


def test_conflicts_in_a_row_do_not_spin() -> None:
    """From the second on the next look waits for a retry period, until a write is done."""
    election = on_conflict(NEW, 100, 0)
    assert next_action(election, 100, WALL) == ReadLease()
    election = on_conflict(on_read(election, None, 100, 0), 100, 0.5)
    assert next_action(election, 100, WALL) == Wait(102.2)
    election = on_conflict(on_read(election, None, 103, 0), 103, 0.5)
    assert next_action(election, 103, WALL) == Wait(105.2)
    assert next_action(on_conflict(on_written(election, OURS, 106), 108, 0), 108, WALL) == ReadLease()


@pytest.mark.parametrize("found", [None, OTHERS, replace(OTHERS, holder="")])
def test_leader_that_reads_that_it_is_none_stops(found: Lease | None) -> None:
    """A record that is gone, released or another replica's ends leadership before the deadline."""
    failing = on_failure(asked(leading(100), UpdateLease(OURS)), 102, 0)
    assert failing.is_leading(104)
    assert not on_read(failing, found, 104, 0).is_leading(104)


def test_holder_past_its_deadline_renews_what_is_still_its_own() -> None:
    """A process that was stopped comes back to leadership by a write, not by reading its name."""
    found = on_read(on_failure(asked(leading(100), UpdateLease(OURS)), 102, 0), OURS, 130, 0)
    assert not found.is_leading(130)
    action = next_action(found, 130, WALL)
    assert isinstance(action, UpdateLease)
    assert action.lease.transitions == OURS.transitions
    assert on_written(found, action.lease, 130).is_leading(139)


def test_release_empties_the_record() -> None:
    """Holder empty, duration 1, transitions kept, as in client-go; leadership ended before."""
    election = resigned(leading(100))
    assert not election.is_leading(100)
    action = next_action(election, 100, WALL)
    assert action == UpdateLease(Lease("", 1, STAMP, STAMP, 3))
    assert isinstance(action, UpdateLease)
    assert action.lease.version == "7"
    done = on_written(asked(election, action), replace(action.lease, version="8"), 100)
    assert next_action(done, 100, WALL) == Done()
    assert done.writes_until == NEVER


@pytest.mark.parametrize(
    "election",
    [
        NEW,
        on_read(NEW, OTHERS, 100, 0),
        on_read(NEW, None, 100, 0),
        on_failure(resigned(leading(100)), 100, 0),
    ],
)
def test_nothing_is_released_that_is_not_held(election: Election) -> None:
    """A contender ends without a request, and so does a holder whose release failed."""
    assert next_action(resigned(election), 100, WALL) == Done()


def test_write_under_way_is_found_out_before_the_release() -> None:
    """It may have given us the lease after all, or a new version of it."""
    election = resigned(asked(leading(100), UpdateLease(OURS)))
    assert next_action(election, 100, WALL) == ReadLease()
    ours = on_read(election, replace(OURS, version="8"), 100, 0)
    action = next_action(ours, 100, WALL)
    assert isinstance(action, UpdateLease)
    assert (action.lease.holder, action.lease.version) == ("", "8")
    assert next_action(on_read(election, OTHERS, 100, 0), 100, WALL) == Done()


def test_release_that_conflicts_is_tried_once_more() -> None:
    """The second conflict ends it: the lease will expire."""
    once = on_conflict(resigned(leading(100)), 100, 0)
    assert next_action(once, 100, WALL) == ReadLease()
    again = on_conflict(on_read(once, OURS, 100, 0), 100, 0)
    assert next_action(again, 100, WALL) == Done()


def test_conflicts_of_a_leader_do_not_forget_that_the_record_may_be_ours() -> None:
    """Who resigns after two in a row looks, and gives back what is ours: the others need not wait for its end."""
    twice = on_conflict(on_conflict(leading(100), 102, 0), 104, 0)
    election = resigned(twice)
    assert next_action(election, 106, WALL) == ReadLease()
    assert isinstance(next_action(on_read(election, OURS, 106, 0), 106, WALL), UpdateLease)


def test_replica_that_never_held_the_lease_ends_without_asking() -> None:
    """A read, one that fails, or a conflict makes no holder of a standby, so it ends without asking."""
    reading = asked(NEW, ReadLease())
    assert reading == NEW
    for election in (reading, on_failure(reading, 100, 0), on_conflict(reading, 100, 0)):
        assert next_action(resigned(election), 101, WALL) == Done()


@pytest.mark.parametrize("jitter", [0.9, float("nan")])
def test_jitter_that_shortens_is_refused(jitter: float) -> None:
    """It stretches; exactly 1 is none."""
    with pytest.raises(ValueError, match="must be"):
        ElectionTiming(jitter=jitter)
    assert ElectionTiming(jitter=1).stretched(0.7) == ElectionTiming().retry_period


def test_times_are_written_as_microtime() -> None:
    """Six digits and a Z, also where the microseconds are none."""
    assert micro_time(EPOCH) == "2026-11-22T10:00:00.000000Z"
    assert micro_time(EPOCH + timedelta(microseconds=12)) == "2026-11-22T10:00:00.000012Z"
