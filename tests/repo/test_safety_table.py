"""The table that names the tests of every safety rule and of every fault that was reproduced."""

import ast
import functools
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.files import ROOT, TESTS

TABLE = TESTS / "safety_table.toml"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
RULES_HEADING = "## The rules that keep data safe"

# What each reproduced fault shows; the numbers left out were no faults of the registrar.
FAULTS = {
    "r01_stale_ids": "a living object stops asking for an ID and its service stays",
    "r02_departed_growth": "departures that are done are never forgotten",
    "r03_standby_growth": "departures grow without bound on a standby",
    "r04_refused_leak": "failed writes leak",
    "r05_aba_settled": "a departure is settled by work that never saw it",
    "r07_shared_backoff": "one permanent failure delays the retries of all others",
    "r08_ahead_loop": "a version from the future is listed without a wait",
    "r09b_exec_kills_daemon": "an exec plugin's odd answer ends the daemon",
    "r10_token_file_empty": "an empty token file is a token",
    "r11_fenced_masks": "a write that times out while leading is not reported",
    "r12a_client_ca_comment": "a non-ASCII comment in a client CA ends the daemon at start",
    "r12b_ca_kills_daemon": "a CA file that becomes unreadable ends the daemon",
    "r14_real_names": "a Pod joins a service name of others elsewhere in the catalog",
    "r15_no_backoff_before_sync": "before the first sync a failing Consul is read without pause",
    "r16_outage_flaps": "a Consul outage does not show",
    "r17_fail_text_full_pass": "a changing error text triggers full reads",
    "r18_perf": "the cost of a change follows what is rejected, failed or foreign",
    "r19_kept_departure_forgotten": "a departure that had to wait is forgotten",
    "r20_brake_many_namespaces": "the brake judges each namespace alone",
    "r22_tiny_period": "a period of nanoseconds is accepted",
    "r25_stream_no_fallback": "a list that always breaks is tried the same way forever",
    "r26_exec_cancelled": "a slow exec plugin is killed by each impatient request",
    "r27_kubeconfig_host": "an odd host in a kubeconfig ends the daemon with a traceback",
    "r28_finished_before_start": "finished Pods in the first list are held by the brake",
    "r29_lead_again": "a new leader waits for the read budget",
    "r30_full_pass_writes_block": "bulk writes delay a new Pod",
    "r35_full_pass_toctou": "what was registered between a read and the write is overwritten",
    "r36_records_quadratic": "a hostile tag makes reading quadratic",
    "r37_resumed_is_not_caught_up": "a resumed watch proves absence before the missed events came",
    "r38_not_consul": "a server that answers everything alike is taken for an empty Consul",
    "r39_crowded_address": "thousands of Pods that are reported at one address stall the registrar",
    "r40_filtered_list": "a list that ACLs filter in part ends departures of services that it hides",
}


def table() -> dict[str, Any]:
    """Return the table."""
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def mapped() -> dict[str, Sequence[str]]:
    """Return the tests of every rule and fault that has an entry."""
    content = table()
    return {**content["rules"], **content["faults"]["tested"]}


def rules_of(page: str) -> list[str]:
    """Return the first column of the table of rules, without its head."""
    _, _, section = page.partition(f"{RULES_HEADING}\n")
    rows = re.findall(r"^\| (.+?) \| .+ \|$", section.partition("\n## ")[0], re.MULTILINE)
    return [row for row in rows if row != "rule"]


@functools.cache
def names_in(file: Path) -> frozenset[str]:
    """Return the tests that a file defines, as pytest names them after the file."""
    names = set[str]()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        methods = node.body if isinstance(node, ast.ClassDef) else ()
        names |= {f"{node.name}::{each.name}" for each in methods if is_test(each)}  # type: ignore[attr-defined]
        if is_test(node):
            names.add(node.name)  # type: ignore[attr-defined]
    return frozenset(names)


def is_test(node: ast.AST) -> bool:
    """Return whether a definition is a test."""
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")


def problems_of(entries: Mapping[str, Sequence[str]]) -> list[str]:
    """Return an entry without tests, and every test that does not exist."""
    found = [f"{what}: no test" for what, tests in entries.items() if not tests]
    for what, tests in entries.items():
        for test in tests:
            path, _, name = test.partition("::")
            if not (TESTS / path).is_file() or name not in names_in(TESTS / path):
                found.append(f"{what}: no such test: {test}")
    return found


def test_every_rule_of_the_page_has_its_tests() -> None:
    """The rules are those of docs/architecture.md, word for word, no more and no fewer."""
    rules = rules_of(ARCHITECTURE.read_text(encoding="utf-8"))
    assert len(rules) > 20
    assert len(set(rules)) == len(rules)
    assert set(rules) == set(table()["rules"])


def test_every_fault_has_its_tests_or_is_pending() -> None:
    """No fault is missing, unknown, or both tested and pending; at the end none is pending."""
    faults = table()["faults"]
    pending = faults.get("pending", [])
    assert len(set(pending)) == len(pending)
    assert not set(pending) & set(faults["tested"])
    assert {*pending, *faults["tested"]} == set(FAULTS)


def test_every_test_that_the_table_names_exists() -> None:
    """A test that is renamed or deleted is looked for here."""
    assert problems_of(mapped()) == []


@pytest.mark.parametrize(
    ("tests", "problem"),
    [
        ([], "x: no test"),
        (["test_nothing.py::test_a"], "x: no such test: test_nothing.py::test_a"),
        (["repo/test_safety_table.py::test_a"], "x: no such test: repo/test_safety_table.py::test_a"),
        (["repo/test_safety_table.py"], "x: no such test: repo/test_safety_table.py"),
        (
            ["repo/test_real_servers.py::TestRealServers"],
            "x: no such test: repo/test_real_servers.py::TestRealServers",
        ),
    ],
)
def test_entry_without_a_test_that_exists_is_a_problem(tests: list[str], problem: str) -> None:
    """Neither an empty entry nor a file, a class or a name that is nowhere passes for a test."""
    assert problems_of({"x": tests}) == [problem]


def test_rules_are_read_only_from_the_table() -> None:
    """Other tables of the page, its head and its prose are no rules."""
    page = f"| a | b |\n\n{RULES_HEADING}\n\n| rule | where |\n|---|---|\n| one `x` | `y` |\n\n## Errors\n\n| c | d |\n"
    assert rules_of(page) == ["one `x`"]
