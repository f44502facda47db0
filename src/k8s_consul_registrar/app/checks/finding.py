"""What a check found, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """How a check came out; only `FAIL` makes the command fail."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: what was looked at, how it is, and a hint where something is to be done."""

    name: str
    outcome: Outcome
    detail: str
    hint: str = ""


def ok(name: str, detail: str) -> Finding:
    """Return a finding that needs nothing."""
    return Finding(name, Outcome.OK, detail)


def warn(name: str, detail: str, hint: str = "") -> Finding:
    """Return a finding that works and is not as it should be."""
    return Finding(name, Outcome.WARN, detail, hint)


def fail(name: str, detail: str, hint: str = "") -> Finding:
    """Return a finding without whose repair the program does not do its work."""
    return Finding(name, Outcome.FAIL, detail, hint)


def skipped(name: str, detail: str) -> Finding:
    """Return a check that could not be made, and why not."""
    return Finding(name, Outcome.SKIPPED, detail)


def is_passed(findings: Iterable[Finding]) -> bool:
    """Whether none of them failed."""
    return all(finding.outcome is not Outcome.FAIL for finding in findings)
