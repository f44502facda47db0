"""The file of FILE_SD_PATH: when it is written, what stays in it, and what becomes of failures."""

import asyncio
import json
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from k8s_consul_registrar.admin import replacement
from k8s_consul_registrar.admin.documents import Documents
from k8s_consul_registrar.admin.file_sd import FileSd, groups_before, groups_by_id
from k8s_consul_registrar.admin.target_groups import GroupEncoder
from k8s_consul_registrar.errors import AccessError, SettingsError
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.rotating import LoadStatus
from k8s_consul_registrar.settings.reading import read_registrar
from support.builders import make_pod
from support.controller_lab import Seen
from support.memory import NODES, PODS
from support.odd_inputs import full_disk
from support.seen import pod_target
from support.waiting import Clock, until


def ids_in(path: Path) -> set[str]:
    """Return the service IDs of the groups in a file, as a collector decodes it."""
    return {group["labels"]["__meta_consul_service_id"] for group in json.loads(path.read_bytes())}


def names(folder: Path) -> list[str]:
    """Return what is in a folder."""
    return [one.name for one in folder.iterdir()]


def writer(
    seen: Seen,
    path: Path,
    *,
    before: Mapping[str, bytes] | None = None,
    clock: Clock | None = None,
    **brake: bool,
) -> FileSd:
    """Return a writer; `before` is what an earlier process left, otherwise nothing."""
    return FileSd(
        path,
        seen.view,
        Documents(seen.view, GroupEncoder()),
        before=before or {},
        brake=BrakeRules(confirm_start=600, **brake),
        clock=clock or time.monotonic,
    )


@asynccontextmanager
async def running(file: FileSd) -> AsyncIterator[None]:
    """Let a writer run."""
    task = asyncio.create_task(file.run())
    try:
        yield
    finally:
        task.cancel()


def groups(names: Iterable[str]) -> dict[str, bytes]:
    """Return the groups of Pods by ID."""
    texts = [GroupEncoder().encode(pod_target(name)).text for name in names]
    return dict(groups_by_id(b"[" + b",".join(texts) + b"]\n"))


async def test_file_follows_the_targets_and_is_readable_by_others(tmp_path: Path) -> None:
    """Nothing is written before everything was listed; then each change replaces the file."""
    seen, path = Seen(sources=(NODES, PODS)), tmp_path / "targets.json"
    async with running(writer(seen, path)), seen.lab.running():
        seen.lab.cluster.put_list([make_pod("a")], PODS)
        await seen.lab.until("a")
        await asyncio.sleep(0.3)
        assert not path.exists(), "the Nodes were never listed"
        seen.lab.cluster.put_list([], NODES)
        await until(path.exists)
        assert ids_in(path) == {"pod--shop--a"}
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        first = path.stat().st_ino
        seen.lab.cluster.put(make_pod("b", ip="198.51.100.11"))
        await until(lambda: ids_in(path) == {"pod--shop--a", "pod--shop--b"})
        assert path.stat().st_ino != first, "it is replaced, never written in place"
    assert names(tmp_path) == [path.name]


async def test_file_stays_while_a_source_was_never_listed(tmp_path: Path) -> None:
    """The file of an earlier process is left byte for byte, at the end too."""
    seen, path = Seen(sources=(NODES, PODS)), tmp_path / "targets.json"
    path.write_bytes(b"[\n{}]\n")
    file = writer(seen, path, before=groups("abc"))
    async with running(file):
        seen.lab.cluster.put_list([], PODS)
        await asyncio.sleep(0.5)
    await file.write_at_end()
    assert path.read_bytes() == b"[\n{}]\n"


async def test_change_before_the_end_is_written_at_the_end(tmp_path: Path) -> None:
    """The file stays when the process ends, and is that of its last moment."""
    seen, path = Seen(), tmp_path / "targets.json"
    file = writer(seen, path)
    seen.lab.observed.is_complete = True
    seen.lab.cluster.put_list([make_pod("a")])
    await file.write_at_end()
    assert ids_in(path) == {"pod--shop--a"}
    seen.lab.cluster.put(make_pod("b", ip="198.51.100.11"))
    await file.write_at_end()
    assert ids_in(path) == {"pod--shop--a", "pod--shop--b"}


async def test_cluster_that_suddenly_looks_empty_does_not_empty_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong kubeconfig after a restart: new targets are added at once, those before stay as long as the brake says."""
    seen, path, clock = Seen(), tmp_path / "targets.json", Clock(follows=time.monotonic)
    seen.lab.observed.is_complete = True
    seen.lab.cluster.put_list([make_pod("new")])
    file = writer(seen, path, before=groups("abc"), clock=clock)
    before = {"pod--shop--a", "pod--shop--b", "pod--shop--c"}
    await file.write()
    assert ids_in(path) == {*before, "pod--shop--new"}
    assert "the file keeps targets of an earlier process" in capsys.readouterr().out
    seen.lab.cluster.put(make_pod("b", ip="198.51.100.11"))
    seen.lab.cluster.remove(make_pod("b"))
    await file.write()
    assert ids_in(path) == {*before, "pod--shop--new"}
    async with running(file):
        clock.skip(599)
        await asyncio.sleep(0.3)
        assert before <= ids_in(path)
        clock.skip(2)
        await until(lambda: ids_in(path) == {"pod--shop--new"})


async def test_empty_cluster_does_not_empty_a_file_of_one_target(tmp_path: Path) -> None:
    """The brake lets one service go; a whole file is more than that."""
    seen, path = Seen(), tmp_path / "targets.json"
    seen.lab.cluster.put_list([])
    await writer(seen, path, before=groups("a")).write()
    assert ids_in(path) == {"pod--shop--a"}


async def test_few_targets_that_are_gone_and_a_brake_that_is_off_are_believed(tmp_path: Path) -> None:
    """As with Consul: a small part goes at once, and everything where the operator says so."""
    seen, path = Seen(), tmp_path / "targets.json"
    seen.lab.cluster.put_list([make_pod(name, ip=f"198.51.100.{ord(name)}") for name in "abcdefgh"])
    await writer(seen, path, before=groups("abcdefghij")).write()
    assert len(ids_in(path)) == 8
    seen.lab.cluster.put_list([])
    await writer(seen, path, before=groups("abcdefgh"), allow_mass=True).write()
    assert ids_in(path) == set()


async def test_targets_that_the_brake_keeps_stay_in_the_file(tmp_path: Path) -> None:
    """Services that Consul still holds are in the file: it never has less than Consul."""
    seen, path = Seen(), tmp_path / "targets.json"
    pods = [make_pod(name, ip=f"198.51.100.{ord(name)}") for name in "abcd"]
    async with seen.lab.running():
        await seen.synced(pods)
        file = writer(seen, path)
        async with running(file):
            await until(path.exists)
            seen.lab.cluster.put_list([])
            await seen.lab.until_so(lambda: bool(seen.lab.status.held))
            await until(lambda: {one.state for one in seen.view.targets()} == {"kept"})
            await file.write()
            assert ids_in(path) == {f"pod--shop--{name}" for name in "abcd"}


async def test_many_changes_replace_the_file_at_most_once_a_second(tmp_path: Path) -> None:
    """A storm of events is a few writes, the last of which has all of it."""
    seen, path = Seen(), tmp_path / "targets.json"
    seen.lab.observed.is_complete = True
    seen.lab.cluster.put_list([])
    written: set[int] = set()
    begun = time.monotonic()
    async with running(writer(seen, path)):
        await until(path.exists)
        for number in range(100):
            seen.lab.cluster.put(make_pod(f"web-{number}", ip=f"198.51.100.{number + 1}"))
            written.add(path.stat().st_mtime_ns)
            await asyncio.sleep(0.01)
        await until(lambda: len(ids_in(path)) == 100)
    assert len(written) <= time.monotonic() - begun + 2


async def test_failure_is_said_once_with_its_remedy_and_ends_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that vanished: one line, a metric, and the file again as soon as the folder is back."""
    monkeypatch.setattr("k8s_consul_registrar.admin.file_sd.RETRY_EVERY", 0.05)
    monkeypatch.setattr("k8s_consul_registrar.admin.file_sd.CHECK_EVERY", 0.05)
    folder = tmp_path / "folder"
    folder.mkdir()
    seen, path = Seen(), folder / "targets.json"
    seen.lab.observed.is_complete = True
    seen.lab.cluster.put_list([make_pod("a")])
    async with running(writer(seen, path)):
        await until(path.exists)
        folder.rename(tmp_path / "away")
        await until(lambda: LoadStatus.problems()["FILE_SD_PATH"])
        await asyncio.sleep(0.5)
        folder.mkdir()
        await until(path.exists)
        await until(lambda: not LoadStatus.problems()["FILE_SD_PATH"])
    said = capsys.readouterr().out
    assert said.count("targets cannot be written") == 1
    assert f"make {folder}, or mount it again" in said
    assert said.count("targets are written again") == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/null")])
async def test_what_is_no_file_is_never_replaced(
    tmp_path: Path, make: "type[Path]", capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory, a pipe and a link stay what they are."""
    seen, path = Seen(), tmp_path / "targets.json"
    make(path)
    kind = stat.S_IFMT(path.lstat().st_mode)
    groups_before(path)
    seen.lab.cluster.put_list([make_pod("a")])
    await writer(seen, path).write()
    assert stat.S_IFMT(path.lstat().st_mode) == kind
    assert "it is not a regular file" in capsys.readouterr().out
    assert names(tmp_path) == [path.name]


async def test_file_system_that_is_full_leaves_the_last_file_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, nothing left behind, and the new targets as soon as there is room."""
    monkeypatch.setattr("k8s_consul_registrar.admin.file_sd.RETRY_EVERY", 0.05)
    seen, path = Seen(), tmp_path / "targets.json"
    seen.lab.observed.is_complete = True
    seen.lab.cluster.put_list([make_pod("a")])
    async with running(writer(seen, path)):
        await until(path.exists)
        before = path.read_bytes()
        with full_disk(len(before)):
            seen.lab.cluster.put_list(
                [make_pod(f"web-{number}", ip=f"198.51.100.{number}") for number in range(20)]
            )
            await until(lambda: LoadStatus.problems()["FILE_SD_PATH"])
            await asyncio.sleep(0.3)
            assert path.read_bytes() == before
        await until(lambda: len(ids_in(path)) == 20)
        await until(lambda: not LoadStatus.problems()["FILE_SD_PATH"])
    assert names(tmp_path) == [path.name]
    assert capsys.readouterr().out.count("targets cannot be written") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_has_a_remedy() -> None:
    """The words say what to do."""
    with pytest.raises(OSError, match="space") as full, Path("/dev/full").open("w", buffering=1) as device:
        device.write("x\n")
    assert replacement.write_problem(Path("/a/b"), full.value).endswith("; free some space there")


async def test_file_system_that_hangs_is_said_and_occupies_one_thread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each further try fails at once while the first one hangs, and works when it has ended."""
    monkeypatch.setattr(replacement, "HUNG_WITHIN", 0.1)
    monkeypatch.setattr(replacement, "HUNG_AFTER", 0.1)
    seen, path, released = Seen(), tmp_path / "targets.json", threading.Event()
    seen.lab.cluster.put_list([make_pod("a")])
    file = writer(seen, path)
    opened: list[int] = []

    def hang(self: replacement.Replacement) -> None:
        opened.append(threading.get_ident())
        released.wait()
        plain(self)

    plain = replacement.Replacement.open
    monkeypatch.setattr(replacement.Replacement, "open", hang)
    for _ in range(3):
        await file.write()
    assert len(opened) == 1
    assert capsys.readouterr().out.count("does not answer") == 1
    released.set()
    await until(path.exists)
    await file.write()
    assert ids_in(path) == {"pod--shop--a"}


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"[]\n", b"[1,2]", b"\xff\xfe", b'[{"targets":["a:1"],"labels":{}}]', b"[" * 5000],
)
def test_file_of_something_else_keeps_nothing(tmp_path: Path, content: bytes) -> None:
    """A file that no registrar wrote is replaced as an empty file is."""
    path = tmp_path / "targets.json"
    path.write_bytes(content)
    assert groups_before(path) == {}


def test_file_of_an_earlier_process_is_read_whole(tmp_path: Path) -> None:
    """Each group is there by its ID, and makes the same file again."""
    path = tmp_path / "targets.json"
    found = groups("abc")
    path.write_bytes(b"[\n" + b",\n".join(found.values()) + b"]\n")
    assert groups_before(path) == found
    assert len(json.loads(path.read_bytes())) == 3


def test_folder_without_rights_or_a_wrong_name_is_refused_at_the_start(tmp_path: Path) -> None:
    """Exit 2, with the setting's name."""
    with pytest.raises(AccessError, match="FILE_SD_PATH"):
        groups_before(tmp_path / "missing" / "targets.json")
    with pytest.raises(SettingsError, match=r"must end with \.json"):
        read_registrar({"FILE_SD_PATH": "/targets"})
    with pytest.raises(SettingsError, match="neither of which is set"):
        read_registrar({"CONSUL_BACKEND": "none"})
    assert read_registrar({"CONSUL_BACKEND": "none", "FILE_SD_PATH": "/t/x.json"}).http_sd is None
