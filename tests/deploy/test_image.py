"""The image: built from the Dockerfile without a daemon, and run as the manifests have it run."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k8s_consul_registrar import __version__
from support.files import ROOT

pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root"),
    pytest.mark.skipif(shutil.which("buildah") is None, reason="buildah is not installed (apt)"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="debootstrap is not installed (apt)"),
]

USER = 65532
LARGEST = 60 << 20  # bytes that the image adds to its base
# As a Pod has it: nothing of the root file system can be written. The base's own commands may be missing.
READ_ONLY = """
set -e
mount --bind "$1" "$1"
mount -o remount,ro,bind "$1"
mount --bind /proc "$1/proc"
exec chroot --userspec={user}:{user} "$@"
""".replace("{user}", str(USER))
# What a process of the image could write, by the modes of files: /proc is the host's.
WRITABLE = """
import os, stat
for folder, folders, files in os.walk("/"):
    folders[:] = [one for one in folders if os.path.join(folder, one) not in ("/proc", "/sys", "/dev")]
    for path in (os.path.join(folder, one) for one in (*folders, *files)):
        found = os.lstat(path)
        loose = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
        if not stat.S_ISLNK(found.st_mode) and (found.st_uid == 65532 or found.st_gid == 65532 or loose):
            print(path)
"""


def run(*command: str | Path, seconds: float = 900) -> str:
    """Run a command and return what it prints; fail with what it says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder for everything, which is removed with it."""
    folder = tmp_path_factory.mktemp("image")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """Return a root folder with Python and nothing of this project."""
    packages = "python3,python3-venv,ca-certificates"
    root = folder / "base"
    done = subprocess.run(
        ("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", root),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"debootstrap cannot make a base here: {done.stdout[-300:]}")
    return root


@pytest.fixture(scope="module")
def image(folder: Path, base: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Return the root folder and the configuration of the image."""
    storage = ("--storage-driver=vfs", f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}")
    buildah = ("buildah", *storage)
    container = run(*buildah, "from", "scratch").strip()
    run(*buildah, "add", "--quiet", container, base, "/")
    run(*buildah, "commit", "--quiet", container, "localhost/base:1")
    given = [f"--env={name}" for name in os.environ if name.startswith("PIP_") and name != "PIP_FIND_LINKS"]
    run(
        *(*buildah, "build", "--isolation=chroot", "--build-arg=BASE=localhost/base:1", "--pull=never"),
        *("--volume=/etc/ssl/certs:/etc/ssl/certs:ro", *given, "--build-arg=REVISION=abc"),
        *("--tag=localhost/registrar:1", ROOT),
    )
    built = run(*buildah, "from", "--pull=never", "localhost/registrar:1").strip()
    inspected = json.loads(run(*buildah, "inspect", "--type=image", "localhost/registrar:1"))
    mounted = Path(run(*buildah, "mount", built).strip())
    yield mounted, inspected["OCIv1"]["config"]
    run(*buildah, "umount", built)


def in_image(root: Path, *command: str) -> str:
    """Run a command in the image as its user, with a root that is read-only."""
    environment = ("env", "-i", "PYTHONDONTWRITEBYTECODE=1", "PATH=/opt/app/bin:/usr/bin")
    return run("unshare", "--mount", "sh", "-c", READ_ONLY, "sh", root, *environment, *command, seconds=120)


def test_configuration_says_who_and_what(image: tuple[Path, dict[str, Any]]) -> None:
    """A numbered user, the program as entry point, and the OCI labels."""
    _, config = image
    assert (config["User"], config["Entrypoint"]) == (f"{USER}:{USER}", ["k8s-consul-registrar"])
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels.items() >= {"version": __version__, "revision": "abc", "licenses": "Apache-2.0"}.items()


def test_program_runs_and_imports_only_bytecode(image: tuple[Path, dict[str, Any]]) -> None:
    """No module of either mode is compiled at its start."""
    root, _ = image
    assert __version__ in in_image(root, "k8s-consul-registrar", "--version")
    script = """
import importlib.util, os, sys, k8s_consul_registrar.wiring, k8s_consul_registrar.commands.proxy
for name, module in sorted(sys.modules.items()):
    origin = getattr(getattr(module, "__spec__", None), "origin", None) or ""  # "frozen" is compiled into Python
    if origin.endswith(".py") and not os.path.exists(importlib.util.cache_from_source(origin)):
        print(name)
"""
    assert in_image(root, "python3", "-c", script) == ""


def test_image_has_nothing_to_build_or_install_with(image: tuple[Path, dict[str, Any]]) -> None:
    """No compiler and no pip, neither as a command nor as a module."""
    root, _ = image
    for name in ("cc", "gcc", "g++", "clang", "make", "pip", "pip3"):
        assert not list(root.glob(f"usr/bin/{name}")) + list(root.glob(f"opt/app/bin/{name}")), name
    script = "import importlib.util as u; print([n for n in ('pip', 'ensurepip') if u.find_spec(n)])"
    assert in_image(root, "python3", "-c", script).strip() == "[]"


def test_no_file_of_the_image_is_its_user_s(image: tuple[Path, dict[str, Any]]) -> None:
    """Nothing could be written even on a root that is not read-only, but for folders like /tmp."""
    root, _ = image
    assert in_image(root, "python3", "-c", WRITABLE) == ""


def test_image_adds_little_to_its_base(base: Path, image: tuple[Path, dict[str, Any]]) -> None:
    """The program, its libraries and bytecode."""
    root, _ = image
    added = size(root) - size(base)
    assert added < LARGEST


def test_bill_of_materials_is_in_the_image(image: tuple[Path, dict[str, Any]]) -> None:
    """A scanner finds it without the repository."""
    root, _ = image
    bill = json.loads((root / "opt" / "app" / "sbom.cdx.json").read_text())
    assert bill["metadata"]["component"]["version"] == __version__


def size(root: Path) -> int:
    """Return the bytes of all files."""
    return sum(path.lstat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
