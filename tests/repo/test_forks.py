"""Forks of the program: processes like those that are started the usual way."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.files import TESTS
from support.forks import COMMAND, can_fork
from support.processes import Program, is_running
from support.waiting import PATIENCE, until

QUIET = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
BY_A_START = {**QUIET, "PYTHONDONTWRITEBYTECODE": "1"}
NOWHERE = ("fetch-targets", "http://127.0.0.1:1/sd/targets", "--output")
STARTS_AND_WAITS = f"""
import sys
from pathlib import Path
from support.processes import Program
folder = Path(sys.argv[1])
program = Program({[*COMMAND, *NOWHERE]} + [str(folder / "x.json")], folder / "log", environment={QUIET})
program.launch()
print(program.pid, flush=True)
sys.stdin.read()
"""


async def ended(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run the program to its end; return its exit code and output."""
    program = Program([*COMMAND, *arguments], folder / "log", environment=environment)
    program.launch()
    try:
        return await program.ended(PATIENCE), program.output()
    finally:
        await program.stop(signal.SIGKILL)
        program.log.unlink()


def test_only_the_program_with_the_usual_python_is_forked() -> None:
    """Another program, or variables that Python reads as it starts, need a start."""
    assert can_fork([*COMMAND, "plan"], QUIET)
    assert not can_fork([*COMMAND, "plan"], BY_A_START)
    assert not can_fork([*COMMAND[:2], "k8s_consul_registrar.sandbox"], QUIET)
    assert not can_fork(["/bin/sh", "-c", "true"], QUIET)


@pytest.mark.parametrize(
    "given", [("--version",), ("plan", "--cluster-name=lab"), ("registrar", "--nope"), ("settings",)], ids=str
)
async def test_fork_says_and_returns_what_a_start_does(tmp_path: Path, given: tuple[str, ...]) -> None:
    """Arguments and variables reach it, nothing of the tests' own does, and its exit code comes back."""
    forked = await ended(tmp_path, *given, **QUIET)
    assert forked == await ended(tmp_path, *given, **BY_A_START)
    assert forked[1]


async def test_fork_has_its_own_variables(tmp_path: Path) -> None:
    """One start leaves nothing to the next."""
    assert "INSTANCE" in (await ended(tmp_path, "plan", **QUIET, INSTANCE="x" * 51))[1]
    assert "INSTANCE" not in (await ended(tmp_path, "plan", **QUIET))[1]


async def test_fork_is_killed_by_its_group(tmp_path: Path) -> None:
    """A signal that the program does not survive is its exit code."""
    log = tmp_path / "log"
    program = Program([*COMMAND, *NOWHERE, str(tmp_path / "x.json")], log, environment=QUIET)
    program.launch()
    await until(program.output)
    assert program.is_running
    assert os.getpgid(program.pid) == program.pid
    program.send(signal.SIGKILL)
    assert await program.ended(PATIENCE) == -signal.SIGKILL
    await program.stop()


def test_forks_end_with_the_tests(tmp_path: Path) -> None:
    """A test run that is killed leaves none behind."""
    with subprocess.Popen(
        (sys.executable, "-c", STARTS_AND_WAITS, str(tmp_path)),
        cwd=TESTS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as tests:
        try:
            assert tests.stdout is not None
            pid = int(tests.stdout.readline())
            assert is_running(pid)
        finally:
            tests.kill()
    asyncio.run(until(lambda: not is_running(pid)))
