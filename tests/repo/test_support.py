"""The helpers of the tests: waiting, ports that no other test is given, and each of them defined once."""

import ast
import asyncio
import re
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import processes as ports
from support.files import PACKAGE, ROOT, TESTS
from support.processes import reserve_block, reserve_ports
from support.waiting import STRETCHES, unless_late, until

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
RESERVE_AND_WAIT = "import sys; from support.processes import reserve_ports; print(*reserve_ports(100), flush=True); sys.stdin.read()"


async def test_until_waits_for_plain_and_async_conditions() -> None:
    """Either kind is asked again until it is true of it."""
    asked: list[int] = []

    def is_third() -> bool:
        asked.append(0)
        return len(asked) == 3

    async def is_sixth() -> bool:
        asked.append(0)
        return len(asked) == 6

    await until(is_third)
    await until(is_sixth)
    assert len(asked) == 6


async def test_until_fails_with_its_context() -> None:
    """The error names what was waited for and shows what there was instead."""
    with pytest.raises(TimeoutError, match=r"not within 0\.05 s: a miracle\nnothing happened"):
        await until(lambda: False, "a miracle", within=0.05, context=lambda: "nothing happened")


async def test_until_ends_a_condition_that_hangs() -> None:
    """The bound holds for one look as well as for many."""
    with pytest.raises(TimeoutError, match=r"not within 0\.05 s"):
        await until(lambda: asyncio.sleep(60), within=0.05)


@pytest.mark.parametrize(
    ("by", "fails", "attempts"), [(60.0, 1, [1]), (0.1, 0, [1]), (0.1, 2, [1, 2, 4]), (0.1, 9, [*STRETCHES])]
)
async def test_failure_counts_unless_the_loop_was_late(by: float, fails: int, attempts: list[int]) -> None:
    """Where it was late the attempt is made again with longer times, and the last one counts in any case."""
    made: list[int] = []

    async def attempt(stretch: int) -> None:
        made.append(stretch)
        await asyncio.sleep(0)
        time.sleep(0.2)  # noqa: ASYNC251 - stands for a machine that is busy with something else
        assert len(made) > fails

    try:
        await unless_late(attempt, by=by)
        is_passed = True
    except AssertionError:
        is_passed = False
    assert (made, is_passed) == (attempts, len(attempts) > fails)


def test_ports_are_distinct_free_and_not_handed_out_by_the_system() -> None:
    """Each can be bound, whatever connections the machine has open."""
    found = reserve_ports(40)
    assert len({*found, *reserve_ports(40)}) == 80
    if ports._EPHEMERAL.exists():
        first, last = map(int, ports._EPHEMERAL.read_text().split())
        assert not any(first <= port <= last for port in found)
    for port in found:
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_ports_of_a_process_are_no_others() -> None:
    """Several processes at once are given ports of their own, and a block is free again after its process."""
    running = [
        subprocess.Popen(
            (sys.executable, "-c", RESERVE_AND_WAIT),
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        given = [
            [int(port) for port in process.stdout.readline().split()] for process in running if process.stdout
        ]
        assert len({port for each in given for port in each} | set(reserve_ports(100))) == 400
        first = given[0][0] - (given[0][0] - ports._candidates().start) % ports._BLOCK
        assert reserve_block(first) is None
    finally:
        for process in running:
            process.communicate()
    reservation = reserve_block(first)
    assert reservation is not None
    reservation.close()


def definitions() -> Iterator[tuple[Path, Definition]]:
    """Yield every function and class at the top of a file of the tests, but for tests and fixtures."""
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_test = isinstance(node, Definition) and node.name.lower().startswith("test")
            if isinstance(node, Definition) and not is_test and "fixture" not in decorators(node):
                yield path.relative_to(TESTS), node


def decorators(node: Definition) -> str:
    """Return the decorators as they are written."""
    return " ".join(map(ast.unparse, node.decorator_list))


def content_of(node: Definition) -> str:
    """Return what is defined, without its name, its docstrings and the types of its arguments."""
    (copy,) = ast.parse(ast.unparse(node)).body
    assert isinstance(copy, Definition)
    copy.name = ""
    for each in ast.walk(copy):
        if isinstance(each, ast.arg):
            each.annotation = None
        if isinstance(each, Definition) and ast.get_docstring(each) is not None:
            each.body = each.body[1:]
    return (
        ast.unparse(copy)
        if isinstance(copy, ast.ClassDef)
        else "\n".join(map(ast.unparse, [copy.args, *copy.body]))
    )


def test_helper_of_any_name_is_written_once() -> None:
    """Two files that need the same statements share them in tests/support; a single one may be repeated."""
    found = defaultdict(list)
    for path, node in definitions():
        found[content_of(node)].append(f"{path}::{node.name}")
    twice = [where for content, where in found.items() if len(where) > 1 and content.count("\n") > 1]
    assert twice == []


def test_name_of_a_shared_helper_has_one_meaning() -> None:
    """No two modules of tests/support define one name, and nothing else is called `until` or `Clock`."""
    places = defaultdict(list)
    for path, node in definitions():
        if (path.parts[0] == "support" and not node.name.startswith("_")) or node.name in ("until", "Clock"):
            places[node.name].append(str(path))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_folders_of_the_tests_are_the_packages() -> None:
    """Below `unit` and `servers` each folder is named after the package whose parts it tests."""
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    folders = {path.parent.name for top in ("unit", "servers") for path in TESTS.glob(f"{top}/*/test_*.py")}
    assert folders
    assert folders - packages == set()


def test_every_test_is_in_a_folder_that_the_architecture_explains() -> None:
    """docs/architecture.md lists the folders of the tests, and no test is outside of them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `([a-z0-9]+)/(?:<package>/)?` \|", page, re.MULTILINE))
    assert explained
    assert {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")} == explained - {"support"}
