"""The cost of a relayed scrape: ours, nginx and a plain aiohttp relay side by side; `make bench-proxy` runs it.

The proxy under test has one core to itself, everything else the others. Contenders take turns within every
round, so that whatever else the machine does meets all of them; what counts is the ratio within a round.
`BENCH_BASE` is another checkout to compare the cost with, in place of the others. Further `BENCH_` variables: ROUNDS (5), SECONDS a run (3), CLIENTS (16,128), BODIES (a number each, all by default),
ONLY (cost, latency, memory, nodes, peers), PEERS (names of `support.hostile.Kind`, all by default), FULL=1 for ten minutes of memory and 5,000 nodes every 15 s.
"""

import asyncio
import os
import platform
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from relaying.beside import Beside
from relaying.contenders import (
    BASE,
    LARGER_BUFFERS,
    NGINX,
    PLAIN,
    Contender,
    benchmark_nodes,
    nginx,
    ours,
    path_of,
    plain,
)
from relaying.kubelets import TOKEN, Body, Kubelets
from relaying.load import Full, answer_of, full_load, open_loop
from relaying.machine import Cores, Missing

from k8s_consul_registrar.sandbox.sandbox import Sandbox
from support.hostile import Kind

ROUNDS = int(os.environ.get("BENCH_ROUNDS") or 5)
SECONDS = int(os.environ.get("BENCH_SECONDS") or 3)
CLIENTS = tuple(int(part) for part in (os.environ.get("BENCH_CLIENTS") or "16,128").split(","))
BODIES = tuple(int(part) for part in (os.environ.get("BENCH_BODIES") or "0,1,2,3").split(","))
PARTS = (os.environ.get("BENCH_ONLY") or "cost,latency,memory,nodes,peers").split(",")
PEERS = [kind for kind in Kind if kind.name in (os.environ.get("BENCH_PEERS") or ",".join(Kind.__members__))]
CHECKOUT = os.environ.get("BENCH_BASE", "")
IS_COMPARED = bool(CHECKOUT)
IS_FULL = os.environ.get("BENCH_FULL") == "1"
DISTINCT, EVERY, NODE_ROUNDS = (5000, 15.0, 4) if IS_FULL else (1000, 3.0, 5)
MEMORY_SECONDS = 600 if IS_FULL else 30
SETTLES = 2.0  # seconds until the daemon has listed its Nodes
SHARED = [("Authorization", f"Bearer {TOKEN}")]  # for asking a kubelet directly


class Bench:
    """One run of the benchmark: the kubelets, the contenders by name, and where they run."""

    def __init__(self, cores: Cores, folder: Path, kubelets: Kubelets, sandbox: Sandbox) -> None:
        self.cores = cores
        self.folder = folder
        self.kubelets = kubelets
        self.sandbox = sandbox
        self.bodies = [self.kubelets.bodies[number] for number in BODIES]

    def path(self, body: Body) -> str:
        """Return what a client asks a contender for."""
        return path_of(body.address, self.kubelets.port)

    async def check(self, contenders: Sequence[Contender]) -> None:
        """Fail unless every contender hands on what the kubelet answers."""
        for body in self.bodies:
            for contender in contenders:
                status, described, payload = await answer_of(contender.port, self.path(body))
                encoding = described.get("content-encoding", "") == ("gzip" if body.is_gzip else "")
                if status != 200 or not encoding or (payload != body.payload and not body.as_go_does):
                    raise RuntimeError(
                        f"{contender.name}, {body.name}: {status} {described} {payload[:200]!r}"
                    )

    async def cost(self, contenders: Sequence[Contender]) -> None:
        """Measure CPU per scrape at full load."""
        print("\n## Cost at full load\n")
        print(
            f"| body | clients | | CPU ms per scrape | ratio to {BASE if IS_COMPARED else NGINX} (least to most) "
            "| scrapes/s | RSS MB |"
        )
        print("|---|---|---|---|---|---|---|")
        for body in self.bodies:
            for clients in CLIENTS:
                await self._cost_of(body, clients, contenders)

    async def _cost_of(self, body: Body, clients: int, contenders: Sequence[Contender]) -> None:
        costs: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for contender in contenders:
            await self._run(contender, body, clients, 1)
        for number in range(ROUNDS):
            turn = number % len(contenders)
            for contender in (*contenders[turn:], *contenders[:turn]):
                before = contender.process.cpu_seconds()
                done = await self._run(contender, body, clients, SECONDS)
                costs[contender.name].append((contender.process.cpu_seconds() - before) / done.scrapes * 1000)
                rates[contender.name].append(done.per_second)
        for contender in contenders:
            mine = costs[contender.name]
            ratios = [
                one / other for one, other in zip(mine, costs[BASE if IS_COMPARED else NGINX], strict=True)
            ]
            print(
                f"| {body.name} | {clients} | {contender.name} | {statistics.median(mine):.4f} "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
                f"| {statistics.median(rates[contender.name]):,.0f} "
                f"| {contender.process.resident() / 1e6:.0f} |",
                flush=True,
            )

    async def _run(self, contender: Contender, body: Body, clients: int, seconds: int) -> Full:
        return await full_load(
            contender.port, self.path(body), clients=clients, seconds=seconds, cores=self.cores
        )

    async def latency(self, contenders: Sequence[Contender]) -> None:
        """Measure the time scrapes take at half of the rate nginx can do."""
        print("\n## Latency at half of nginx's highest rate, open loop\n")
        print("| body | scrapes/s | | p50 ms | p99 ms | p99 beyond nginx's, ms | failed |")
        print("|---|---|---|---|---|---|---|")
        (reference,) = (contender for contender in contenders if contender.name == NGINX)
        for body in self.bodies:
            if body.as_go_does:
                continue
            best = max([(await self._run(reference, body, 16, 1)).per_second for _ in range(3)])
            await self._latency_of(body, best / 2, contenders)

    async def _latency_of(self, body: Body, rate: float, contenders: Sequence[Contender]) -> None:
        direct = "the kubelet itself, without TLS"
        names = [direct, *(contender.name for contender in contenders)]
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
        runs = [(direct, self.kubelets.plain_port, "/metrics/cadvisor", SHARED, body.address)]
        runs += [(each.name, each.port, self.path(body), [], "127.0.0.1") for each in contenders]
        for number in range(ROUNDS):
            turn = number % len(runs)
            for name, port, path, headers, host in (*runs[turn:], *runs[:turn]):
                done = await open_loop(
                    port, [path], rate=rate, seconds=SECONDS, cores=self.cores, headers=headers, host=host
                )
                found[name].append((done.p50 * 1000, done.p99 * 1000, done.failed))
        for name in names:
            beyond = [one[1] - other[1] for one, other in zip(found[name], found[NGINX], strict=True)]
            print(
                f"| {body.name} | {rate:,.0f} | {name} | {statistics.median(each[0] for each in found[name]):.2f} "
                f"| {statistics.median(each[1] for each in found[name]):.2f} "
                f"| {statistics.median(beyond):+.2f} | {sum(each[2] for each in found[name])} |",
                flush=True,
            )

    async def memory(self, contender: Contender) -> None:
        """Measure the memory under 128 clients of 1 MB, and whether it grows."""
        body = next(each for each in self.kubelets.bodies if each.name == "1 MB")
        load = asyncio.create_task(self._run(contender, body, 128, MEMORY_SECONDS))
        seen = []
        while not load.done():
            await asyncio.sleep(1)
            seen.append(contender.process.resident() / 1e6)
        quarter = max(1, len(seen) // 4)
        first, last = seen[quarter : 2 * quarter], seen[-quarter:]
        print(f"\n## Memory: 128 clients on 1 MB for {MEMORY_SECONDS} s\n")
        print(f"{(await load).scrapes:,} scrapes; most {max(seen):.1f} MB; second quarter", end=" ")
        print(f"{statistics.mean(first):.1f} MB, last quarter {statistics.mean(last):.1f} MB", flush=True)

    async def nodes(self, contender: Contender) -> None:
        """Measure what many Nodes cost, each asked for once a period, spread evenly."""
        listed = benchmark_nodes(self.kubelets, DISTINCT)[-DISTINCT:]
        addresses = [node["status"]["addresses"][0]["address"] for node in listed]
        paths = [path_of(address, self.kubelets.port) for address in addresses]
        rate = DISTINCT / EVERY
        # Once round to dial them all, which is not what goes on every 15 s.
        await open_loop(contender.port, paths, rate=rate, seconds=EVERY, cores=self.cores)
        seconds = EVERY * NODE_ROUNDS
        before = contender.process.cpu_seconds()
        done = await open_loop(contender.port, paths, rate=rate, seconds=seconds, cores=self.cores)
        share = (contender.process.cpu_seconds() - before) / seconds
        print(f"\n## {DISTINCT:,} distinct nodes every {EVERY:g} s, 100 KB gzip\n")
        print(
            f"{done.scrapes:,} scrapes, {done.failed} failed, p99 {done.p99 * 1000:.1f} ms; {share:.1%} of a core, "
            f"{contender.process.resident() / 1e6:.0f} MB",
            flush=True,
        )


async def main() -> None:
    """Run the parts asked for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cores = Cores()
    cores.keep_off()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", end="; ")
    print(f"load average {os.getloadavg()[0]:.1f} at the start; {ROUNDS} rounds of {SECONDS:g} s")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-proxy-")))
        kubelets = await stack.enter_async_context(Kubelets(folder, cores))
        sandbox = await stack.enter_async_context(Sandbox())
        for node in benchmark_nodes(kubelets, DISTINCT if "nodes" in PARTS else 0):
            sandbox.kube.create(node)
        bench = Bench(cores, folder, kubelets, sandbox)
        if "cost" in PARTS or "latency" in PARTS:
            async with AsyncExitStack() as running:
                makers = (
                    (
                        ours(kubelets, sandbox, folder, cores),
                        ours(kubelets, sandbox, folder, cores, base=Path(CHECKOUT)),
                    )
                    if IS_COMPARED
                    else (
                        ours(kubelets, sandbox, folder, cores),
                        nginx(kubelets, folder, cores),
                        nginx(kubelets, folder, cores, buffers=LARGER_BUFFERS),
                        plain(kubelets, folder, cores),
                    )
                )
                contenders = [await running.enter_async_context(each) for each in makers]
                await asyncio.sleep(SETTLES)
                await bench.check(contenders)
                if "cost" in PARTS:
                    await bench.cost(contenders)
                if "latency" in PARTS and not IS_COMPARED:
                    # At such a rate a plain aiohttp relay only falls behind.
                    await bench.latency([each for each in contenders if each.name != PLAIN])
        if "peers" in PARTS:
            await Beside(cores, folder, kubelets, sandbox).run(PEERS, ROUNDS, SECONDS)
        for part in ("memory", "nodes"):
            if part in PARTS:
                async with ours(kubelets, sandbox, folder, cores) as fresh:
                    await asyncio.sleep(SETTLES)
                    await getattr(bench, part)(fresh)
    print(f"\nload average {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    try:
        asyncio.run(main())
    except Missing as missing:
        sys.exit(f"no benchmark: {missing}")
