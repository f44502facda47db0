"""`make ci-full`: what passed is not run again at the same commit, and a run that takes too long says what it has."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.files import ROOT
from support.waiting import PATIENCE

INTERRUPTED = """
import pathlib, signal, sys, time
# A shell ignores the signal for what it runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    pathlib.Path(sys.argv[1]).write_text("started")
    time.sleep(600)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1]).write_text("interrupted")
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what the script defines."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return runpy.run_path(str(ROOT / "scripts" / "ci_full.py"))


def test_part_that_passed_is_kept_for_its_commit_only(script: dict[str, Any], tmp_path: Path) -> None:
    """Failures are not kept, and neither is anything while files differ from the commit."""
    path = tmp_path / "passed.json"
    passed = script["Passed"](path, "one")
    passed.add("lowest unit", "passed in 3 s")
    passed.add("lowest servers", "FAILED after 4 s")
    again = script["Passed"](path, "one")
    assert (again.get("lowest unit"), again.get("lowest servers")) == ("passed in 3 s", "")
    changed = script["Passed"](path, "")
    changed.add("lowest unit", "passed in 5 s")
    assert changed.get("lowest unit") == ""
    assert script["Passed"](path, "one").get("lowest unit") == "passed in 3 s"
    assert script["Passed"](path, "two").get("lowest unit") == ""


def test_command_that_takes_too_long_is_interrupted(script: dict[str, Any], tmp_path: Path) -> None:
    """So that pytest can name the tests that failed, and end the servers it started."""
    told = tmp_path / "told"
    for seconds in (PATIENCE / 10, PATIENCE):  # on a slow machine it has not begun within the first
        with pytest.raises(subprocess.TimeoutExpired):
            script["run"](sys.executable, "-c", INTERRUPTED, told, seconds=seconds)
        if told.exists():
            break
    assert told.read_text() == "interrupted"


def test_parts_hold_every_folder_of_tests_once(script: dict[str, Any]) -> None:
    """No new folder is left out."""
    chosen = [folder for part in script["parts"]().values() for folder in part]
    assert sorted(chosen) == sorted(
        {f"tests/{path.relative_to(ROOT / 'tests').parts[0]}" for path in (ROOT / "tests").rglob("test_*.py")}
    )
