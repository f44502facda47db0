"""The check that no test's registrar counts an internal error."""

import pytest
from prometheus_client import CollectorRegistry, Counter

from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from support.internal_errors import SAMPLE, counted, counted_on, none_counted


def test_counter_without_labels_is_read() -> None:
    """The count is found, and the time of creation is not taken for one."""
    counter = Counter(SAMPLE.removesuffix("_total"), "Internal errors.", registry=CollectorRegistry())
    assert counted(None) == counted(counter) == 0
    counter.inc(3)
    assert counted(counter) == 3


def test_counter_with_labels_is_summed() -> None:
    """Whatever the labels, each error counts."""
    labelled = Counter(SAMPLE.removesuffix("_total"), "Of what.", ["where"], registry=CollectorRegistry())
    labelled.labels("decide").inc()
    labelled.labels("resync").inc(2)
    assert counted(labelled) == 3


def test_page_of_metrics_is_summed() -> None:
    """Of a daemon's page only the counter's own samples count."""
    page = f'# HELP {SAMPLE} x\n{SAMPLE} 1.0\n{SAMPLE}{{where="decide"}} 2.0\n{SAMPLE}_of_others 4.0\n'
    assert counted_on(page) == 3
    assert counted_on("") == 0


def _count_one() -> None:
    counter = getattr(RegistrarMetrics(CollectorRegistry()), "internal_errors", None)
    if counter is None:
        pytest.skip("the registrar has no such metric yet")
    counter.inc()


@pytest.mark.forces_internal_error
def test_registrar_that_counts_an_error_fails_its_test() -> None:
    """One that counts none does not, and the check ends with its block."""
    with none_counted():
        RegistrarMetrics(CollectorRegistry())
    with pytest.raises(AssertionError, match=SAMPLE), none_counted():
        _count_one()
    _count_one()
