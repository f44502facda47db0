"""Annotations remembered for the next Pod of the same template."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.errors import Rejected
from k8s_consul_registrar.model import ContainerPort
from k8s_consul_registrar.targets.scrape_config import (
    LONGEST_KEPT,
    MOST_PORTS_KEPT,
    TEMPLATES,
    ScrapeConfig,
    _read,
    pod_scrape,
)
from support.builders import make_pod, tcp

PREFIX = "prometheus.io/"


def read(annotations: Mapping[str, str], ports: tuple[ContainerPort, ...]) -> ScrapeConfig | str:
    """Return how such a Pod is scraped, or the reason why not."""
    try:
        return pod_scrape(make_pod(annotations=annotations, ports=ports), PREFIX)
    except Rejected as rejected:
        return rejected.reason


TEXTS = st.dictionaries(
    st.sampled_from([f"{PREFIX}{name}" for name in ("path", "scheme", "port", "param-a", "param-b")]),
    st.sampled_from(["", "/x", "/x?a=1", "https", "80", "http", "metrics", "0", "1" * LONGEST_KEPT]),
)
PORTS = st.lists(
    st.builds(tcp, st.sampled_from([80, 81]), st.sampled_from(["http", "metrics", ""])), max_size=2
)


@given(TEXTS, PORTS.map(tuple))
def test_remembered_annotations_change_no_result(
    annotations: Mapping[str, str], ports: tuple[ContainerPort, ...]
) -> None:
    """A Pod is read the same way whatever was read before it."""
    remembered = read(annotations, ports)
    _read.cache_clear()
    assert read(annotations, ports) == remembered


@pytest.mark.parametrize(
    ("annotations", "ports"),
    [
        ({f"{PREFIX}path": "/" + "x" * LONGEST_KEPT, f"{PREFIX}port": "80"}, 1),
        ({f"{PREFIX}param-x": "x", f"{PREFIX}port": "80"}, 1),
        ({f"{PREFIX}port": "80"}, MOST_PORTS_KEPT + 1),
    ],
    ids=["path", "parameter", "ports"],
)
def test_large_annotations_are_not_remembered(annotations: Mapping[str, str], ports: int) -> None:
    """A user who may create Pods must not fill our memory."""
    _read.cache_clear()
    pod_scrape(make_pod(annotations=annotations, ports=tuple(map(tcp, range(1, ports + 1)))), PREFIX)
    assert _read.cache_info().currsize == 0


def test_remembered_annotations_are_bounded() -> None:
    """Templates that never come again do not pile up."""
    for number in range(TEMPLATES + 10):
        pod_scrape(make_pod(annotations={f"{PREFIX}port": "80", f"{PREFIX}path": f"/{number}"}), PREFIX)
    assert _read.cache_info().currsize == TEMPLATES
