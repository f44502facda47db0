"""Runs what leans on the event loop on both loops: the daemon's (uvloop) and asyncio's own."""

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator, Mapping

import hypothesis
import pytest
import structlog
import uvloop

from k8s_consul_registrar.rotating import LoadStatus
from support.internal_errors import FORCED, none_counted
from support.waiting import PATIENCE_FACTOR

# A busy machine takes long for an example now and then; pytest's own timeout ends a test that hangs.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give each test as much longer as the waits in it."""
    if PATIENCE_FACTOR != 1 and config.option.timeout is None:
        config.option.timeout = float(config.getini("timeout")) * PATIENCE_FACTOR


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Return the loops a test runs on, by name."""
    if item.get_closest_marker("both_loops") is not None:
        return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one process run all tests of a file on real servers, one after the other: they share what they start.

    What runs on both loops is a long test on asyncio's own, which the daemon does not use.
    """
    for item in items:
        if item.get_closest_marker("real") is not None and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group("-".join(item.path.with_suffix("").parts[-2:])))
        if item.get_closest_marker("both_loops") is not None and _is_on_asyncios_loop(item):
            item.add_marker(pytest.mark.long)


def _is_on_asyncios_loop(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and "asyncio" in callspec.id.split("-")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo what a test configured: its streams are closed when it ends."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def collector_as_it_was() -> Iterator[None]:
    """Undo what a mode run in this process did to Python's collector: no test finds objects that it froze."""
    callbacks, thresholds = gc.callbacks[:], gc.get_threshold()
    yield
    gc.callbacks[:] = callbacks
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.fixture(autouse=True)
def loaded_files_as_they_were() -> Iterator[None]:
    """Forget the files that a test loaded: their problems would be the next test's until they are collected."""
    loaded = LoadStatus._all
    before = list(loaded)
    yield
    for one in set(loaded).difference(before):
        one.forget()


@pytest.fixture(autouse=True)
def no_internal_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test whose registrar counted an internal error; `forces_internal_error` marks one that wants it."""
    if request.node.get_closest_marker(FORCED) is not None:
        yield
        return
    with none_counted():
        yield
