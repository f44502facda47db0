"""Internal errors of the registrars that a test runs: there is none unless the test forces one.

The registrar counts an exception that no part of it expected in `internal_errors_total` and goes on. Without
this check such a fault would pass every test that it does not happen to delay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prometheus_client import Counter

from k8s_consul_registrar.registrar.metrics import RegistrarMetrics

SAMPLE = "k8s_consul_registrar_internal_errors_total"
FORCED = "forces_internal_error"  # the marker of a test that wants one


def counted(counter: Counter | None) -> float:
    """Return the count over all labels; 0 without a counter."""
    families = counter.collect() if counter else ()
    return sum(one.value for family in families for one in family.samples if one.name == SAMPLE)


def counted_on(page: str) -> float:
    """Return the count that a page of metrics shows over all labels."""
    lines = (line.rpartition(" ") for line in page.splitlines())
    return sum(float(value) for name, _, value in lines if name.partition("{")[0] == SAMPLE)


@contextmanager
def none_counted() -> Iterator[None]:
    """Fail when a registrar that the block makes in this process has counted an internal error by its end."""
    counters: list[Counter | None] = []
    create = RegistrarMetrics.__init__

    def create_and_note(metrics: RegistrarMetrics, *args: Any, **kwargs: Any) -> None:
        create(metrics, *args, **kwargs)
        counters.append(getattr(metrics, "internal_errors", None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegistrarMetrics, "__init__", create_and_note)
        yield
    errors = sum(map(counted, counters))
    assert not errors, f"{SAMPLE} is {errors:g}; the log has the traceback"
