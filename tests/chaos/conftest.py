"""Fixtures for every file of faults."""

from collections.abc import Iterator

import pytest

from support.real_servers import RealConsul, shared_consul


@pytest.fixture(scope="module")
def consul() -> Iterator[RealConsul]:
    """Run one Consul; each test has a cluster, and so a node of the catalog, of its own."""
    with shared_consul() as running:
        yield running
