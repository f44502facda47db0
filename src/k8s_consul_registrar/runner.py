"""Runs commands: the event loop, signals, and the only mapping from errors to exit codes."""

import asyncio
import gc
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from k8s_consul_registrar.asyncio_tools import new_loop
from k8s_consul_registrar.errors import AccessError, OperationalError, SettingsError
from k8s_consul_registrar.telemetry import get_logger

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_SETTINGS = 2
EXIT_CHANGES = 3
EXIT_INTERRUPTED = 130
# Seconds after which a full garbage collection took too long. Nothing else runs meanwhile.
LONG_PAUSE = 0.02

log = get_logger("lifecycle")


def exit_code(command: Callable[[], int], *, is_mode: bool = False) -> int:
    """Call a command and return its exit code; an expected error is one line, never a traceback.

    A mode logs why it ends; any other command prints it.
    """
    try:
        return command()
    except (SettingsError, AccessError) as error:
        problems = error.problems if isinstance(error, SettingsError) else (str(error),)
        print("k8s-consul-registrar cannot start:", file=sys.stderr)
        for problem in problems:
            print(f"  - {problem}", file=sys.stderr)
        print("See `k8s-consul-registrar --help` for every setting.", file=sys.stderr)
        return EXIT_SETTINGS
    except OperationalError as error:
        if is_mode:
            log.error("cannot go on", problem=str(error))
        else:
            print(f"k8s-consul-registrar: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except (KeyboardInterrupt, EOFError):  # EOFError: Ctrl-D at a question
        return EXIT_INTERRUPTED


def run_loop(work: Coroutine[Any, Any, int]) -> int:
    """Run a command's work on uvloop to its end; Ctrl-C cancels it and raises KeyboardInterrupt."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(work)


class Stop:
    """The request to end: SIGTERM asks for an orderly end, SIGINT for an immediate one."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self._urgent = asyncio.Event()

    def install(self) -> None:
        """Handle the signals instead of the interpreter."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.requested.set)
        loop.add_signal_handler(signal.SIGINT, self.hurry)

    def hurry(self) -> None:
        """Ask for an immediate end."""
        self._urgent.set()
        self.requested.set()

    @property
    def is_urgent(self) -> bool:
        """True if the end is to be immediate."""
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


def run_mode(main: Callable[[Stop], Coroutine[Any, Any, None]]) -> int:
    """Run a mode until a signal asks it to stop, and return its exit code."""

    async def until_signal() -> int:
        stop = Stop()
        stop.install()
        await main(stop)
        return EXIT_INTERRUPTED if stop.is_urgent else EXIT_OK

    # The modules loaded so far stay: visiting them was half the cost of garbage collection in a first sync.
    gc.freeze()
    Pauses().watch()
    return run_loop(until_signal())


async def run_until_stopped(
    stop: Stop,
    *services: Coroutine[Any, Any, None],
    ending: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Run the services together until a stop is requested, and through `ending` after that.

    A service that fails ends them all.
    """
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(service) for service in services]
        await stop.requested.wait()
        if ending is not None:
            await ending()
        for task in tasks:
            task.cancel()


class Pauses:
    """Keeps the pauses of Python's garbage collector short, however many targets there are.

    A full collection visits every object it tracks: 116 ms at 80,000 targets. The state of the cluster lives
    long and is freed by reference counts, as are the connections of the proxy, so a full collection finds nothing
    in it. What one collection visited for too long is therefore set aside (`gc.freeze`), and cyclic garbage among
    it is never found. That loss is bounded: the next long collection needs as many new objects, which means a
    large part of the cluster changed.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = 0.0

    def watch(self) -> None:
        """Begin; it lasts as long as the process."""
        gc.callbacks.append(self.notice)

    def notice(self, phase: str, info: Mapping[str, int]) -> None:
        """Note the begin or end of a collection (Python, `gc.callbacks`)."""
        if phase == "start":
            self._began = self._clock()
        elif info["generation"] == 2 and self._clock() - self._began > LONG_PAUSE:
            gc.freeze()
