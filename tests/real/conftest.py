"""Fixtures for every file of tests on real servers."""

from collections.abc import Iterator

import pytest

from support.browser import shared_browsers


@pytest.fixture(scope="module", autouse=True)
def browsers() -> Iterator[None]:
    """End the browsers that the tests of a module share."""
    with shared_browsers():
        yield
