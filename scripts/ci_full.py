"""Run the suite in other environments: the lowest versions that pyproject.toml allows, and newer Pythons of Debian.

Each environment runs the tests in parts, the quick ones of all environments first. A part that passed is not run again
at the same commit, so that a run which was interrupted goes on where it ended. Root folders are kept under
.cache/ci-full. What cannot be made here is skipped, with the reason.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from debian_packages import ROOT, Unavailable, debian_sources

UV = Path(sys.executable).with_name("uv")  # in the repository, so it is in each root folder too
CACHE = ROOT / ".cache"
FOLDER = CACHE / "ci-full"
PASSED = FOLDER / "passed.json"
DEBIAN = {"trixie": "3.13", "forky": "3.14"}  # the version of Python in each suite
PACKAGES = "python3,python3-venv,ca-certificates,curl,git,jq,make,procps"
# debootstrap's script for any suite of today; it has none of its own for suites younger than itself.
ANY_SUITE = Path("/usr/share/debootstrap/scripts/sid")
SLOWEST = 1500  # seconds for one part of one environment
LAST_WORDS = 60  # seconds for pytest to report after it was interrupted
# These machines are shared and slow: tests wait longer before they give up (tests/support/waiting.py).
PATIENCE = {"PATIENCE_FACTOR": os.environ.get("PATIENCE_FACTOR", "3")}
# In a mount namespace of its own: the repository and what it leads to at their own paths, and the machine's name servers
# and authorities.
IN_ROOT = """
set -e
root=$1
shift
while [ "$1" != -- ]; do
    mkdir -p "$root$1"
    mount --bind "$1" "$root$1"
    shift
done
repository=$2
shift 2
for folder in /proc /sys /dev; do mount --rbind "$folder" "$root$folder"; done
for one in /etc/resolv.conf /etc/ssl/certs; do
    [ -e "$one" ] || continue
    [ -e "$root$one" ] || touch "$root$one"
    mount --bind "$one" "$root$one"
done
exec chroot "$root" sh -c 'cd "$0" && exec "$@"' "$repository" "$@"
"""

Run = Callable[..., None]


def run(*command: str | Path, seconds: float = SLOWEST, env: dict[str, str] | None = None) -> None:
    """Run a command; raises CalledProcessError or TimeoutExpired.

    A command that takes too long is interrupted first, so that pytest says which tests failed and ends its servers.
    """
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code, command)


def git(*arguments: str) -> str:
    """Return what Git prints, nothing where it fails."""
    done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout


def suite(python: Path, tests: Sequence[str]) -> list[str | Path]:
    """Return the command that runs the tests."""
    options = ("-q", "-n", "4", "-p", "no:cacheprovider", "-m", "not long and not image")
    return [python, "-m", "pytest", *options, *tests]


def parts() -> dict[str, list[str]]:
    """Return the folders of the tests in parts by name."""
    folders = sorted(one.name for one in (ROOT / "tests").iterdir() if next(one.rglob("test_*.py"), None))
    rest = [name for name in folders if name not in ("unit", "servers")]
    return {"unit": ["tests/unit"], "servers": ["tests/servers"], "rest": [f"tests/{name}" for name in rest]}


def with_lowest_versions(do: Run) -> Path:
    """Make an environment with the lowest versions of direct dependencies that pyproject.toml allows."""
    venv, floors = FOLDER / "lowest", FOLDER / "lowest.txt"
    python = venv / "bin" / "python"
    lowest = ("--resolution", "lowest-direct", "--extra", "sandbox", "--no-header", "--no-annotate")
    do(UV, "pip", "compile", "--quiet", *lowest, "--no-emit-index-url", "pyproject.toml", "-o", floors)
    do(UV, "venv", "--quiet", "--clear", "--python", sys.executable, venv)
    tools = ("-e", ".", "--group", "dev", "--constraint", floors)
    do(UV, "pip", "install", "--quiet", "--python", python, "-r", floors, *tools)
    print(floors.read_text(), end="", flush=True)
    return python


def with_python_of(name: str, do: Run) -> Path:
    """Make an environment with the locked versions and the Python of a Debian suite."""
    venv = FOLDER / f"{name}-venv"
    python = venv / "bin" / "python"
    version = f"import sys; assert '%d.%d' % sys.version_info[:2] == '{DEBIAN[name]}', sys.version"
    do("python3", "-c", version)
    install = (UV, "pip", "install", "--quiet", "--python", python)
    do(UV, "venv", "--quiet", "--clear", "--python", "/usr/bin/python3", venv)
    do(*install, "--require-hashes", "-r", ROOT / "requirements" / "dev.txt")
    do(*install, "--no-deps", "--no-build-isolation", "-e", ".")
    return python


def on_this_machine(*command: str | Path) -> None:
    """Run a command as it is."""
    run(*command, env={**os.environ, **PATIENCE})


def in_debian(name: str) -> Run:
    """Return what runs a command in the root folder of a Debian suite."""
    root = debian_root(name)
    env = {name: value for name, value in os.environ.items() if name.startswith(("UV_", "SSL_"))}
    env |= {"UV_CACHE_DIR": str(FOLDER / "uv"), "UV_LINK_MODE": "copy", "LANG": "C.UTF-8", "HOME": "/root"}
    env |= {"PATH": f"{FOLDER / f'{name}-venv'}/bin:/usr/sbin:/usr/bin:/sbin:/bin", **PATIENCE}
    into = ("unshare", "--mount", "sh", "-c", IN_ROOT, "sh", root, *mounted(), "--", ROOT)
    return lambda *command: run(*into, *command, env=env)


def mounted() -> list[Path]:
    """Return the repository, and the folders elsewhere that it leads to: a worktree's Git folder, linked caches."""
    shared = git("rev-parse", "--path-format=absolute", "--git-common-dir").splitlines()
    led_to = [*CACHE.iterdir(), *map(Path, shared)]
    elsewhere = {path for one in led_to if not (path := one.resolve()).is_relative_to(ROOT) and path.is_dir()}
    return [ROOT, *sorted(elsewhere)]


def debian_root(name: str) -> Path:
    """Return a root folder of a suite, made once for these packages; raises Unavailable with the reason."""
    root, partial, held = FOLDER / name, FOLDER / f"{name}.partial", FOLDER / f"{name}.packages"
    if os.geteuid() != 0:
        raise Unavailable("debootstrap and chroot need root")
    if root.is_dir() and held.exists() and held.read_text() == PACKAGES:
        return root
    if shutil.which("debootstrap") is None:
        raise Unavailable("debootstrap is not installed")
    sources = debian_sources(Path("/etc/apt"))
    if not sources:
        raise Unavailable("apt has no Debian archive here")
    for folder in (root, partial):
        shutil.rmtree(folder, ignore_errors=True)
    mirror = sources[0].uris.split()[0]
    # In a mount namespace of its own: what it mounts in the folder goes with it, however it ends.
    into = ("unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={PACKAGES}")
    command = (*into, name, partial, mirror, ANY_SUITE)
    with (FOLDER / f"{name}.log").open("wb") as log:  # it names hosts
        done = subprocess.run(command, stdout=log, stderr=log, check=False, timeout=SLOWEST)
    if done.returncode:
        raise Unavailable(f"debootstrap cannot make {name}: {log.name}")
    partial.rename(root)
    held.write_text(PACKAGES)
    return root


class Leg:
    """One environment, made when it is first needed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._suite: Callable[[Sequence[str]], None] | None = None

    def test(self, tests: Sequence[str]) -> None:
        """Run tests in it; raises Unavailable, CalledProcessError or TimeoutExpired."""
        if self._suite is None:
            do = in_debian(self.name) if self.name in DEBIAN else on_this_machine
            python = with_python_of(self.name, do) if self.name in DEBIAN else with_lowest_versions(do)
            self._suite = lambda chosen: do(*suite(python, chosen))
        self._suite(tests)


def attempt(work: Callable[[], None]) -> str:
    """Run one part of one environment and return its outcome in a word or two."""
    began = time.monotonic()
    try:
        work()
    except Unavailable as error:
        return f"skipped: {error}"
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(error, flush=True)
        return f"FAILED after {time.monotonic() - began:.0f} s"
    return f"passed in {time.monotonic() - began:.0f} s"


class Passed:
    """The parts that passed at one commit, kept in a file; none where files differ from the commit."""

    def __init__(self, path: Path, commit: str) -> None:
        self._path, self._commit = path, commit
        kept = json.loads(path.read_text()) if path.exists() else {}
        self._outcomes: dict[str, str] = kept.get(commit, {}) if commit else {}

    def get(self, part: str) -> str:
        """Return how a part passed, empty if it did not."""
        return self._outcomes.get(part, "")

    def add(self, part: str, outcome: str) -> None:
        """Keep an outcome if it is one of a part that passed; those of other commits go."""
        if self._commit and outcome.startswith("passed"):
            self._outcomes[part] = outcome
            self._path.write_text(json.dumps({self._commit: self._outcomes}, indent=1))


def commit() -> str:
    """Return the commit of the files as they are, empty if they differ from it."""
    return "" if git("status", "--porcelain") else git("rev-parse", "HEAD").strip()


def main() -> int:
    """Run the tests in every chosen environment, and list the outcomes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    names = ("lowest", *DEBIAN)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=names, action="append", help="this environment; may be repeated")
    given, chosen = parser.parse_known_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    passed = Passed(PASSED, "" if chosen else commit())
    legs = [Leg(name) for name in names if name in (given.only or names)]
    outcomes: dict[str, str] = {}
    for part, tests in ({"chosen": chosen} if chosen else parts()).items():
        for leg in legs:
            name = f"{leg.name} {part}"
            outcomes[name] = passed.get(name) or attempt(lambda leg=leg, tests=tests: leg.test(tests))
            passed.add(name, outcomes[name])
            print(f"== {name}: {outcomes[name]}", flush=True)
    print("\n".join(f"{name:<16}{outcome}" for name, outcome in outcomes.items()))
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
