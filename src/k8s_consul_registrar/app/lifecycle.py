"""Runs a mode from start to signal: the loop, the signals, and how each ending is told."""

import asyncio
import gc
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from k8s_consul_registrar.app.pauses import Pauses
from k8s_consul_registrar.errors import AccessError, OperationalError, SettingsError
from k8s_consul_registrar.telemetry import get_logger

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_SETTINGS = 2
EXIT_INTERRUPTED = 130

log = get_logger("lifecycle")


class Stop:
    """The one way a mode is asked to end: SIGTERM gently, SIGINT at once."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self._urgent = asyncio.Event()

    def install(self) -> None:
        """Take the signals over from the interpreter."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.requested.set)
        loop.add_signal_handler(signal.SIGINT, self.hurry)

    def hurry(self) -> None:
        """Ask for an end without delay."""
        self._urgent.set()
        self.requested.set()

    @property
    def is_urgent(self) -> bool:
        """Whether whoever asked does not want to wait."""
        return self._urgent.is_set()

    async def unless_urgent(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work to its end, or drop it as soon as the end is urgent."""
        doing = asyncio.ensure_future(work)
        urgent = asyncio.ensure_future(self._urgent.wait())
        await asyncio.wait({doing, urgent}, return_when=asyncio.FIRST_COMPLETED)
        urgent.cancel()
        doing.cancel()
        await asyncio.wait({doing, urgent})
        if not doing.cancelled():
            doing.result()


async def run_until_stopped(
    stop: Stop,
    *services: Coroutine[Any, Any, None],
    ending: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Run the services together until a stop is asked for, and through `ending` after that.

    A service that fails ends them all.
    """
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(service) for service in services]
        await stop.requested.wait()
        if ending is not None:
            await ending()
        for task in tasks:
            task.cancel()


def run_mode(main: Callable[[Stop], Coroutine[Any, Any, None]]) -> int:
    """Run a mode on uvloop and return its exit code; what goes wrong is said in a line, not a traceback."""

    async def with_signals() -> Stop:
        stop = Stop()
        stop.install()
        await main(stop)
        return stop

    # What was loaded so far stays: visiting it was half of what collections cost a first sync.
    gc.freeze()
    Pauses().watch()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            stop = runner.run(with_signals())
    except (SettingsError, AccessError) as error:
        return complain(error)
    except OperationalError as error:
        log.error("cannot go on", problem=str(error))
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_INTERRUPTED if stop.is_urgent else EXIT_OK


def complain(error: SettingsError | AccessError) -> int:
    """Show every problem of the settings on stderr, and return the exit code for them."""
    problems = error.problems if isinstance(error, SettingsError) else (str(error),)
    print("k8s-consul-registrar cannot start:", file=sys.stderr)
    for problem in problems:
        print(f"  - {problem}", file=sys.stderr)
    print("See `k8s-consul-registrar --help` for every setting.", file=sys.stderr)
    return EXIT_SETTINGS
