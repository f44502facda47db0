"""Measures the registrar beside a literal reading of the original's algorithm, and prints a table.

`make bench-registrar PODS=1000,10000`. The API server is the sandbox's, over TLS in a process of its own;
Consul is real. Everything is on loopback and gone afterwards.
"""

import argparse
import asyncio
import contextlib
import os
import platform
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from registering import figures
from registering.figures import ColdStart, Rest, Steady, load
from registering.stage import sandbox_api

from k8s_consul_registrar.sandbox.synthetic import synthetic_pods
from real_servers import consul_binary, consul_version

NODES = 200
RATE = 50.0
NOTHING = "-"
NONE = "none"
# Above these the original, and the agent, take too long to be worth waiting for.
MOST_FOR_ORIGINAL = MOST_FOR_AGENT = 10_000
PEAKS = {10_000: 90, 100_000: 280}
PARTS = ("catalog", "original", "agent", "steady", "rest")


class Row(NamedTuple):
    """One figure: what was asked for, what was reached, what the original needs, and what to know about it."""

    figure: str
    asked: str
    reached: str
    original: str
    is_met: bool | None
    details: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", default="10000", help="sizes, separated by commas")
    parser.add_argument("--runs", type=int, default=3, help="runs of a cold start")
    parser.add_argument("--seconds", type=float, default=25, help="how long Pods change")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--wait", type=float, default=0, help="seconds to wait at most for an idle machine before each part"
    )
    arguments = parser.parse_args()
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(measure_all(arguments))


async def measure_all(arguments: argparse.Namespace) -> None:
    measuring = asyncio.current_task()
    assert measuring is not None
    # An end from outside leaves nothing behind either.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, measuring.cancel)
    version = ".".join(map(str, consul_version(consul_binary())))
    print(
        f"{os.cpu_count()} cores, {memory_gb():.0f} GB, {cpu_name()}, Python {platform.python_version()}, "
        f"Consul {version}, Linux {platform.release()}"
    )
    for size in map(int, arguments.pods.split(",")):
        print(f"\n## {size} pods, {NODES} nodes (load {load():.1f} before)\n")
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
            await measure(size, Path(folder), arguments)


async def measure(size: int, folder: Path, arguments: argparse.Namespace) -> None:
    parts = set(arguments.parts.split(","))
    annotated = [pod["metadata"] for pod in synthetic_pods(size, NODES) if pod["metadata"].get("annotations")]
    pods = [(one["namespace"], one["name"]) for one in annotated]
    targets = len(pods) + NODES
    print("| figure | asked | reached | original | met | details |\n|---|---|---|---|---|---|", flush=True)
    async with sandbox_api(folder, pods=size, nodes=NODES) as api:
        reference: float | None = None
        memory = ""
        if "original" in parts and size <= MOST_FOR_ORIGINAL:
            await figures.until_idle(arguments.wait)
            said = await figures.original(api, targets=targets)
            reference, memory = said["wall"], f"{said['peak_mb']:.0f} MB"
        if "catalog" in parts:
            colds = []
            for _ in range(arguments.runs):
                await figures.until_idle(arguments.wait)
                colds.append(await figures.cold_start_catalog(api, folder, targets=targets))
            show(catalog_row(colds, reference))
        if "agent" in parts and size <= MOST_FOR_AGENT:
            colds = []
            for _ in range(max(1, arguments.runs - 1)):
                await figures.until_idle(arguments.wait)
                colds.append(await figures.cold_start_agent(api, folder, targets=targets))
            show(agent_row(colds, reference))
        if "steady" in parts:
            await figures.until_idle(arguments.wait)
            steady = await figures.steady(
                api, folder, pods, targets=targets, rate=RATE, seconds=arguments.seconds
            )
            for row in steady_rows(steady, size, memory):
                show(row)
        if "rest" in parts:
            show(rest_row(await figures.at_rest(api, folder, targets=targets)))


def show(row: Row) -> None:
    met = {True: "yes", False: "no", None: NONE}[row.is_met]
    print(
        f"| {row.figure} | {row.asked} | {row.reached} | {row.original} | {met} | {row.details} |", flush=True
    )


def catalog_row(colds: list[ColdStart], original: float | None) -> Row:
    limits = [cold.startup + 1.3 * max(cold.listing, cold.bare) for cold in colds]
    alone = (
        f"start-up {median(cold.startup for cold in colds):.2f} s, "
        f"list alone {median(cold.listing for cold in colds):.2f} s, "
        f"transactions alone {median(cold.bare for cold in colds):.2f} s"
    )
    return cold_row("cold start, catalog", colds, limits, original, alone)


def agent_row(colds: list[ColdStart], original: float | None) -> Row:
    limits = [1.2 * cold.bare for cold in colds]
    alone = f"PUTs alone {median(cold.bare for cold in colds):.2f} s"
    return cold_row("cold start, agent", colds, limits, original, alone)


def cold_row(
    figure: str, colds: list[ColdStart], limits: list[float], original: float | None, alone: str
) -> Row:
    """Judge by the median of the runs' own ratios: the load changes from one minute to the next."""
    whole = median(cold.registrar for cold in colds)
    pairs = [(cold.registrar, limit) for cold, limit in zip(colds, limits, strict=True)]
    each = ", ".join(f"{took:.2f} of {limit:.2f}" for took, limit in pairs)
    loads = "/".join(f"{cold.load:.1f}" for cold in colds)
    ratio = median(took / limit for took, limit in pairs)
    details = f"{alone}; runs {each}, median ratio {ratio:.2f}; load {loads}"
    asked = f"{median(limits):.2f} s"
    return Row(figure, asked, f"{whole:.2f} s", times(original, whole), ratio <= 1, details)


def steady_rows(steady: Steady, size: int, original_memory: str) -> Iterator[Row]:
    changes = steady.changes
    p50, p99 = changes.percentile(50) * 1e3, changes.percentile(99) * 1e3
    yield Row(
        "change to health endpoint",
        "p99 50 ms",
        f"p50 {p50:.0f} ms, p99 {p99:.0f} ms",
        "its period",
        p99 < 50,
        f"{len(changes.seen)} changes in {changes.seconds:.0f} s; after the API server's answer p50 "
        f"{changes.percentile_behind(50) * 1e3:.0f} ms, p99 {changes.percentile_behind(99) * 1e3:.0f} ms; "
        f"load {steady.load:.1f}",
    )
    most = PEAKS.get(size)
    yield Row(
        "peak memory",
        f"{most} MB" if most else NONE,
        f"{steady.peak_mb:.0f} MB",
        original_memory or NONE,
        steady.peak_mb <= most if most else None,
        f"{steady.peak_start_mb:.0f} MB after the first full pass",
    )
    for what, stall in (("the start", steady.stall_start), ("changes", steady.stall)):
        yield Row(
            f"longest stall, {what}",
            "100 ms",
            f"{stall.longest * 1e3:.0f} ms",
            NONE,
            stall.longest <= 0.1,
            f"/healthz every 20 ms from outside; a mere sleep came {stall.late * 1e3:.0f} ms late",
        )
    yield Row(
        "CPU at 50 changes a second",
        "10 %",
        f"{steady.cpu * 100:.1f} %",
        NONE,
        steady.cpu < 0.1,
        "of one core, user and system",
    )


def rest_row(rest: Rest) -> Row:
    asked = ", ".join(f"{count} {what}" for what, count in rest.requests.items()) or "none"
    return Row(
        "API server requests at rest",
        "no list",
        asked,
        "every Pod and Node, each period",
        not any(what.startswith("LIST") for what in rest.requests),
        f"{rest.full_passes} full passes in {rest.seconds:.0f} s; {rest.cpu * 100:.1f} % of a core",
    )


def times(original: float | None, ours: float) -> str:
    return f"{original:.1f} s, {original / ours:.1f} times" if original else NONE


def memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
