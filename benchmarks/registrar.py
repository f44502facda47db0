"""Measure the registrar from outside, beside another checkout in alternation, and print one Markdown table.

`make bench-registrar BASE=/path/to/other/checkout PAIRS=5 ROWS=cold-catalog-10000,steady-10000`. The API server is
the sandbox's, in a process of its own, with lists in pages; Consul is real. Everything is on loopback.
"""

import argparse
import asyncio
import os
import platform
import signal
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import uvloop
from registering.bench import Bench, Measured
from registering.processes import BenchmarkError, consul_version, cpu_ticks, load
from registering.scenarios import SCENARIOS
from registering.stage import EVERYTHING, THIS, Checkout
from registering.table import FIGURES, Runs, line_of, table, write_table

ROWS = (
    "cold-catalog-10000", "cold-catalog-100000", "cold-agent-10000", "steady-10000", "steady-100000",
    "resync-10000", "removals-catalog-10000", "removals-agent-10000", "rejected-100000", "failed-20000",
    "foreign-agent-50000", "foreign-catalog-50000", "rest-10000",
    "endpoint-5000", "endpoints-100000",
)  # fmt: skip
# Their budgets are values, not ratios, and each run takes minutes.
FEW_PAIRS = frozenset(
    {
        "rejected",
        "failed",
        "foreign-agent",
        "foreign-catalog",
        "removals-agent",
        "rest",
        "hour",
        "endpoint",
        "endpoints",
    }
)
MOST_OF_FEW = 2
# Version 0.1.0 discovers no Services: a base is left out.
WITHOUT_BASE = frozenset({"endpoint", "endpoints"})
RUN_WITHIN = 1500.0  # seconds that one run may take
BUSY = 0.25  # share of the machine that others use, above which a run is marked


class Row(NamedTuple):
    """One scenario with a size."""

    scenario: str
    size: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="another checkout, run in alternation with this one")
    parser.add_argument(
        "--on", action="store_true", help="this checkout with everything switched on, beside itself without"
    )
    parser.add_argument("--fetched", action="store_true", help="with --on: a `fetch-targets` follows it")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each checkout")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"scenario-size, of {', '.join(SCENARIOS)}")
    parser.add_argument("--seconds", type=float, default=25, help="how long Pods change")
    parser.add_argument("--hour", type=float, default=3600, help="seconds of the scenario `hour`")
    parser.add_argument(
        "--limits", action="store_true", help="the bare limit and the original beside a base as well"
    )
    parser.add_argument(
        "--wait", type=float, default=30, help="longest wait for an idle machine before each run"
    )
    parser.add_argument("--write", type=Path, help="a document whose table takes the lines")
    arguments = parser.parse_args()
    rows = [_row(text) for text in arguments.rows.split(",") if text]
    try:
        uvloop.run(measure_all(arguments, rows))
    except BenchmarkError as error:
        sys.exit(str(error))
    except asyncio.CancelledError:
        sys.exit(1)


def _row(text: str) -> Row:
    scenario, _, size = text.strip().rpartition("-")
    if scenario not in SCENARIOS or not size.isdecimal():
        sys.exit(f"{text} is no row: write scenario-size, of {', '.join(SCENARIOS)}")
    return Row(scenario, int(size))


async def measure_all(arguments: argparse.Namespace, rows: list[Row]) -> None:
    measuring = asyncio.current_task()
    assert measuring is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, measuring.cancel)
    checkouts = [THIS] if arguments.base is None else [Checkout("base", arguments.base.resolve()), THIS]
    if arguments.on:
        checkouts = [
            replace(THIS, name="base"),
            replace(THIS, settings=EVERYTHING, is_fetched=arguments.fetched),
        ]
    commits = ", ".join(f"{checkout.name} {checkout.prepare()}" for checkout in checkouts)
    about = (
        f"{machine()}; {commits}; medians of {arguments.pairs} runs in alternation, fewer where it says so"
    )
    if arguments.on:
        about += (
            f"; this is base with {', '.join(EVERYTHING)}{' and fetch-targets' if arguments.fetched else ''}"
        )
    say(about)
    lines: dict[str, str] = {}
    for row in rows:
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
            limits = arguments.limits or len(checkouts) == 1
            bench = Bench(Path(folder), arguments.seconds, limits, arguments.hour)
            pairs = min(arguments.pairs, MOST_OF_FEW) if row.scenario in FEW_PAIRS else arguments.pairs
            compared = [THIS] if row.scenario in WITHOUT_BASE and not arguments.on else checkouts
            try:
                lines |= await measure_row(bench, compared, row, pairs, arguments.wait)
            finally:
                await bench.close()
        if arguments.write:
            write_table(arguments.write, about, lines)
    print(f"{about}\n\n{table(lines)}")


async def measure_row(
    bench: Bench, checkouts: list[Checkout], row: Row, pairs: int, patience: float
) -> dict[str, str]:
    """Run one scenario on each checkout in turn and return its lines by title."""
    values: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    notes: dict[str, str] = {}
    for pair in range(pairs):
        measured: list[tuple[Checkout, Measured]] = []
        for checkout in checkouts:
            others = await _idle(patience)
            say(
                f"{row.scenario}-{row.size} pair {pair + 1} of {pairs}, {checkout.name}: load {load():.1f}, "
                f"others use {others * 100:.0f} % of the machine{' (busy)' if others > BUSY else ''}"
            )
            began = time.monotonic()
            result = await run_once(bench, checkout, row)
            if isinstance(result, str):
                say(f"  failed: {result}")
                notes[checkout.name] = f"a run failed: {result.splitlines()[0][:150]}"
                continue
            shown = ", ".join(f"{key} {value:.4g}" for key, value in result.figures.items())
            say(f"  {shown}; {'; '.join(result.notes)} ({time.monotonic() - began:.0f} s)")
            busy = f"; others used {others * 100:.0f} % of the machine before" if others > BUSY else ""
            notes[checkout.name] = "; ".join(result.notes) + busy
            measured.append((checkout, result))
        if len(measured) == len(checkouts):  # a run counts with its pair
            for checkout, result in measured:
                for key, value in result.figures.items():
                    values[checkout.name, key].append(value)
    text = " / ".join(f"{name}: {note}" for name, note in notes.items())
    lines: dict[str, str] = {}
    for figure in (figure for figure in FIGURES if figure.scenario == row.scenario):
        runs = Runs(values["base", figure.key], values["this", figure.key])
        counted = f"`{row.scenario}-{row.size}`, {len(runs.this)} of {pairs} runs"
        said = f"{counted}; {text}" if not lines else f"{counted}, as above"
        title, line = line_of(figure, row.size, runs, said.replace("|", "¦"))
        lines[title] = line
    return lines


async def run_once(bench: Bench, checkout: Checkout, row: Row) -> Measured | str:
    """Run a scenario once; return its figures, or the problem with them."""
    try:
        try:
            async with asyncio.timeout(RUN_WITHIN + (bench.hour if row.scenario == "hour" else 0)):
                return await SCENARIOS[row.scenario](bench, checkout, row.size)
        except* Exception as errors:  # a row that fails must not lose the others
            raise BenchmarkError(_describe(errors)) from errors
    except BenchmarkError as error:
        return str(error)


def _describe(errors: BaseException) -> str:
    """Return the text of the first exception of nested groups."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    if isinstance(errors, BenchmarkError):
        return str(errors)
    return f"{type(errors).__name__}: {errors}" if str(errors) else type(errors).__name__


async def _idle(patience: float) -> float:
    """Wait for a machine that is mostly idle, at most so long; return the share that others use."""
    until = time.monotonic() + patience
    while True:
        before = cpu_ticks()
        await asyncio.sleep(2)
        after = cpu_ticks()
        used = 1 - (after[0] - before[0]) / max(1, after[1] - before[1])
        if used <= BUSY or time.monotonic() >= until:
            return used


def say(text: str) -> None:
    """Tell how it goes, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{os.cpu_count()} cores of {cpu_name()}, {memory:.0f} GB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, Consul {consul_version()}"
    )


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
