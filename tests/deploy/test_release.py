"""What a release consists of, besides the program."""

import json
import subprocess
import sys
from pathlib import Path

from k8s_consul_registrar import __version__
from support.files import ROOT


def run(*command: str | Path) -> str:
    """Run a command and return what it prints; fail with what it says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_bill_of_materials_has_every_locked_package() -> None:
    """Name and version of each, the program itself, and the same text each time."""
    command = (sys.executable, ROOT / "scripts" / "sbom.py")
    text = run(*command)
    assert run(*command) == text
    bill = json.loads(text)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["version"] == __version__
    lock = (ROOT / "requirements" / "runtime.txt").read_text().splitlines()
    locked = {tuple(line.split()[0].split("==")) for line in lock if "==" in line.partition("--hash")[0]}
    assert {(one["name"], one["version"]) for one in bill["components"]} == locked
    references = {one["bom-ref"] for one in (*bill["components"], bill["metadata"]["component"])}
    assert {one["ref"] for one in bill["dependencies"]} == references
