"""A client that asks at a given rate whatever the answers do; a program: a job in on stdin, figures on stdout.

Every scrape is due at a moment fixed beforehand and timed from it. Where all connections are busy it waits,
and the wait counts.
"""

import contextlib
import re
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path

import msgspec

# Between two looks at the sockets; below the unit of the results.
NAP = 50e-6
TIMER_SLACK = "1000"  # nanoseconds; the system's own would be the nap over again
PATIENCE = 10.0  # seconds for the last answers
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *([0-9]+)\r\n")


class Job(msgspec.Struct):
    """The plan of the load; `paths` are asked for in turn."""

    host: str
    port: int
    paths: list[str]
    rate: float
    seconds: float
    connections: int
    headers: list[tuple[str, str]]


class Connection:
    """One connection with at most one scrape under way."""

    __slots__ = ("buffer", "due", "left", "socket")

    def __init__(self, host: str, port: int, buffer: bytearray) -> None:
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(0)
        self.buffer = buffer
        self.due = 0.0
        self.left = -1

    def ask(self, request: bytes, due: float) -> None:
        """Send a scrape that was due at a moment."""
        self.due = due
        self.left = -1
        self.socket.send(request)

    def is_answered(self) -> bool:
        """Read what came and say whether the answer is complete; raises OSError where it will not be."""
        while True:
            try:
                count = self.socket.recv_into(self.buffer)
            except BlockingIOError:
                return False
            if not count:
                raise ConnectionError("closed")
            if self.left < 0:
                end = self.buffer.find(b"\r\n\r\n", 0, count)
                length = _LENGTH.search(self.buffer, 0, count)
                if end < 0 or length is None or not self.buffer.startswith(b"HTTP/1.1 200"):
                    raise ConnectionError(bytes(self.buffer[: min(count, 300)]).decode("latin-1"))
                self.left = int(length[1]) + end + 4
            self.left -= count
            if self.left <= 0:
                return True


class Loop:
    """Sends what is due and times what comes back."""

    def __init__(self, job: Job) -> None:
        fields = "".join(f"{name}: {value}\r\n" for name, value in job.headers)
        self._requests = [
            f"GET {path} HTTP/1.1\r\nHost: {job.host}:{job.port}\r\n{fields}\r\n".encode()
            for path in job.paths
        ]
        self._job = job
        self._buffer = bytearray(1 << 18)
        self._poll = select.epoll()
        self._by_file: dict[int, Connection] = {}
        self._idle: deque[Connection] = deque()
        self.times: list[float] = []
        self.failed = 0

    def _can_ask(self) -> bool:
        """Say whether a connection is idle; one is opened where there may be more, as it is needed."""
        if not self._idle and len(self._by_file) < self._job.connections:
            self._connect()
        return bool(self._idle)

    def _connect(self) -> None:
        connection = Connection(self._job.host, self._job.port, self._buffer)
        self._by_file[connection.socket.fileno()] = connection
        self._poll.register(connection.socket, select.EPOLLIN)
        self._idle.append(connection)

    def run(self) -> None:
        """Ask for as long as the job says, then wait for the last answers."""
        job, clock = self._job, time.perf_counter
        total = int(job.rate * job.seconds)
        step, sent, start = 1 / job.rate, 0, clock()
        while len(self.times) + self.failed < total:
            now = clock()
            while sent < total and start + sent * step <= now and self._can_ask():
                # The one used last, so that few connections carry what few can.
                self._idle.pop().ask(self._requests[sent % len(self._requests)], start + sent * step)
                sent += 1
            for file, _ in self._poll.poll(0):
                self._hear(self._by_file[file])
            if now > start + job.seconds + PATIENCE:
                self.failed += total - len(self.times) - self.failed
            time.sleep(NAP)

    def _hear(self, connection: Connection) -> None:
        try:
            if not connection.is_answered():
                return
        except OSError as error:
            print(repr(error), file=sys.stderr)
            self.failed += 1
            del self._by_file[connection.socket.fileno()]
            connection.socket.close()
            return
        self.times.append(time.perf_counter() - connection.due)
        self._idle.append(connection)


def main() -> None:
    """Do the job on stdin."""
    with contextlib.suppress(OSError):
        Path("/proc/self/timerslack_ns").write_text(TIMER_SLACK)
    loop = Loop(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))
    loop.run()
    times = sorted(loop.times) or [0.0]
    middle, most = times[len(times) // 2], times[int(len(times) * 0.99)]
    figures = (len(loop.times), loop.failed, middle, most, times[-1])
    sys.stdout.buffer.write(msgspec.json.encode(figures))


if __name__ == "__main__":
    main()
