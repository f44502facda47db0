"""An honest client: scrapes at a steady pace over one kept TLS connection; a job comes in on stdin, figures go to stdout.

A scrape is timed from the moment it was due, so one that had to wait for the one before counts its wait.
"""

import socket
import ssl
import sys
import time

import msgspec

PATIENCE = 10.0  # seconds for one scrape


class Job(msgspec.Struct):
    """Scrapes to do: of `path`, `rate` a second for some seconds; each on a new connection if they `reconnect`."""

    port: int
    path: str
    token: str
    rate: float
    seconds: float
    reconnect: bool = False


class Figures(msgspec.Struct, array_like=True):
    """Scrapes answered whole, scrapes that failed, and times in seconds."""

    good: int
    failed: int
    p50: float
    p99: float
    longest: float


class Client:
    """One connection."""

    def __init__(self, job: Job) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.request = (
            f"GET {job.path} HTTP/1.1\r\nHost: proxy\r\nAuthorization: Bearer {job.token}\r\n"
            f"X-Prometheus-Scrape-Timeout-Seconds: {PATIENCE:g}\r\n\r\n"
        ).encode()
        self.socket = context.wrap_socket(socket.create_connection(("127.0.0.1", job.port), PATIENCE))
        self.socket.settimeout(PATIENCE)

    def scrape(self) -> None:
        """Scrape once; raises OSError unless the answer is a whole 200."""
        self.socket.sendall(self.request)
        got = b""
        while b"\r\n\r\n" not in got:
            got += self._more()
        head, _, body = got.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(head[:100])
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        left = int(length) - len(body)
        while left > 0:
            left -= len(self._more())

    def _more(self) -> bytes:
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError("closed")
        return data


def figures_of(job: Job) -> Figures:
    """Scrape, and return the figures; a failed scrape counts as one of `PATIENCE`."""
    client: Client | None = None
    if not job.reconnect:
        client = Client(job)
        client.scrape()
    times, failed = [], 0
    start = time.perf_counter()
    for number in range(int(job.rate * job.seconds)):
        due = start + number / job.rate
        time.sleep(max(0.0, due - time.perf_counter()))
        try:
            if client is None:
                client = Client(job)
            client.scrape()
            times.append(time.perf_counter() - due)
        except OSError as error:
            print(repr(error), file=sys.stderr)
            failed += 1
            times.append(PATIENCE)
            client = None
        if job.reconnect and client is not None:
            client.socket.close()
            client = None
        if time.perf_counter() > start + job.seconds + 3 * PATIENCE:
            break
    times.sort()
    return Figures(
        len(times) - failed, failed, times[len(times) // 2], times[int(len(times) * 0.99)], times[-1]
    )


if __name__ == "__main__":
    found = figures_of(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))
    sys.stdout.buffer.write(msgspec.json.encode(found))
