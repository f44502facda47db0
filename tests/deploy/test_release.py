"""The parts of a release besides the program."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.long
def test_release_installs_and_runs_in_an_empty_environment(tmp_path: Path) -> None:
    """The wheel runs with its locked dependencies and nothing else, and every file has its checksum."""
    pytest.importorskip("helm_python", reason="Helm is not installed: make chart-tools")
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".venv", ".cache", ".git", "*_cache", "dist")
    shutil.copytree(ROOT, copy, ignore=left_out, symlinks=True)
    run(sys.executable, copy / "scripts" / "release.py")
    dist = copy / "dist"
    names = {path.name for path in dist.iterdir()}
    assert names == {
        f"k8s_consul_registrar-{__version__}.tar.gz",
        f"k8s_consul_registrar-{__version__}-py3-none-any.whl",
        f"k8s-consul-registrar-{__version__}.tgz",
        "sbom.cdx.json",
        "SHA256SUMS",
    }
    for line in (dist / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((dist / name).read_bytes()).hexdigest() == digest
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty")
    python = tmp_path / "empty" / "bin" / "python"
    uv = Path(sys.executable).with_name("uv")
    lock = ROOT / "requirements" / "runtime.txt"
    run(uv, "pip", "install", "--python", python, "--quiet", "--require-hashes", "-r", lock)
    wheel = next(dist.glob("*.whl"))
    run(uv, "pip", "install", "--python", python, "--quiet", "--no-deps", wheel)
    assert __version__ in run(python.with_name("k8s-consul-registrar"), "--version")
