"""Run the suite in other environments: the lowest versions that pyproject.toml allows, and newer Pythons of Debian.

Each environment is kept under .cache/ci-full and used again. What cannot be made here is skipped, with the reason.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from debian_packages import ROOT, Unavailable, debian_sources

UV = Path(sys.executable).with_name("uv")  # in the repository, so it is in each root folder too
FOLDER = ROOT / ".cache" / "ci-full"
DEBIAN = {"trixie": "3.13", "forky": "3.14"}  # the version of Python in each suite
PACKAGES = "python3,python3-venv,ca-certificates,git,procps"
# debootstrap's script for any suite of today; it has none of its own for suites younger than itself.
ANY_SUITE = Path("/usr/share/debootstrap/scripts/sid")
SLOWEST = 1500  # seconds for one environment's tests
# In a mount namespace of its own: the repository at its own path, and the machine's name servers and authorities.
IN_ROOT = """
set -e
root=$1 repository=$2
shift 2
mkdir -p "$root$repository"
mount --bind "$repository" "$root$repository"
for folder in /proc /sys /dev; do mount --rbind "$folder" "$root$folder"; done
for one in /etc/resolv.conf /etc/ssl/certs; do
    [ -e "$one" ] || continue
    [ -e "$root$one" ] || touch "$root$one"
    mount --bind "$one" "$root$one"
done
exec chroot "$root" sh -c 'cd "$0" && exec "$@"' "$repository" "$@"
"""


def run(*command: str | Path, seconds: float = SLOWEST, env: dict[str, str] | None = None) -> None:
    """Run a command; raises CalledProcessError or TimeoutExpired."""
    subprocess.run(command, cwd=ROOT, check=True, timeout=seconds, env=env)


def suite(python: str | Path, tests: Sequence[str]) -> list[str | Path]:
    """Return the command that runs the tests."""
    return [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not long and not image", *tests]


def with_lowest_versions(tests: Sequence[str]) -> None:
    """Run the tests with the lowest versions of direct dependencies that pyproject.toml allows."""
    venv, floors = FOLDER / "lowest", FOLDER / "lowest.txt"
    python = venv / "bin" / "python"
    FOLDER.mkdir(parents=True, exist_ok=True)
    lowest = ("--resolution", "lowest-direct", "--extra", "sandbox", "--no-header", "--no-annotate")
    run(UV, "pip", "compile", "--quiet", *lowest, "--no-emit-index-url", "pyproject.toml", "-o", floors)
    run(UV, "venv", "--quiet", "--allow-existing", "--python", sys.executable, venv)
    tools = ("-e", ".", "--group", "dev", "--constraint", floors)
    run(UV, "pip", "install", "--quiet", "--python", python, "-r", floors, *tools)
    print(floors.read_text(), end="", flush=True)
    run(*suite(python, tests))


def in_debian(name: str, tests: Sequence[str]) -> None:
    """Run the tests with the Python of a Debian suite, in a root folder made by debootstrap."""
    root, venv = debian_root(name), FOLDER / f"{name}-venv"
    environment = {name: value for name, value in os.environ.items() if name.startswith(("UV_", "SSL_"))}
    environment |= {"UV_CACHE_DIR": str(FOLDER / "uv"), "UV_LINK_MODE": "copy", "LANG": "C.UTF-8"}
    environment |= {"PATH": f"{venv}/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}

    def inside(*command: str | Path) -> None:
        run("unshare", "--mount", "sh", "-c", IN_ROOT, "sh", root, ROOT, *command, env=environment)

    version = f"import sys; assert '%d.%d' % sys.version_info[:2] == '{DEBIAN[name]}', sys.version"
    inside("python3", "-c", version)
    python, locked = venv / "bin" / "python", ROOT / "requirements" / "dev.txt"
    install = (UV, "pip", "install", "--quiet", "--python", python)
    inside(UV, "venv", "--quiet", "--allow-existing", "--python", "/usr/bin/python3", venv)
    inside(*install, "--require-hashes", "-r", locked)
    inside(*install, "--no-deps", "--no-build-isolation", "-e", ".")
    inside(*suite(venv / "bin" / "python", tests))


def debian_root(name: str) -> Path:
    """Return a root folder of a suite, made once; raises Unavailable with the reason."""
    root, partial = FOLDER / name, FOLDER / f"{name}.partial"
    if root.is_dir():
        return root
    if os.geteuid() != 0:
        raise Unavailable("debootstrap and chroot need root")
    if shutil.which("debootstrap") is None:
        raise Unavailable("debootstrap is not installed")
    sources = debian_sources(Path("/etc/apt"))
    if not sources:
        raise Unavailable("apt has no Debian archive here")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    mirror = sources[0].uris.split()[0]
    command = ("debootstrap", "--variant=minbase", f"--include={PACKAGES}", name, partial, mirror, ANY_SUITE)
    with (FOLDER / f"{name}.log").open("wb") as log:  # it names hosts
        done = subprocess.run(command, stdout=log, stderr=log, check=False, timeout=SLOWEST)
    if done.returncode:
        raise Unavailable(f"debootstrap cannot make {name}: {log.name}")
    partial.rename(root)
    return root


def attempt(work: Callable[[], None]) -> str:
    """Run one environment and return its outcome in a word or two."""
    began = time.monotonic()
    try:
        work()
    except Unavailable as error:
        return f"skipped: {error}"
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(error, flush=True)
        return f"FAILED after {time.monotonic() - began:.0f} s"
    return f"passed in {time.monotonic() - began:.0f} s"


def main() -> int:
    """Run the tests in every chosen environment, and list the outcomes."""
    environments: dict[str, Callable[[Sequence[str]], None]] = {"lowest": with_lowest_versions}
    for name in DEBIAN:
        environments[name] = lambda tests, name=name: in_debian(name, tests)  # type: ignore[misc]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=environments, action="append", help="this environment; may be repeated"
    )
    given, tests = parser.parse_known_args()
    outcomes = {
        name: attempt(lambda work=work: work(tests or ["-n", "4"]))  # type: ignore[misc]
        for name, work in environments.items()
        if name in (given.only or environments)
    }
    print("\n".join(f"{name:<8}{outcome}" for name, outcome in outcomes.items()))
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
