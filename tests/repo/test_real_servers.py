"""The helpers that find, start and clean up real servers, and the script that fetches them."""

import fcntl
import importlib.machinery
import importlib.util
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support import real_servers
from support.files import ROOT
from support.processes import PortTakenError, Program, StartFailedError
from support.real_servers import REAL, real_consul, real_prometheus
from support.waiting import PATIENCE, until

SCRIPT = ROOT / "scripts" / "fetch-real-servers"


@pytest.fixture(scope="module")
def fetcher() -> ModuleType:
    """Load what the fetching script reads Debian's sources with."""
    loader = importlib.machinery.SourceFileLoader(
        "debian_packages", str(SCRIPT.parent / "debian_packages.py")
    )
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_sources_of_both_forms_are_read(fetcher: ModuleType, tmp_path: Path) -> None:
    """Debian's main archive is found in deb822 and one-line files; security and third parties are not."""
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "debian.sources").write_text(
        "# a comment\nTypes: deb\nURIs: http://a.test/debian\nSuites: trixie trixie-updates\n"
        "Components: main contrib\nSigned-By: /keys/debian.gpg\n\n"
        "Types: deb\nURIs: http://a.test/debian-security\nSuites: trixie-security\nComponents: main\n\n"
        "Types: deb\nURIs: http://off.test/debian\nSuites: trixie\nComponents: main\nEnabled: no\n"
    )
    (parts / "other.sources").write_text(
        "Types: deb\nURIs: http://c.test/node\nSuites: nodistro\nComponents: main\n"
    )
    (parts / "old.list").write_text(
        "deb [arch=amd64 signed-by=/keys/old.gpg] http://b.test/debian bookworm main # why\n"
        "deb-src http://src.test/debian bookworm main\n"
        "deb http://d.test/docker bookworm stable\n"
        "deb\n"
    )
    (tmp_path / "sources.list").write_text("deb http://a.test/debian bookworm main\n")
    found = [tuple(source) for source in fetcher.debian_sources(tmp_path)]
    assert found == [("http://a.test/debian", "/keys/debian.gpg"), ("http://b.test/debian", "/keys/old.gpg")]


def test_key_inside_a_source_is_kept_whole(fetcher: ModuleType, tmp_path: Path) -> None:
    """An embedded key's lines reach our own sources file as they were written."""
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    key = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQ\n -----END PGP PUBLIC KEY BLOCK-----"
    (parts / "d.sources").write_text(
        f"Types: deb\nURIs: http://a.test/debian\nSuites: bookworm\nComponents: main\nSigned-By:{key}\n"
    )
    (source,) = fetcher.debian_sources(tmp_path)
    assert f"Suites: bullseye\nComponents: main\nSigned-By: {key}\n" in fetcher.sources_text(
        [source], ["bullseye"]
    )


def _copied_script(tmp_path: Path) -> Path:
    """Copy the script to a folder of its own, so that its cache is empty."""
    copy = tmp_path / "scripts" / "fetch-real-servers"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(SCRIPT, copy)
    shutil.copy(SCRIPT.parent / "debian_packages.py", copy.parent)
    return copy


def _script(tmp_path: Path, path: str, required: str) -> tuple[int, str]:
    """Run the script with an empty cache, on a machine with this PATH."""
    command = [sys.executable, str(_copied_script(tmp_path))]
    environment = {"PATH": path, "REQUIRE_REAL_SERVERS": required}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


def test_script_says_why_it_cannot_fetch(tmp_path: Path) -> None:
    """Without apt it names the reason; that is a failure only where real servers are required."""
    code, said = _script(tmp_path, str(tmp_path), "")
    assert (code, "apt-get is not on this machine" in said) == (0, True)
    assert _script(tmp_path, str(tmp_path), "1")[0] == 1


def test_script_waits_for_another_run_and_fetches_nothing_twice(tmp_path: Path) -> None:
    """A run beside another waits for its end, and leaves what that one has fetched as it is."""
    copy, cache = _copied_script(tmp_path), tmp_path / ".cache" / "real"
    cache.mkdir(parents=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = {"PATH": str(tmp_path), "REQUIRE_REAL_SERVERS": "1"}  # no apt-get: a fetch would fail
        script = subprocess.Popen([sys.executable, copy], env=environment, stderr=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            script.wait(0.5)
        for name in _server_names():
            (cache / name).mkdir()
            (cache / name / ".complete").touch()
    assert (script.communicate(timeout=PATIENCE)[1], script.returncode) == ("", 0)


def _server_names() -> list[str]:
    """Return the folders that the script fetches servers into."""
    return re.findall(r'^    Server\("([^"]+)"', SCRIPT.read_text(), re.MULTILINE)


def test_without_a_server_a_test_is_skipped_or_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No usable binary skips with the reason; REQUIRE_REAL_SERVERS=1 makes it a failure."""
    monkeypatch.setattr(real_servers, "CACHE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("REQUIRE_REAL_SERVERS", "0")
    with pytest.raises(pytest.skip.Exception, match="no consul on PATH"):
        real_servers.consul_binary()
    monkeypatch.setenv("REQUIRE_REAL_SERVERS", "1")
    with pytest.raises(pytest.fail.Exception, match="no prometheus with http_sd"):
        real_servers.prometheus_tools("http_sd")


def test_binary_on_path_counts_only_if_it_can_do_the_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A promtool that refuses the mechanism and a consul that is something else are passed over."""
    for name, body in {"promtool": "exit 1", "prometheus": "exit 0", "consul": "echo hello"}.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert real_servers.prometheus_tools("consul_sd").promtool.parent != tmp_path
    assert real_servers.consul_binary().parent != tmp_path


async def test_program_is_ended_with_its_children(tmp_path: Path) -> None:
    """Stopping takes the whole process group, a child that ignores the signal included."""
    pids = tmp_path / "pids"
    body = f"(trap '' TERM; sleep 60) & echo $$ $! > {pids}; wait"
    program = Program(["/bin/sh", "-c", body], tmp_path / "log")
    program.launch()

    async def has_written() -> bool:
        return pids.is_file() and len(pids.read_text().split()) == 2

    await program.ready(has_written, 10)
    await program.stop(signal.SIGTERM)
    assert not program.is_running

    async def are_gone() -> bool:
        return not any(_is_alive(int(pid)) for pid in pids.read_text().split())

    await until(are_gone)


def _is_alive(pid: int) -> bool:
    """Return True if a process exists and is more than a zombie waiting for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_program_that_fails_shows_its_log(tmp_path: Path) -> None:
    """An early end and a port in use are distinguished, with the program's output."""

    async def never() -> bool:
        return False

    failing = Program(["/bin/sh", "-c", "echo no such flag; exit 1"], tmp_path / "a.log")
    failing.launch()
    with pytest.raises(StartFailedError, match="no such flag"):
        await failing.ready(never, 10)
    await failing.stop()
    late = Program(["/bin/sh", "-c", "echo bind: address already in use; exit 1"], tmp_path / "b.log")
    late.launch()
    with pytest.raises(PortTakenError):
        await late.ready(never, 10)
    await late.stop()


class TestRealServers:
    """The servers themselves."""

    pytestmark = REAL

    async def test_consul_keeps_its_data_over_a_kill(self) -> None:
        """A service registered before a `kill -9` is in the catalog after the restart, at the same address."""
        async with real_consul() as consul:
            body = {"ID": "a-1", "Name": "a", "Address": "192.0.2.1", "Port": 80}
            assert (await consul.request("PUT", "/v1/agent/service/register", body))[0] == 200

            async def is_in_catalog() -> bool:
                return bool((await consul.request("GET", "/v1/catalog/service/a"))[1])

            await until(is_in_catalog)
            address = consul.address
            await consul.restart(signal.SIGKILL)
            status, services = await consul.request("GET", "/v1/agent/services")
            assert (status, list(services), consul.address) == (200, ["a-1"], address)
            program = consul.program
        assert not program.is_running

    async def test_client_agent_joins_and_acls_deny(self) -> None:
        """A client agent of a server with ACLs works with the token and shows nothing without it."""
        async with (
            real_consul(acl=True, node="server") as server,
            real_consul(join=server.serf, acl=True, node="client") as client,
        ):
            assert len((await client.request("GET", "/v1/catalog/nodes"))[1]) == 2
            client.token = ""
            assert (await client.request("GET", "/v1/catalog/nodes"))[1] == []

    async def test_refused_flag_fails_with_consul_s_words(self) -> None:
        """A server that cannot start raises what it printed, and nothing stays behind."""
        with pytest.raises(StartFailedError, match="no-such-flag"):
            async with real_consul("-no-such-flag"):
                pass

    @pytest.mark.parametrize("mechanism", ["consul_sd", "http_sd"])
    async def test_prometheus_has_the_mechanism(self, mechanism: real_servers.Mechanism) -> None:
        """Each mechanism finds a Prometheus that starts with it and answers queries."""
        config = f"scrape_configs: [{{job_name: probe, {real_servers._PROBES[mechanism]}}}]\n"
        async with real_prometheus(config, mechanism=mechanism) as prometheus:
            assert await prometheus.wait_for("vector(1)", 1)
            assert await prometheus.targets() == []
