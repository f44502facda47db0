"""Starts of the program as forks of a process that has loaded it.

Loading the modules is most of what a start costs, and the tests start the program some hundred times. In every other
respect a fork is a process of its own. Run as a module, this is the process that forks: it ends with the tests, and
so does what it forked.
"""

import atexit
import contextlib
import gc
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import msgspec

from k8s_consul_registrar import __main__ as program
from k8s_consul_registrar.commands import COMMANDS
from k8s_consul_registrar.tls import without_authorities

COMMAND = (sys.executable, "-m", "k8s_consul_registrar")
# Python reads its own variables once, as the process starts that forks.
OF_PYTHON = {"PYTHONWARNINGS": "default,ignore::ResourceWarning"}
NEED_MORE = {"demo", "completion"}  # commands with dependencies of their own
LARGEST = 100_000  # bytes of a request
_NUMBER = struct.Struct("i")


class Start(msgspec.Struct):
    """The arguments, environment and folder of a start."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    folder: str


class Forked:
    """A fork of the program, as far as `subprocess.Popen` has it.

    `told` brings the number of its process, and at its end the exit code.
    """

    def __init__(self, told: socket.socket) -> None:
        self._told = told
        (self.pid,) = _NUMBER.unpack(told.recv(_NUMBER.size))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, below 0 for a signal; None while it runs."""
        with contextlib.suppress(BlockingIOError):
            self._hear(socket.MSG_DONTWAIT)
        return self.returncode

    def wait(self) -> None:
        """Wait for its end."""
        self._hear(0)

    def _hear(self, flags: int) -> None:
        if self.returncode is None:
            (self.returncode,) = _NUMBER.unpack(self._told.recv(_NUMBER.size, flags))
            self._told.close()


def can_fork(argv: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Return whether this starts the program, in a way and on a system for which a fork is the same."""
    if tuple(argv[: len(COMMAND)]) != COMMAND or not hasattr(os, "pidfd_open"):
        return False
    return all(OF_PYTHON.get(name) == environment[name] for name in environment if name.startswith("PYTHON"))


def fork(argv: Sequence[str], environment: Mapping[str, str], output: int) -> Forked:
    """Start the program, which writes to the file descriptor `output`."""
    start = Start(argv[len(COMMAND) :], environment, str(Path.cwd()))
    told, telling = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with telling:
        socket.send_fds(_forker(), [msgspec.json.encode(start)], [output, telling.fileno()])
    return Forked(told)


@cache
def _forker() -> socket.socket:
    """Start the process that forks, and return the socket for its requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            (sys.executable, "-m", __name__, str(theirs.fileno())),
            cwd=Path(__file__).parents[1],
            env={"PATH": os.environ["PATH"], **OF_PYTHON},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    @atexit.register
    def end() -> None:
        ours.close()
        process.wait()

    return ours


def load() -> None:
    """Load what the program loads, for every command."""
    import_module("k8s_consul_registrar.cli")
    with without_authorities():
        for name in {command.name for command in COMMANDS} - NEED_MORE:
            import_module(f"k8s_consul_registrar.commands.{name.replace('-', '_')}")
    gc.freeze()


def serve(requests: socket.socket) -> None:
    """Fork for each request and tell how each fork ends, until the tests end."""
    running: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of the process
    while True:
        ready, _, _ = select.select([requests.fileno(), *running], [], [])
        for ended in running.keys() & set(ready):
            pid, telling = running.pop(ended)
            _, status = os.waitpid(pid, 0)
            with telling, contextlib.suppress(OSError):
                telling.send(_NUMBER.pack(os.waitstatus_to_exitcode(status)))
            os.close(ended)
        if requests.fileno() not in ready:
            continue
        body, given, *_ = socket.recv_fds(requests, LARGEST, 2)
        if not body:
            break
        output, telling = given[0], socket.socket(fileno=given[1])
        if not (pid := os.fork()):
            requests.close()
            for other, (_, its) in running.items():
                os.close(other)
                its.close()
            become(msgspec.json.decode(body, type=Start), output, telling)
        os.close(output)
        running[os.pidfd_open(pid)] = pid, telling
    for pid, _ in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def become(start: Start, output: int, telling: socket.socket) -> NoReturn:
    """Run the program in this process, a fork, to its end."""
    os.setsid()
    with telling:
        telling.send(_NUMBER.pack(os.getpid()))
    for standard in (sys.stdout, sys.stderr):
        os.dup2(output, standard.fileno())
    os.close(output)
    os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.environment)
    sys.argv = [str(program.__file__), *start.arguments]
    raise SystemExit(program.run())


if __name__ == "__main__":
    load()
    serve(socket.socket(fileno=int(sys.argv[1])))
