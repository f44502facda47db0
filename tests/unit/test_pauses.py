"""The pauses of Python's collector."""

import gc

import pytest

from k8s_consul_registrar.runner import EXIT_OK, LONG_PAUSE, Pauses, Stop, run_mode


@pytest.mark.parametrize(
    ("generation", "took", "is_set_aside"),
    [(2, 1.1 * LONG_PAUSE, True), (2, 0.9 * LONG_PAUSE, False), (1, 2 * LONG_PAUSE, False)],
)
def test_long_collection_sets_its_objects_aside(generation: int, took: float, is_set_aside: bool) -> None:
    """Only a full collection that took too long is the last one to visit what it found."""
    times = iter((100.0, 100.0 + took))
    pauses = Pauses(clock=lambda: next(times, 0.0))
    before = gc.get_freeze_count()
    try:
        pauses.notice("start", {"generation": generation})
        pauses.notice("stop", {"generation": generation})
        assert (gc.get_freeze_count() > before) is is_set_aside
    finally:
        gc.unfreeze()


def test_python_tells_it_of_collections() -> None:
    """A real collection reaches it, begin and end."""
    seen: list[int] = []

    def clock() -> float:
        seen.append(len(seen))
        return 0.0

    pauses = Pauses(clock)
    pauses.watch()
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(pauses.notice)
    assert len(seen) == 2


def test_mode_sets_aside_what_was_loaded_and_watches_collections() -> None:
    """The loaded modules are visited no more, and a full collection that takes too long is noticed."""
    callbacks, frozen = len(gc.callbacks), gc.get_freeze_count()

    async def main(_: Stop) -> None:
        assert len(gc.callbacks) == callbacks + 1
        assert gc.get_freeze_count() > frozen

    assert run_mode(main) == EXIT_OK
