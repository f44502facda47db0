"""The load: wrk for as many scrapes as a relay does, our own open loop for what scrapes at a given rate take.

wrk (C, from Debian) costs a few microseconds a scrape, so that it is not what is measured. hey would measure
from the moment it sends, which hides the time a late scrape waited before; the open loop measures from the
moment the scrape was due.
"""

import asyncio
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from relaying.machine import LOOPBACK, Cores, program

# What Prometheus sends.
HEADERS = (
    ("User-Agent", "Prometheus/2.53.0"),
    ("Accept", "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"),
    ("Accept-Encoding", "gzip"),
    ("X-Prometheus-Scrape-Timeout-Seconds", "10"),
)


class Full(NamedTuple):
    """The outcome of a full load."""

    scrapes: int
    per_second: float


class Latency(NamedTuple):
    """The outcome of an open loop; times in seconds from the moment a scrape was due."""

    scrapes: int
    failed: int
    p50: float
    p99: float
    longest: float


async def _output(argv: Sequence[str], cores: Cores, stdin: bytes = b"") -> str:
    process = await asyncio.create_subprocess_exec(
        "taskset", "-c", cores.others, *argv,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate(stdin)
    if process.returncode:
        raise RuntimeError(f"{argv[0]} failed ({process.returncode}): {output.decode()[-2000:]}")
    return output.decode()


async def full_load(
    port: int, path: str, *, clients: int, seconds: int, cores: Cores, headers: Sequence[tuple[str, str]] = ()
) -> Full:
    """Have `clients` connections ask again as soon as they are answered; fails where one is not answered 200."""
    fields = [part for name, value in (*HEADERS, *headers) for part in ("-H", f"{name}: {value}")]
    argv = [program("wrk", "wrk"), "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "10s", *fields]
    output = await _output([*argv, f"http://{LOOPBACK}:{port}{path}"], cores)
    found = re.search(r"(\d+) requests in", output)
    rate = re.search(r"Requests/sec:\s+([0-9.]+)", output)
    if found is None or rate is None or "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(f"not every scrape was answered: {output}")
    return Full(int(found[1]), float(rate[1]))


async def open_loop(
    port: int,
    paths: Sequence[str],
    *,
    host: str = LOOPBACK,
    rate: float,
    seconds: float,
    cores: Cores,
    connections: int = 64,
    headers: Sequence[tuple[str, str]] = (),
) -> Latency:
    """Ask for one path after another, `rate` times a second whether or not the ones before are answered."""
    job = {
        "host": host,
        "port": port,
        "paths": paths,
        "rate": rate,
        "seconds": seconds,
        "connections": connections,
        "headers": [*HEADERS, *headers],
    }
    script = Path(__file__).with_name("open_loop.py")
    output = await _output([sys.executable, str(script)], cores, msgspec.json.encode(job))
    *complaints, figures = output.splitlines()
    for complaint in complaints[:5]:
        print(f"a scrape failed: {complaint}", file=sys.stderr)
    return msgspec.json.decode(figures, type=Latency)


async def answer_of(port: int, path: str, host: str = LOOPBACK) -> tuple[int, dict[str, str], bytes]:
    """Ask once and return the status, the fields that describe the body, and the body as it came."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        fields = "".join(f"{name}: {value}\r\n" for name, value in HEADERS)
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{fields}Connection: close\r\n\r\n".encode()
        )
        async with asyncio.timeout(10):
            head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    finally:
        writer.close()
    line, *lines = head.decode("latin-1").split("\r\n")
    pairs = (each.partition(": ") for each in lines)
    described = {name.lower(): value for name, _, value in pairs if name.lower().startswith("content-")}
    return int(line.split()[1]), described, body
