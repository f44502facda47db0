"""The file of saved targets: when it is written, how, and when what it holds may be served."""

import asyncio
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k8s_consul_registrar.admin.replacement import check_folder
from k8s_consul_registrar.admin.saved_state import MAX_AGE, SavedState, decode_state
from k8s_consul_registrar.admin.state_file import (
    SETTING,
    SavedTargetsGate,
    StateKeeper,
    open_state,
    read_state,
)
from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.model import Kind, Source
from support.builders import make_pod
from support.controller_lab import WIRING, Seen
from support.memory import NODES, PODS
from support.seen import pod_target
from support.waiting import PATIENCE, SLACK, Clock
from unit.admin.test_saved_state import encoded

ORIGIN = WIRING.origin


def keeper_of(seen: Seen, path: Path, clock: Clock | None = None, every: float = 0.01) -> StateKeeper:
    """Return a keeper that looks all the time."""
    return StateKeeper(
        path,
        ORIGIN,
        seen.view,
        is_settled=lambda: seen.selection.is_settled,
        every=every,
        wall_clock=clock or time.time,
    )


def content_of(path: Path) -> dict[str, Any]:
    """Return what a file holds."""
    read: dict[str, Any] = json.loads(path.read_bytes())
    return read


def names(folder: Path) -> list[str]:
    """Return what is in a folder."""
    return [one.name for one in folder.iterdir()]


def pods_of(path: Path) -> set[str]:
    """Return the Pods that a file holds targets of."""
    return {one["object"] for one in content_of(path)["targets"]}


async def test_complete_targets_are_saved_and_again_as_they_change(tmp_path: Path) -> None:
    """Nothing is saved before everything was listed; afterwards the file follows, readable by its owner only."""
    seen, path = Seen(sources=(NODES, PODS)), tmp_path / "state.json"
    saving = asyncio.create_task(keeper_of(seen, path).run())
    try:
        async with seen.lab.running():
            seen.lab.cluster.put_list([make_pod("a")], PODS)
            await seen.lab.until("a")
            await asyncio.sleep(0.1)
            assert not path.exists()
            await seen.learn()
            seen.lab.cluster.put_list([], NODES)
            await seen.lab.until_so(path.exists)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            await seen.lab.until_so(lambda: content_of(path)["cluster_uid"] == "uid-1")
            first = path.stat().st_ino
            seen.lab.cluster.put(make_pod("b", ip="198.51.100.11"))
            await seen.lab.until_so(lambda: pods_of(path) == {"a", "b"})
            assert path.stat().st_ino != first, "it is replaced, never written in place"
    finally:
        saving.cancel()
    assert names(tmp_path) == [path.name]
    saved = read_state(path, ORIGIN, time.time())
    assert saved is not None
    assert {one.key.name for one in saved.targets()} == {"a", "b"}


async def test_unchanged_targets_are_not_written_again(tmp_path: Path) -> None:
    """Neither looking again nor a change that no target shows replaces the file, until it becomes old."""
    seen, path, clock = Seen(), tmp_path / "state.json", Clock(follows=time.time)
    keeper = keeper_of(seen, path, clock)
    seen.lab.cluster.put_list([make_pod("a")])
    await keeper.save()
    first = path.stat().st_ino
    seen.lab.cluster.store.start_listing(PODS, 1.0)
    seen.lab.desired.generation += 1
    await keeper.save()
    assert path.stat().st_ino == first
    clock.offset = 301.0
    await keeper.save()
    assert path.stat().st_ino != first
    assert content_of(path)["written_at"] > time.time() + 299


async def test_last_save_is_of_the_end(tmp_path: Path) -> None:
    """A process that ends in order saves once more, and nothing where it never knew everything."""
    seen, path = Seen(), tmp_path / "state.json"
    await keeper_of(seen, path).save_at_end()
    assert not path.exists()
    seen.lab.cluster.put_list([make_pod("a")])
    keeper = keeper_of(seen, path)
    await keeper.save_at_end()
    before = content_of(path)["written_at"]
    await keeper.save_at_end()
    assert content_of(path)["written_at"] > before


async def test_file_is_as_old_as_what_is_known(tmp_path: Path) -> None:
    """While the API server is away, saved targets do not become younger; then they are not saved at all."""
    seen, path, clock = Seen(), tmp_path / "state.json", Clock(follows=time.time)
    keeper = StateKeeper(
        path,
        ORIGIN,
        seen.view,
        is_settled=lambda: seen.selection.is_settled,
        wall_clock=clock,
        clock=lambda: time.monotonic() + clock.offset,
    )
    seen.lab.cluster.put_list([make_pod("a")])
    seen.lab.cluster.store.fail(PODS, "no connection", "unreachable")
    clock.offset = 600.0
    await keeper.save()
    assert content_of(path)["written_at"] == pytest.approx(time.time(), abs=5)
    seen.lab.cluster.put(make_pod("b"))
    clock.offset = MAX_AGE + 1
    await keeper.save()
    assert pods_of(path) == {"a"}


PUTS: tuple[Callable[[Path], None], ...] = (
    Path.mkdir,
    os.mkfifo,
    lambda path: path.symlink_to("/dev/null"),
)


async def test_failed_save_leaves_the_file_and_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that went away, and whatever is no file in the file's place, end nothing and are never replaced."""
    folder = tmp_path / "folder"
    folder.mkdir()
    seen, path = Seen(), folder / "state.json"
    seen.lab.cluster.put_list([make_pod("a")])
    keeper = keeper_of(seen, path)
    folder.rename(tmp_path / "away")
    await keeper.save()
    assert "targets cannot be saved" in capsys.readouterr().out
    folder.mkdir()
    for put in PUTS:
        put(path)
        kind = stat.S_IFMT(path.lstat().st_mode)
        await keeper.save(new_enough=0)
        assert stat.S_IFMT(path.lstat().st_mode) == kind
        assert names(folder) == [path.name], "nothing is left beside it"
        path.rmdir() if stat.S_ISDIR(kind) else path.unlink()
    await keeper.save()
    assert pods_of(path) == {"a"}
    assert "targets are saved again" in capsys.readouterr().out


async def test_save_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    """The temporary file goes, and the file stays whole."""
    seen, path = Seen(), tmp_path / "state.json"
    seen.lab.cluster.put_list(
        [make_pod(f"p{number}", ip=f"198.51.100.{number % 250}", uid=str(number)) for number in range(600)]
    )
    for turns in range(12):
        saving = asyncio.create_task(keeper_of(seen, path).save())
        for _ in range(turns):
            await asyncio.sleep(0)
        saving.cancel()
        await asyncio.wait({saving})
        assert set(names(tmp_path)) <= {path.name}
        if path.exists():
            assert len(pods_of(path)) == 600


def _symlink(path: Path) -> None:
    target = path.with_suffix(".real")
    target.write_bytes(encoded([pod_target("a")], at=time.time(), origin=ORIGIN))
    path.symlink_to(target)


def _gigabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


@pytest.mark.parametrize(
    "put",
    [
        pytest.param(os.mkfifo, id="fifo"),
        pytest.param(Path.mkdir, id="directory"),
        pytest.param(_symlink, id="symlink"),
        pytest.param(lambda path: path.symlink_to(path.parent / "nowhere"), id="dangling symlink"),
        pytest.param(_gigabyte, id="a gigabyte"),
        pytest.param(lambda path: path.write_bytes(b"garbage"), id="garbage"),
        pytest.param(lambda path: path.write_bytes(b"[" * 1_000_000), id="deep"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
    ],
)
def test_file_that_cannot_be_used_is_ignored_with_a_line(
    put: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It neither ends the start nor holds it up."""
    path = tmp_path / "state.json"
    put(path)
    began = time.monotonic()
    assert open_state(path, ORIGIN) is None
    assert time.monotonic() - began < SLACK
    shown = capsys.readouterr().out
    assert "saved targets are not used" in shown
    assert "HTTP_SD_STATE_FILE" in shown


def test_folder_that_cannot_be_written_is_told_by_its_setting(tmp_path: Path) -> None:
    """Nothing could ever be saved, so the start fails."""
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "missing", tmp_path / "file", Path("/proc/self")):
        with pytest.raises(AccessError, match=r"HTTP_SD_STATE_FILE: cannot write in"):
            check_folder(folder / "state.json", SETTING)
    check_folder(tmp_path / "state.json", SETTING)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """Old temporary files of this file go; fresh ones may be another replica's, and others' are others'."""
    path = tmp_path / "state.json"
    old, fresh, other = (tmp_path / name for name in (".state.json.tmp-a", ".state.json.tmp-b", ".x.tmp-a"))
    for one in (old, fresh, other):
        one.write_text("x")
    for one in (old, other):
        os.utime(one, (1.0, 1.0))
    assert open_state(path, ORIGIN) is None
    assert {one.name for one in tmp_path.iterdir()} == {fresh.name, other.name}


def saved_state(*, at: float | None = None, uid: str = "uid-1") -> SavedState:
    """Return one saved target."""
    now = time.time() if at is None else at
    return decode_state(encoded([pod_target("a")], at=now, uid=uid, origin=ORIGIN), ORIGIN, now)


@pytest.mark.parametrize(
    ("file_uid", "own_uid", "is_served"),
    [
        ("uid-1", "uid-1", True),
        ("uid-1", "uid-2", False),
        ("uid-1", None, True),
        ("", None, True),
        ("", "uid-1", False),
    ],
)
async def test_saved_targets_are_served_for_their_cluster(
    file_uid: str, own_uid: str | None, is_served: bool
) -> None:
    """For the same cluster, or while it cannot be asked; for another one never again."""
    seen = Seen()
    gate = SavedTargetsGate(saved_state(uid=file_uid), seen.view, seen.cluster_uid)
    assert gate.current() is None, "nobody asked yet"
    await seen.learn(own_uid)
    assert (gate.current() is not None) is is_served
    await seen.learn(None)
    assert (gate.current() is not None) is is_served


async def test_api_server_that_never_answers_cannot_be_asked() -> None:
    """After a while saved targets are served without its word."""
    seen, now = Seen(), 100.0
    gate = SavedTargetsGate(saved_state(), seen.view, seen.cluster_uid, clock=lambda: now)
    assert gate.current() is None
    now = 103.0
    assert gate.current() is not None


async def test_saved_targets_end_with_the_first_complete_list_and_with_their_age() -> None:
    """Once every source was listed they are dropped for good; so they are when they become too old."""
    seen, clock = Seen(sources=(Source(Kind.NODE), PODS)), Clock(follows=time.time)
    gate = SavedTargetsGate(saved_state(), seen.view, seen.cluster_uid, wall_clock=clock)
    await seen.learn()
    seen.lab.cluster.put_list([make_pod("a")])
    assert gate.current() is not None, "Nodes are not listed"
    clock.offset = MAX_AGE + 5
    assert gate.current() is None
    clock.offset = 0.0
    assert gate.current() is None
    again = SavedTargetsGate(saved_state(), seen.view, seen.cluster_uid)
    running = asyncio.create_task(again.run())
    seen.lab.cluster.put_list([], NODES)
    await asyncio.wait_for(running, PATIENCE)
    assert again.current() is None


HANGING = """
import asyncio, threading
from k8s_consul_registrar.admin import replacement

replacement.HUNG_AFTER = 0.1

async def save() -> None:
    async with asyncio.timeout(0.2):
        await replacement.in_thread(threading.Event().wait)

try:
    asyncio.run(save())
except TimeoutError:
    print("given up")
"""


def test_file_system_that_hangs_does_not_keep_the_process_from_ending() -> None:
    """The thread that is stuck in it ends with the process."""
    ended = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, "given up"), ended.stderr
