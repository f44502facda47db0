"""The table of the registrar's benchmark: figures with their budgets, as Markdown that can be merged and written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

BEGIN, END = "<!-- bench-registrar: begin -->", "<!-- bench-registrar: end -->"
_HEAD = (
    "| figure | must | base | this | this ÷ base | met | measured with it |\n|---|---|---|---|---|---|---|"
)
_PROXY = (
    "| proxy, CPU per scrape against nginx | within 5 % of 1.40 / 0.76 / 0.81 | | | | "
    "| `make bench-proxy`, [its own page](benchmarks-proxy.md) |"
)
NONE = "-"


class Budget(NamedTuple):
    """The bound of a figure: at most this ratio to the base, at most this value, or both."""

    ratio: float | None = None
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table; `{}` in the title stands for the scenario's size."""

    scenario: str
    key: str
    title: str
    unit: str
    budgets: Mapping[int, Budget]  # by size
    places: int = 0
    has_ratio: bool = True

    def show(self, value: float) -> str:
        """Return a value with its unit."""
        return f"{value * _FACTORS.get(self.unit, 1):.{self.places}f} {self.unit}"

    def must(self, size: int) -> str:
        """Return what is asked of this figure."""
        budget = self.budgets.get(size, Budget())
        asked = [f"ratio ≤ {budget.ratio:g}"] if budget.ratio is not None else []
        asked += [f"≤ {self.show(budget.value)}"] if budget.value is not None else []
        return ", ".join(asked) or NONE


_FACTORS = {"ms": 1e3, "%": 100.0}

FIGURES = (
    Figure("cold-catalog", "cold", "cold start, catalog, {} Pods", "s", {10_000: Budget(1.0), 100_000: Budget(1.0)}, 2),
    Figure("cold-agent", "cold", "cold start, agent, {} Pods", "s", {10_000: Budget(1.1)}, 2),
    Figure("steady", "p50", "change → Consul at 50 a second, {} Pods, p50", "ms", {10_000: Budget(1.1)}),
    Figure("steady", "p99", "change → Consul at 50 a second, {} Pods, p99", "ms", {10_000: Budget(1.1)}),
    Figure("resync", "p99", "the same during a resync, {} Pods, p99", "ms", {10_000: Budget(value=0.025)}),
    Figure("removals-catalog", "p99", "the same during the removal of two fifths of {} Pods, catalog, p99", "ms",
           {10_000: Budget(value=0.025)}),
    Figure("removals-agent", "longest", "a new Pod during the removal of two fifths of {} Pods, agent", "ms",
           {10_000: Budget(value=1.0)}),
    Figure("steady", "cpu", "CPU at 50 changes a second, {} Pods", "%", {10_000: Budget(1.08), 100_000: Budget(1.08)}, 1),
    Figure("steady", "peak", "peak memory, {} Pods", "MB", {10_000: Budget(value=75), 100_000: Budget(value=200)}),
    Figure("hour", "growth", "growth of memory in long churn, {} Pods, leader or standby", "MB", {10_000: Budget(value=3)}, 1, has_ratio=False),
    Figure("hour", "peak", "peak memory in long churn, {} Pods, leader or standby", "MB", {10_000: Budget(value=75)}),
    Figure("rejected", "cost", "CPU of a change beside {} rejected Pods, minus beside none", "ms/change",
           {100_000: Budget(value=0.3)}, 2, has_ratio=False),
    Figure("failed", "cost", "CPU of a change beside {} failed writes, agent, minus beside none", "ms/change",
           {20_000: Budget(value=0.3)}, 2, has_ratio=False),
    Figure("foreign-agent", "cost", "CPU of a change beside {} foreign services, agent, minus beside none", "ms/change",
           {50_000: Budget(value=0.3)}, 2, has_ratio=False),
    Figure("foreign-catalog", "cost", "CPU of a change beside {} foreign services, catalog, minus beside none",
           "ms/change", {50_000: Budget(value=0.3)}, 2, has_ratio=False),
    Figure("endpoint", "ratio", "CPU of one endpoint's change in a Service of {} endpoints ÷ of a Pod's change", "",
           {5000: Budget(value=1.0)}, 2, has_ratio=False),
    Figure("endpoints", "peak", "peak memory, {} endpoints of Services beside 10,000 Pods", "MB",
           {100_000: Budget(value=300)}, has_ratio=False),
    Figure("steady", "stall_start", "longest stall of the loop at the start, {} Pods", "ms", {}),
    Figure("steady", "stall", "longest stall of the loop in changes, {} Pods", "ms", {}),
    Figure("rest", "lists", "lists asked of the API server at rest, {} Pods", "lists", {10_000: Budget(value=0)}, 0, has_ratio=False),
)  # fmt: skip


class Runs(NamedTuple):
    """The values of one figure, run by run, of this checkout and of the base (empty where there is none)."""

    base: Sequence[float]
    this: Sequence[float]


def line_of(figure: Figure, size: int, runs: Runs, notes: str) -> tuple[str, str]:
    """Return the title and the line of one figure."""
    title = figure.title.format(f"{size:,}")
    budget = figure.budgets.get(size, Budget())
    ratios = sorted(this / base for base, this in zip(runs.base, runs.this, strict=False) if base > 0)
    is_shown = bool(ratios) and figure.has_ratio
    ratio = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if is_shown else NONE
    verdicts = []
    if budget.ratio is not None and ratios:
        verdicts.append(round(median(ratios), 2) <= budget.ratio)
    if budget.value is not None and runs.this:
        verdicts.append(median(runs.this) <= budget.value)
    met = NONE if not verdicts else "yes" if all(verdicts) else "no"
    cells = (
        title,
        figure.must(size),
        _shown(figure, runs.base),
        _shown(figure, runs.this),
        ratio,
        met,
        notes,
    )
    return title, f"| {' | '.join(cells)} |"


def _shown(figure: Figure, values: Sequence[float]) -> str:
    return figure.show(median(values)) if values else NONE


def table(lines: Mapping[str, str]) -> str:
    """Return the whole table, its lines in the order of FIGURES and by size."""
    return "\n".join([_HEAD, *(lines[title] for title in sorted(lines, key=_place)), _PROXY])


def read_lines(file: Path) -> dict[str, str]:
    """Return the lines of the table that a document has, by title."""
    _, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    lines = {
        line.split("|")[1].strip(): line for line in rest.partition(END)[0].splitlines() if line[:2] == "| "
    }
    return {title: line for title, line in lines.items() if _place(title)[0] < len(FIGURES)}


def write_table(file: Path, about: str, lines: Mapping[str, str]) -> None:
    """Replace the table of a document; lines of figures that were not measured now stay."""
    text = file.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{file} lacks the markers {BEGIN} and {END}")
    merged = {**read_lines(file), **lines}
    file.write_text(f"{before}{BEGIN}\n{about}\n\n{table(merged)}\n{END}{after}", encoding="utf-8")


def _place(title: str) -> tuple[int, int]:
    """Return where a title stands in the table; past all figures when it is none of them."""
    for place, figure in enumerate(FIGURES):
        before, after = figure.title.split("{}")
        size = title.removeprefix(before).removesuffix(after).replace(",", "")
        if title.startswith(before) and title.endswith(after) and size.isdecimal():
            return place, int(size)
    return len(FIGURES), 0
