"""Progress of a long first sync, and the size of the batches that a registry gets."""

import pytest
import structlog

from k8s_consul_registrar.registrar.status import Progress, describe, tell_progress


def test_while_lists_stream_the_objects_are_counted() -> None:
    """The pace is that of the list, and its remaining length is unknown."""
    facts = describe(Progress(3000, False, 2500, 100), Progress(1000, False, 900, 0), 5.0)
    assert facts == {
        "doing": "listing",
        "listed": 3000,
        "targets": 2500,
        "registered": 100,
        "rejected": 0,
        "per_second": 400.0,
    }


def test_once_listed_the_time_left_follows_the_pace() -> None:
    """1,000 are left at 100 a second: ten seconds."""
    before, now = (Progress(3000, is_listed=True, targets=2500, registered=n) for n in (1000, 1500))
    facts = describe(now, before, 5.0)
    assert (facts["doing"], facts["per_second"], facts["seconds_left"]) == ("registering", 100.0, 10)


@pytest.mark.parametrize("registered", [1000, 900, 2500])
def test_without_a_pace_no_time_is_promised(registered: int) -> None:
    """Nothing was registered since, less is known to stand, or nothing is left: no time left is named."""
    before = Progress(3000, is_listed=True, targets=2500, registered=1000)
    facts = describe(Progress(3000, is_listed=True, targets=2500, registered=registered), before, 5.0)
    assert ("seconds_left" in facts, facts["per_second"] == 0) == (False, registered <= 1000)


async def test_one_line_an_interval_and_none_at_the_end() -> None:
    """Of a sync that lasts two intervals there are two lines; of one that is done sooner there is none."""
    moments = [Progress(10, is_listed=False, targets=5, registered=0)] * 2
    ticks = iter(range(100))
    with structlog.testing.capture_logs() as lines:
        await tell_progress(lambda: moments.pop() if moments else None, "agent", 0.001, lambda: next(ticks))
    assert [line["event"] for line in lines] == ["first sync under way"] * 2
    assert [line["per_second"] for line in lines] == [10.0, 0]
    assert {line["backend"] for line in lines} == {"agent"}
    with structlog.testing.capture_logs() as lines:
        await tell_progress(lambda: None, "agent", 0.001)
    assert lines == []
