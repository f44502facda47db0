"""fetch-targets and FILE_SD_PATH as processes: signals, exit codes, and files that outlive them."""

import json
import signal
from pathlib import Path

import pytest

from k8s_consul_registrar.admin.http_sd import HttpSdServer
from support.daemon import Daemon
from support.lab import running_lab
from support.seen import Registrar, pod_target

WEB = "pod--shop--web-1"


def ids_in(path: Path) -> set[str]:
    """Return the service IDs of a file; none while there is no file."""
    if not path.exists():
        return set()
    return {group["labels"]["__meta_consul_service_id"] for group in json.loads(path.read_bytes())}


def fetching(folder: Path, *arguments: str, **environment: str) -> Daemon:
    """Return the command, not started yet."""
    return Daemon(("fetch-targets", *arguments), environment, folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_signal_ends_it_at_once_and_the_file_stays(tmp_path: Path, number: int, code: int) -> None:
    """In the middle of a poll that waits for 25 seconds."""
    registrar, path = Registrar(), tmp_path / "lab.json"
    registrar.put(pod_target("web-1"))
    async with HttpSdServer(port=0, view=registrar) as server:
        url = f"http://127.0.0.1:{server.port}"
        async with fetching(
            tmp_path, f"lab={url}", "--output", str(tmp_path), "--admin-port", "0"
        ) as command:
            await command.until(lambda: ids_in(path) == {WEB})
            await command.until(lambda: len(server.polls) == 1)
            await command.ready()
            command.send(number)
            assert await command.ended() == code
    assert ids_in(path) == {WEB}


async def test_probe_names_the_registrar_that_cannot_be_read(tmp_path: Path) -> None:
    """Readiness says which one and why, and the metric of its file is 0."""
    arguments = ("east=http://127.0.0.1:9", "--output", str(tmp_path), "--admin-port", "0")
    async with fetching(tmp_path, *arguments) as command:
        await command.until_said("targets cannot be fetched; the file stays as it is", "no connection")
        status, text = await command.admin("/readyz")
        assert (status, "east: no connection" in text) == (503, True)
        await command.measures('rotating_file_ok{of="east"}', 0)
        assert (await command.admin("/healthz"))[0] == 200


async def test_once_tells_by_its_exit_code(tmp_path: Path) -> None:
    """0 with every file written, 1 if one registrar failed, 2 for arguments that cannot be."""
    registrar = Registrar()
    registrar.put(pod_target("web-1"))
    async with HttpSdServer(port=0, view=registrar) as server:
        good = f"good=http://127.0.0.1:{server.port}"
        for urls, code, words in (
            ([good], 0, "good.json holds its targets"),
            ([good, "bad=http://127.0.0.1:9"], 1, "bad: no connection"),
            (["nonsense"], 2, "does not begin with http://"),
        ):
            async with fetching(tmp_path, *urls, "--once", "--output", str(tmp_path)) as command:
                assert await command.ended() == code
                assert words in command.output
    assert ids_in(tmp_path / "good.json") == {WEB}


async def test_file_of_the_registrar_outlives_it_and_its_api_server() -> None:
    """The file stays after the end, and through a start in which nothing can be listed."""
    async with running_lab() as lab:
        path = lab.folder / "targets.json"
        settings = {"CONSUL_BACKEND": "none", "FILE_SD_PATH": str(path)}
        async with await lab.registrar(**settings) as daemon:
            await lab.cluster.add_pod()
            await daemon.until(lambda: ids_in(path) == {WEB})
            await daemon.measures('rotating_file_ok{of="FILE_SD_PATH"}', 1)
            assert await daemon.terminate() == 0
        content = path.read_bytes()
        lab.api_door.refuse()
        async with await lab.registrar(**settings) as daemon:
            await daemon.until_said("cannot list; nothing of it is deregistered meanwhile", "pods")
            assert await daemon.terminate() == 0
        assert path.read_bytes() == content
