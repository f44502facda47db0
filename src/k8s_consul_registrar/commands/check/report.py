"""Findings of checks, and how they are shown: a table for people, JSON for programs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from textwrap import wrap

import msgspec


class Result(StrEnum):
    """The result of a check; only `FAIL` makes the command fail."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: what was looked at, how it is, and a hint where something is to be done."""

    name: str
    outcome: Result
    detail: str
    hint: str = ""


def ok(name: str, detail: str) -> Finding:
    """Return a finding that needs nothing."""
    return Finding(name, Result.OK, detail)


def warn(name: str, detail: str, hint: str = "") -> Finding:
    """Return a finding about what works and is not as it should be."""
    return Finding(name, Result.WARN, detail, hint)


def fail(name: str, detail: str, hint: str = "") -> Finding:
    """Return a finding that keeps a mode from its work until it is repaired."""
    return Finding(name, Result.FAIL, detail, hint)


def skipped(name: str, detail: str) -> Finding:
    """Return a check that could not be made, and why not."""
    return Finding(name, Result.SKIPPED, detail)


def is_passed(findings: Iterable[Finding]) -> bool:
    """Return True if none of them failed."""
    return all(finding.outcome is not Result.FAIL for finding in findings)


_COLOURS = {Result.OK: "32", Result.WARN: "33", Result.FAIL: "1;31", Result.SKIPPED: "2"}
_NARROWEST = 30  # columns for the text, however narrow the terminal is


def as_table(findings: Sequence[Finding], *, width: int = 0, is_coloured: bool = False) -> str:
    """Lay findings out as outcome, name and detail, each hint below its own, and a line that sums them up.

    `width` is the terminal's in columns, 0 for lines of any length.
    """
    names = max((len(finding.name) for finding in findings), default=0)
    outcomes = max(len(outcome) for outcome in Result)
    indent = outcomes + names + 4
    room = max(width - indent, _NARROWEST) if width else 0
    lines: list[str] = []
    for finding in findings:
        outcome = _coloured(finding.outcome, is_coloured=is_coloured)
        head = f"{outcome}{' ' * (outcomes - len(finding.outcome))}  {finding.name.ljust(names)}  "
        first, *rest = _wrapped(finding.detail, room)
        lines.append(f"{head}{first}".rstrip())
        lines += [f"{' ' * indent}{line}" for line in rest]
        if finding.hint:
            hint, *rest = _wrapped(finding.hint, max(room - 2, 0))
            lines += [f"{' ' * indent}> {hint}", *(f"{' ' * indent}  {line}" for line in rest)]
    return "\n".join((*lines, "", summary(findings)))


def as_json(findings: Sequence[Finding]) -> str:
    """Return one JSON object: `passed`, and every finding."""
    records = [
        {"name": one.name, "outcome": one.outcome.value, "detail": one.detail, "hint": one.hint}
        for one in findings
    ]
    shown = {"passed": is_passed(findings), "findings": records}
    return msgspec.json.format(msgspec.json.encode(shown), indent=2).decode()


def summary(findings: Sequence[Finding]) -> str:
    """Count the findings by outcome, the worst first."""
    counts = {outcome: sum(one.outcome is outcome for one in findings) for outcome in Result}
    words = {Result.FAIL: "failed", Result.WARN: "to look at", Result.SKIPPED: "skipped", Result.OK: "ok"}
    return ", ".join(f"{counts[outcome]} {word}" for outcome, word in words.items() if counts[outcome])


def _coloured(outcome: Result, *, is_coloured: bool) -> str:
    return f"\x1b[{_COLOURS[outcome]}m{outcome}\x1b[0m" if is_coloured else str(outcome)


def _wrapped(text: str, room: int) -> list[str]:
    if not room:
        return [text]
    return wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
