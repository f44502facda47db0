"""The output of findings: aligned, wrapped and coloured on a terminal, whole and plain elsewhere."""

import json

from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.commands.check.nodes import Place, sample
from k8s_consul_registrar.commands.check.report import (
    Finding,
    Result,
    as_json,
    as_table,
    fail,
    ok,
    skipped,
    warn,
)

FINDINGS = [
    ok("consul", "answers"),
    fail("list pods", "not allowed", "grant verbs on resources, which is a hint that is too long for a line"),
    warn("cluster uid", "unknown"),
    skipped("node port", "no Node"),
]


def test_table_is_aligned_and_plain() -> None:
    """Outcome, name and detail stand in columns; a hint is below its detail; the last line counts."""
    lines = as_table(FINDINGS).splitlines()
    assert lines[0] == "ok       consul       answers"
    assert lines[1] == "fail     list pods    not allowed"
    assert lines[2].startswith("                      > grant verbs")
    assert lines[-1] == "1 failed, 1 to look at, 1 skipped, 1 ok"


def test_colours_take_no_room() -> None:
    """With the escape sequences taken out the coloured table is the plain one."""
    coloured = as_table(FINDINGS, is_coloured=True)
    assert "\x1b[1;31mfail\x1b[0m" in coloured
    for code in ("32", "33", "1;31", "2", "0"):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == as_table(FINDINGS)


@given(st.integers(60, 200))
def test_lines_fit_a_terminal(width: int) -> None:
    """No line is wider than the terminal, and no word is lost."""
    lines = as_table(FINDINGS, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines).split()) == " ".join(as_table(FINDINGS).split())


def test_json_holds_everything() -> None:
    """Every field of every finding is there, and whether anything failed."""
    shown = json.loads(as_json(FINDINGS))
    assert shown["passed"] is False
    assert [Finding(**{**one, "outcome": Result(one["outcome"])}) for one in shown["findings"]] == FINDINGS
    assert json.loads(as_json(FINDINGS[:1]))["passed"] is True


@given(st.lists(st.sampled_from(["10.0.0.1", "fd00::1"]), max_size=30), st.integers(1, 8))
def test_sample_has_each_address_family(addresses: list[str], size: int) -> None:
    """As many as asked for, and both families where both are there and the sample has room for two."""
    chosen = sample([Place("n", address, 1) for address in addresses], size)
    assert len(chosen) == min(size, len(addresses))
    if size > 1:
        assert {place.address for place in chosen} == set(addresses)
