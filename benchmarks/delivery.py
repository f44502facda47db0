"""Measure how long a change takes to reach a collector, and what a change costs under names of many instances.

`make bench-delivery` prints two Markdown tables; `ARGS="--part share"` one of the registrar's share alone. Consul, Prometheus and VictoriaMetrics are real
(`scripts/fetch-real-servers`), the API server is the sandbox's, everything is on loopback.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
import yaml
from registering.churn import create_pod
from registering.processes import (
    LOOPBACK,
    ROOT,
    BenchmarkError,
    Program,
    consul,
    consul_program,
    free_ports,
    wait_until,
)
from registering.stage import CLUSTER, PACKAGE, THIS, registrar, sandbox_api

REAL = ROOT / ".cache" / "real"
NAME = f"{CLUSTER}-pods"
ID = "__meta_consul_service_id"
PODS = 200  # there from the start
LOOK = 0.1  # seconds between two looks at each collector
GAPS = (2.0, 9.0)  # seconds between two changes: out of step with every interval
SIZES = (1, 100, 1_000, 10_000)
CHANGES_OF_NAMES = 20
WATCHERS = 3
OPERATIONS = 63  # of a transaction, beside that of the node; Consul 1.8 takes 64


@dataclass(slots=True)
class Way:
    """A way to a collector: which targets it shows now, and when it showed each one first."""

    name: str
    refresh: str
    seen: dict[str, float] = field(default_factory=dict)

    def show(self, ids: set[str]) -> None:
        """Note what it shows at this moment."""
        now = time.monotonic()
        for one in ids - self.seen.keys():
            self.seen[one] = now

    def line(self, begun: dict[str, float]) -> str:
        """Return its line of the table."""
        times = sorted(self.seen[one] - at for one, at in begun.items() if one in self.seen)
        if len(times) < len(begun):
            return f"| {self.name} | {self.refresh} | {len(times)} of {len(begun)} arrived | | | |"
        cells = (percentile(times, 50), percentile(times, 90), percentile(times, 99), times[-1])
        return f"| {self.name} | {self.refresh} | {' | '.join(f'{one:.2f}' for one in cells)} |"


def percentile(times: Sequence[float], percent: float) -> float:
    """Return the smallest time that this percentage of the times does not exceed."""
    return times[min(len(times) - 1, round(percent / 100 * len(times) + 0.5) - 1)]


@dataclass(frozen=True, slots=True)
class Collector:
    """A collector's program: its address, and its ways by the name of their job."""

    url: str
    ways: dict[str, Way]

    async def watch(self, session: aiohttp.ClientSession) -> None:
        """Look at its active targets again and again."""
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{self.url}/api/v1/targets?state=active") as answer:
                    targets = (await answer.json(content_type=None))["data"]["activeTargets"]
                for job, way in self.ways.items():
                    way.show({one["discoveredLabels"][ID] for one in targets if of_job(one) == job})
            await asyncio.sleep(LOOK)


def of_job(target: dict[str, Any]) -> str:
    """Return the job of a target."""
    job: str = target["labels"]["job"]
    return job


class Stage:
    """Where the collectors find targets."""

    def __init__(self, folder: Path, consul_address: str, http_sd: str) -> None:
        self.folder = folder
        self.file, self.fetched = folder / "ours.json", folder / "fetched.json"
        self._discoveries: dict[str, dict[str, Any]] = {
            "consul_sd": {"server": consul_address, "services": [NAME]},
            "http_sd": {"url": f"http://{http_sd}/sd/targets?kind=pod"},
            "file_sd": {"files": [str(self.file)]},
            "file_sd, fetched": {"files": [str(self.fetched)]},
        }

    def job(self, way: str, refresh: str) -> dict[str, Any]:
        """Return a job of a Prometheus; without `refresh` it has the default."""
        kind = way.partition(",")[0]
        discovery = {**self._discoveries[way], **({"refresh_interval": refresh} if refresh else {})}
        return {"job_name": f"{way} {refresh}", "scrape_interval": "1h", f"{kind}_configs": [discovery]}

    @contextlib.asynccontextmanager
    async def prometheus(self, version: str, *ways: tuple[str, str]) -> AsyncIterator[Collector]:
        """Run a Prometheus with a job for each way and interval."""
        home, address = self.folder / f"prometheus-{version}", f"{LOOPBACK}:{free_ports(1)[0]}"
        home.mkdir()
        jobs = [self.job(way, refresh) for way, refresh in ways]
        (home / "config.yml").write_text(yaml.safe_dump({"scrape_configs": jobs}))
        argv = [
            str(REAL / f"prometheus-{version}/usr/bin/prometheus"), f"--config.file={home / 'config.yml'}",
            f"--storage.tsdb.path={home / 'data'}", f"--web.listen-address={address}",
        ]  # fmt: skip
        made = {
            job["job_name"]: Way(f"Prometheus {version}, {way}", refresh or default_of(way))
            for job, (way, refresh) in zip(jobs, ways, strict=True)
        }
        async with running(argv, home / "log", address, "/-/ready"):
            yield Collector(f"http://{address}", made)

    @contextlib.asynccontextmanager
    async def victoria(self, interval: str) -> AsyncIterator[Collector]:
        """Run a VictoriaMetrics that asks Consul and the registrar, by default or at an interval."""
        home, address = self.folder / f"victoria-{interval}", f"{LOOPBACK}:{free_ports(1)[0]}"
        home.mkdir()
        jobs = [self.job(way, "") for way in ("consul_sd", "http_sd")]
        (home / "config.yml").write_text(yaml.safe_dump({"scrape_configs": jobs}))
        flags = {
            "httpListenAddr": address,
            "storageDataPath": str(home / "data"),
            "promscrape.config": str(home / "config.yml"),
            "memory.allowedBytes": "64MB",
        }
        if interval:
            flags |= {
                "promscrape.consulSDCheckInterval": interval,
                "promscrape.httpSDCheckInterval": interval,
            }
        binary = REAL / "victoria-metrics-1.145/usr/bin/victoria-metrics"
        argv = [str(binary), *(f"-{name}={value}" for name, value in flags.items())]
        made = {
            job["job_name"]: Way(f"VictoriaMetrics 1.145, {way}", interval or default_of(way))
            for job, way in zip(jobs, ("consul_sd", "http_sd"), strict=True)
        }
        async with running(argv, home / "log", address, "/health"):
            yield Collector(f"http://{address}", made)


def default_of(way: str) -> str:
    """Return the interval that applies if none is set, as documented for both collectors."""
    return {"consul_sd": "30s (default)", "http_sd": "60s (default)"}.get(way, "at once")


@contextlib.asynccontextmanager
async def running(argv: Sequence[str], log: Path, address: str, path: str) -> AsyncIterator[Program]:
    """Run a program until it answers 200, and to the end of the block."""
    program = Program(argv, log, {**THIS.environment(), "HOME": str(log.parent)})
    program.launch()
    try:
        async with aiohttp.ClientSession() as session:

            async def is_ready() -> bool:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with session.get(f"http://{address}{path}") as answer:
                        return answer.status == 200
                return False

            await program.until_ready(is_ready, argv[0])
        yield program
    finally:
        await program.stop()


async def watch_file(way: Way, path: Path) -> None:
    """Look at a file whenever it was replaced."""
    last = 0
    while True:
        last = look(way, path, last)
        await asyncio.sleep(0.01)


def look(way: Way, path: Path, last: int) -> int:
    """Note the targets in a file that is not the one before; return which file it is."""
    with contextlib.suppress(FileNotFoundError):
        if (now := path.stat().st_ino) != last:
            last = now
            way.show({group["labels"][ID] for group in json.loads(path.read_bytes())})
    return last


async def watch_polls(way: Way, url: str) -> None:
    """Poll the registrar as a client that waits for changes."""
    etag = ""
    async with aiohttp.ClientSession() as session:
        while True:
            headers = {"If-None-Match": etag} if etag else {}
            async with session.get(f"{url}?kind=pod&wait=25s", headers=headers) as answer:
                if answer.status == 200:
                    etag = answer.headers["ETag"]
                    way.show({group["labels"][ID] for group in await answer.json()})
                elif answer.status != 304:
                    await asyncio.sleep(1)


async def latency(changes: int, *, with_collectors: bool = True) -> None:
    """Print when new Pods were active targets, by way; without collectors only our share of it."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-delivery-")))
        http_sd = f"{LOOPBACK}:{free_ports(1)[0]}"
        api = await stack.enter_async_context(sandbox_api(folder, pods=PODS, nodes=5))
        consul_address = await stack.enter_async_context(consul())
        stage = Stage(folder, consul_address, http_sd)
        settings = {
            "HTTP_SD_PORT": http_sd.rpartition(":")[2],
            "FILE_SD_PATH": str(stage.file),
            "POD_SERVICE_NAME": "{cluster}-pods",
            "NODE_SERVICE_NAME": "{cluster}-nodes",
        }
        run = await stack.enter_async_context(registrar(folder, THIS, api, consul_address, **settings))
        await run.until_resync()
        fetching = Program(
            [sys.executable, "-m", PACKAGE, "fetch-targets", f"http://{http_sd}/sd/targets?kind=pod", "--output",
             str(stage.fetched)],
            folder / "fetch.log",
            {**THIS.environment(), "HOME": str(folder)},
        )  # fmt: skip
        fetching.launch()
        stack.push_async_callback(fetching.stop)
        await fetching.until_ready(lambda: is_so(stage.fetched.exists), "targets are fetched")
        by_http = [("http_sd", ""), ("http_sd", "5s"), ("file_sd", ""), ("file_sd, fetched", "")]
        collectors: list[Collector] = []
        if with_collectors:
            collectors = [
                await stack.enter_async_context(
                    stage.prometheus("2.24", ("consul_sd", ""), ("consul_sd", "5s"))
                ),
                await stack.enter_async_context(stage.prometheus("2.53", *by_http)),
                await stack.enter_async_context(stage.prometheus("3.5", *by_http)),
                await stack.enter_async_context(stage.victoria("")),
                await stack.enter_async_context(stage.victoria("5s")),
            ]
        own = [
            Way("our share: file of the registrar", ""),
            Way("our share: answered long poll", ""),
            Way("our share: file of fetch-targets", ""),
        ]
        ways = [*own, *(way for one in collectors for way in one.ways.values())]
        session = await stack.enter_async_context(aiohttp.ClientSession())
        watching = [asyncio.create_task(one.watch(session)) for one in collectors]
        watching += [
            asyncio.create_task(watch_file(own[0], stage.file)),
            asyncio.create_task(watch_polls(own[1], f"http://{http_sd}/sd/targets")),
            asyncio.create_task(watch_file(own[2], stage.fetched)),
        ]
        try:
            begun = await change(api, ways, changes)
        finally:
            for task in watching:
                task.cancel()
    print("| way | refresh | p50 | p90 | p99 | max |\n|---|---|---|---|---|---|")
    for way in ways:
        print(way.line(begun))


async def change(api: Any, ways: Sequence[Way], changes: int) -> dict[str, float]:
    """Create Pods one after the other, and wait until every way has shown them; return when each began."""
    begun: dict[str, float] = {}
    pause = random.Random(16)
    async with api.session() as kube:
        for number in range(changes):
            await asyncio.sleep(pause.uniform(*GAPS))
            moment = time.monotonic()
            pod = await create_pod(kube, 900_000 + 5 * number)
            begun[f"pod--{pod.namespace}--{pod.name}"] = moment

    async def have_arrived() -> bool:
        return all(begun.keys() <= way.seen.keys() for way in ways)

    with contextlib.suppress(BenchmarkError):
        await wait_until(have_arrived, within=100, what="every change arrives")
    return begun


async def names() -> None:
    """Print what a change costs under names of several sizes: bytes for each watcher, and Consul's CPU."""
    print(
        "| instances under the name | bytes, gzip | bytes of JSON | Consul's CPU, no watcher | for each watcher |"
    )
    print("|---|---|---|---|---|")
    for size in SIZES:
        async with (
            consul_program() as (program, address),
            aiohttp.ClientSession(f"http://{address}", auto_decompress=False) as session,
        ):
            for start in range(0, size, OPERATIONS):
                await put(session, range(start, min(start + OPERATIONS, size)))
            alone, _ = await cost(program, session, size, watchers=0)
            watched, received = await cost(program, session, size, watchers=WATCHERS)
        wire = sum(one for one, _ in received) / len(received)
        plain = sum(one for _, one in received) / len(received)
        each = (watched - alone) / WATCHERS
        print(f"| {size:,} | {wire:,.0f} | {plain:,.0f} | {alone * 1000:.1f} ms | {each * 1000:.1f} ms |")


async def put(session: aiohttp.ClientSession, numbers: Sequence[int], address: str = "192.0.2.1") -> None:
    """Write instances of one name, with meta as a registrar writes it."""
    operations = []
    for number in numbers:
        meta = {
            "cluster": CLUSTER, "cluster_uid": "5b0e2f0e-61a4-4a8c-9a53-0d3f4f1f9a11", "kind": "pod",
            "managed_by": "k8s-consul-registrar", "metrics_path": "/metrics", "namespace": f"team-{number % 40}",
            "node": f"node-{number % 200}", "pod": f"app-{number % 30}-7d9f8c6b5-{number:05}", "scheme": "http",
            "zone": "zone-a",
        }  # fmt: skip
        service = {
            "ID": f"pod--team-{number % 40}--app-{number % 30}-7d9f8c6b5-{number:05}",
            "Service": NAME, "Address": address, "Port": 9102, "Meta": meta,
        }  # fmt: skip
        operations.append({"Service": {"Verb": "set", "Node": "k8s-bench", "Service": service}})
    node = {"Node": {"Verb": "set", "Node": {"Node": "k8s-bench", "Address": "192.0.2.1"}}}
    body = json.dumps([node, *operations] if 0 in numbers else operations)
    async with session.put("/v1/txn", data=body) as answer:
        if answer.status != 200:
            raise BenchmarkError(f"Consul answers {answer.status}: {await answer.text()}")


async def cost(
    program: Program, session: aiohttp.ClientSession, size: int, *, watchers: int
) -> tuple[float, list[tuple[int, int]]]:
    """Change one instance again and again; return Consul's CPU for each change, and what watchers received."""
    received: list[tuple[int, int]] = []
    path = f"/v1/health/service/{NAME}?stale=&wait=60s"

    async def watch(is_watching: asyncio.Event) -> None:
        index = "0"
        while True:
            headers = {"Accept-Encoding": "gzip"}
            async with session.get(f"{path}&index={index}", headers=headers) as answer:
                body = await answer.read()
                if index != "0":
                    received.append((len(body), len(zlib.decompress(body, zlib.MAX_WBITS | 32))))
                index = answer.headers["X-Consul-Index"]
                is_watching.set()

    ready = [asyncio.Event() for _ in range(watchers)]
    tasks = [asyncio.create_task(watch(one)) for one in ready]
    await asyncio.gather(*(one.wait() for one in ready))
    await asyncio.sleep(1)
    used = []
    for number in range(CHANGES_OF_NAMES):
        before, seen = program.precise_cpu_seconds, len(received)
        await put(
            session, range(number % size, number % size + 1), f"192.0.2.{number + 2 + 100 * bool(watchers)}"
        )
        answered = partial(has, received, seen + watchers)
        await wait_until(partial(is_so, answered), what="watchers are answered")
        await asyncio.sleep(0.2)
        used.append(program.precise_cpu_seconds - before)
    for task in tasks:
        task.cancel()
    return statistics.median(used), received


def has(received: Sequence[object], count: int) -> bool:
    """Return True if this number of answers was received."""
    return len(received) >= count


async def is_so(condition: Callable[[], bool]) -> bool:
    """Return a condition's value."""
    return condition()


PARTS: dict[str, Callable[[int], Any]] = {
    "latency": latency,
    "names": lambda _: names(),
    "share": partial(latency, with_collectors=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=50)
    parser.add_argument("--part", choices=tuple(PARTS), action="append")
    arguments = parser.parse_args()
    for part in arguments.part or ("latency", "names"):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(PARTS[part](arguments.changes))
        print()


if __name__ == "__main__":
    main()
