"""Exec plugins of `kube.credentials`: real programs, run as kubectl runs its credential plugins."""

import asyncio
import base64
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from structlog.testing import capture_logs

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.access import Access, load_access
from k8s_consul_registrar.kube.credentials import ExecCredentials, ExecPlugin
from k8s_consul_registrar.rotating import LoadStatus
from support.processes import is_running
from support.waiting import SLACK, until

V1 = "client.authentication.k8s.io/v1"
BETA = "client.authentication.k8s.io/v1beta1"
SECRET = "s3cr3t-t0ken"
CA = trustme.CA()


def script(folder: Path, code: str, name: str = "plugin") -> Path:
    """Write an executable Python program that counts its runs in `runs`."""
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\nimport json, os, pathlib, sys, time\n"
        "runs = pathlib.Path(__file__).with_name('runs')\n"
        "run = len(runs.read_text()) + 1 if runs.exists() else 1\n"
        f"runs.write_text('x' * run)\n{code}\n"
    )
    path.chmod(0o755)
    return path


def prints(status: dict[str, Any], version: str = V1) -> str:
    """Return code that prints a credential; `{run}` in its texts becomes the number of the run."""
    credential = {"apiVersion": version, "kind": "ExecCredential", "status": status}
    return f"print({json.dumps(credential)!r}.replace('{{run}}', str(run)))"


def runs(folder: Path) -> int:
    """Return how often the program ran."""
    path = folder / "runs"
    return len(path.read_text()) if path.exists() else 0


def plugin(path: Path, version: str = V1) -> ExecPlugin:
    """Return a plugin that runs this program."""
    return ExecPlugin(version, str(path), "user 'main': exec", env={"PATH": os.environ["PATH"]})


def access(folder: Path, plugin_config: dict[str, Any], **cluster: Any) -> Access:
    """Load a kubeconfig in `folder` with this exec part."""
    config = {
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": "https://api.example", **cluster}}],
        "users": [
            {"name": "u", "user": {"exec": {"apiVersion": V1, "interactiveMode": "Never", **plugin_config}}}
        ],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }
    (folder / "config").write_text(yaml.safe_dump(config))
    return load_access({"KUBECONFIG": str(folder / "config"), "PATH": f"{folder}:{os.environ['PATH']}"})


@pytest.mark.parametrize("version", [V1, BETA])
async def test_token_is_kept_until_it_is_rejected(tmp_path: Path, version: str) -> None:
    """Without an expiry the program runs once, and again after a 401 of its newest token."""
    path = script(tmp_path, prints({"token": f"{SECRET}-{{run}}"}, version))
    source = ExecCredentials(plugin(path, version))
    first, again = await asyncio.gather(source.identity(), source.identity())
    assert first is again
    assert first.token == f"{SECRET}-1"
    source.rejected(first)
    second = await source.identity()
    assert second.token == f"{SECRET}-2"
    source.rejected(first)
    assert await source.identity() is second
    assert runs(tmp_path) == 2


async def test_credential_is_renewed_shortly_before_it_expires(tmp_path: Path) -> None:
    """The expiry is honoured with a leeway of ten seconds."""
    expiry = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)
    path = script(tmp_path, prints({"token": "t-{run}", "expirationTimestamp": "2030-01-01T12:00:00Z"}))
    now = expiry.timestamp() - 60
    source = ExecCredentials(plugin(path), now=lambda: now)
    assert (await source.identity()).token == "t-1"
    now = expiry.timestamp() - 11
    assert (await source.identity()).token == "t-1"
    now = expiry.timestamp() - 10
    assert (await source.identity()).token == "t-2"


async def test_program_is_told_what_kubectl_tells(tmp_path: Path) -> None:
    """Arguments, environment and KUBERNETES_EXEC_INFO arrive, with the cluster when asked for."""
    dump = tmp_path / "seen.json"
    script(
        tmp_path,
        f"seen = dict(args=sys.argv[1:], mine=os.environ.get('MINE'), stdin=sys.stdin.read(), "
        f"info=json.loads(os.environ['KUBERNETES_EXEC_INFO']))\n"
        f"pathlib.Path({str(dump)!r}).write_text(json.dumps(seen))\n" + prints({"token": "t"}),
    )
    loaded = access(
        tmp_path,
        {
            "command": "./plugin",
            "args": ["get", "token"],
            "env": [{"name": "MINE", "value": "yes"}],
            "provideClusterInfo": True,
        },
        **{
            "certificate-authority-data": base64.b64encode(CA.cert_pem.bytes()).decode(),
            "tls-server-name": "kubernetes",
            "extensions": [{"name": "client.authentication.k8s.io/exec", "extension": {"audience": "me"}}],
        },
    )
    assert await loaded.token() == "t"
    seen = json.loads(dump.read_text())
    assert seen == {
        "args": ["get", "token"],
        "mine": "yes",
        "stdin": "",
        "info": {
            "apiVersion": V1,
            "kind": "ExecCredential",
            "spec": {
                "interactive": False,
                "cluster": {
                    "server": "https://api.example",
                    "tls-server-name": "kubernetes",
                    "certificate-authority-data": base64.b64encode(CA.cert_pem.bytes()).decode(),
                    "config": {"audience": "me"},
                },
            },
        },
    }


async def test_bare_command_is_looked_up_in_the_path(tmp_path: Path) -> None:
    """A command without a slash is never taken from the kubeconfig's folder by itself."""
    script(tmp_path, prints({"token": "t"}), "on-the-path")
    assert await access(tmp_path, {"command": "on-the-path"}).token() == "t"


async def test_missing_program_shows_the_install_hint(tmp_path: Path) -> None:
    """The hint of the kubeconfig tells the operator what to install."""
    loaded = access(tmp_path, {"command": "no-such-plugin", "installHint": "install it\nby hand"})
    with pytest.raises(AccessError, match="'no-such-plugin'; install it by hand"):
        await loaded.token()


async def test_certificate_makes_a_context_of_its_own(tmp_path: Path) -> None:
    """While the certificate stays the ssl context does; a new one brings a new context."""
    leaves = [CA.issue_cert(f"c{index}.example") for index in range(2)]
    statuses = [
        {
            "clientCertificateData": leaf.cert_chain_pems[0].bytes().decode(),
            "clientKeyData": leaf.private_key_pem.bytes().decode(),
        }
        for leaf in leaves
    ]
    choose = f"statuses = {statuses!r}\nstatus = statuses[run - 1]\n"
    script(
        tmp_path,
        choose + f"print(json.dumps(dict(apiVersion={V1!r}, kind='ExecCredential', status=status)))",
    )
    loaded = access(tmp_path, {"command": "./plugin"})
    first = await loaded.credentials.identity()
    assert first.token == ""
    assert dict(first.headers()) == {}
    context = loaded.ssl_context(first)
    assert context is not None
    assert loaded.ssl_context(await loaded.credentials.identity()) is context
    loaded.credentials.rejected(first)
    assert loaded.ssl_context(await loaded.credentials.identity()) is not context


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print('who are you?', file=sys.stderr); sys.exit(3)", "ended with code 3: who are you?"),
        ("sys.exit(1)", "ended with code 1: nothing on stderr"),
        (f"print({SECRET!r})", "printed no ExecCredential: JSON is malformed"),
        (
            f'sys.stdout.buffer.write(b\'{{"kind":"\\xff{SECRET}"}}\')',
            "printed no ExecCredential: UnicodeDecodeError",
        ),
        ("print('{}')", "missing required field"),
        (prints({"token": SECRET}, BETA), f"no ExecCredential of {V1}"),
        (prints({}), "neither a token nor a client certificate"),
        (prints({"token": f"{SECRET}\nx"}), "the token has characters"),
        (prints({"clientCertificateData": "x"}), "without its key"),
        (prints({"token": SECRET, "expirationTimestamp": "soon"}), "$.status.expirationTimestamp"),
        ("print('x' * (2 << 20))", "printed more than"),
    ],
)
async def test_failing_program_is_an_error_without_its_output(tmp_path: Path, code: str, text: str) -> None:
    """Its stderr is shown; its stdout, which may be the secret, is not."""
    with pytest.raises(AccessError) as caught:
        await ExecCredentials(plugin(script(tmp_path, code))).identity()
    assert text in str(caught.value)
    assert "user 'main': exec" in str(caught.value)
    assert SECRET not in str(caught.value)


async def test_file_that_is_no_program_is_an_error(tmp_path: Path) -> None:
    """A format the kernel cannot run is reported, not raised through."""
    path = tmp_path / "junk"
    path.write_bytes(b"\x00\x01")
    path.chmod(0o755)
    with pytest.raises(AccessError, match=r"cannot run .*junk: Exec format error"):
        await ExecCredentials(plugin(path)).identity()


async def test_program_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    """A child that holds the pipes open does not outlive the time limit."""
    pid_file = tmp_path / "child"
    code = (
        "import subprocess\n"
        f"child = subprocess.Popen(['sleep', '60'])\npathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
    )
    for limit in (1.5, 6.0, 24.0):  # on a slow machine the program needs more time to start its child
        started = time.monotonic()
        with pytest.raises(AccessError, match=f"took longer than {limit:g} s"):
            await ExecCredentials(plugin(script(tmp_path, code)), time_limit=limit).identity()
        assert time.monotonic() - started < limit + SLACK
        if pid_file.exists():
            break
    await assert_gone(int(pid_file.read_text()))


async def test_closing_ends_the_program(tmp_path: Path) -> None:
    """A daemon that stops leaves no plugin behind, its callers hear of it, and a later call runs it again."""
    pid_file = tmp_path / "pid"
    path = script(tmp_path, f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep(60)")
    source = ExecCredentials(plugin(path))
    task = asyncio.create_task(source.identity())
    await until(lambda: pid_file.exists() and pid_file.read_text())
    await source.aclose()
    with pytest.raises(AccessError, match="the plugin was ended"):
        await task
    await assert_gone(int(pid_file.read_text()))
    script(tmp_path, prints({"token": "t"}))
    assert (await source.identity()).token == "t"
    await source.aclose()


async def test_end_of_the_loop_ends_the_program(tmp_path: Path) -> None:
    """A command that ends while a plugin runs does not leave it behind."""
    pid_file = tmp_path / "pid"
    path = script(tmp_path, f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep(60)")

    async def ask_and_leave() -> None:
        asking = asyncio.create_task(ExecCredentials(plugin(path)).identity())
        while not pid_file.exists() or not pid_file.read_text():
            await asyncio.sleep(0.02)
        asking.cancel()

    await asyncio.to_thread(asyncio.run, ask_and_leave())
    await assert_gone(int(pid_file.read_text()))


async def test_impatient_callers_share_one_run_that_goes_on_without_them(tmp_path: Path) -> None:
    """A plugin slower than each of its callers ran again and again, and never came to its end."""
    gate, done = tmp_path / "gate", tmp_path / "done"
    path = script(
        tmp_path,
        f"while not os.path.exists({str(gate)!r}): time.sleep(0.02)\n"
        f"pathlib.Path({str(done)!r}).touch()\n" + prints({"token": "t"}),
    )
    source = ExecCredentials(plugin(path))
    for _ in range(6):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await source.identity()
    waiting = [asyncio.create_task(source.identity()) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    gate.touch()
    got = await asyncio.gather(*waiting[1:])
    assert {identity.token for identity in got} == {"t"}
    assert waiting[0].cancelled()
    assert (runs(tmp_path), done.exists()) == (1, True)


GARBAGE = {
    "nothing": "",
    "text": "print('oops')",
    "another kind": 'print(\'{"apiVersion":"v1","kind":"List"}\')',
    "a list": "print('[]')",
    "deep": "print('[' * 100000)",
    "no zone": prints({"token": "new", "expirationTimestamp": "2030-01-01T12:00:00"}),
    "year 1 without a zone": prints({"token": "new", "expirationTimestamp": "0001-01-01T00:00:00"}),
    "year 0": prints({"token": "new", "expirationTimestamp": "0000-01-01T00:00:00Z"}),
    "year 10000": prints({"token": "new", "expirationTimestamp": "10000-01-01T00:00:00Z"}),
    "a number": prints({"token": "new", "expirationTimestamp": 1}),
    "empty expiry": prints({"token": "new", "expirationTimestamp": ""}),
    "a token that is none": prints({"token": "a b"}),
    "a certificate that is none": prints({"clientCertificateData": "x", "clientKeyData": "y"}),
    "binary": "sys.stdout.buffer.write(bytes(range(256)))",
    "a flood": "while True: sys.stdout.write('x' * 65536)",
    "a flood of errors": "while True: sys.stderr.write('x' * 65536)",
    "an exit": "sys.exit(9)",
    "a signal": "os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("code", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_leaves_the_last_credential_in_use_until_it_expires(tmp_path: Path, code: str) -> None:
    """One line of the log, a metric, and no run in a loop; after the expiry it is an error by name."""
    expiry = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)
    path = script(tmp_path, prints({"token": "good", "expirationTimestamp": "2030-01-01T12:00:00Z"}))
    now, clock = expiry.timestamp() - 60, 0.0
    source = ExecCredentials(plugin(path), now=lambda: now, clock=lambda: clock)
    first = await source.identity()
    script(tmp_path, code)
    now = expiry.timestamp() - 5
    with capture_logs() as logs:
        for _ in range(3):
            assert await source.identity() is first
        assert runs(tmp_path) == 2
        clock += 5
        assert await source.identity() is first
    assert runs(tmp_path) == 3
    (line,) = logs
    assert line["event"] == "the exec plugin gives no credential; the last one stays in use"
    assert LoadStatus.problems()["kubeconfig exec"]
    now = expiry.timestamp()
    with pytest.raises(AccessError, match="user 'main': exec"):
        await source.identity()
    script(tmp_path, prints({"token": "again"}))
    clock += 5
    with capture_logs() as logs:
        assert (await source.identity()).token == "again"
    assert [line["event"] for line in logs] == ["the exec plugin gives credentials again"]


async def test_credential_that_is_rejected_is_used_while_no_other_comes(tmp_path: Path) -> None:
    """One 401 may be the server's fault; a server that always answers it does not make the plugin run in a loop."""
    path = script(tmp_path, prints({"token": "t-{run}"}))
    clock = 0.0
    source = ExecCredentials(plugin(path), clock=lambda: clock)
    source.rejected(await source.identity())
    second = await source.identity()
    assert second.token == "t-2"
    for _ in range(5):
        source.rejected(second)
        assert await source.identity() is second
    clock += 5
    script(tmp_path, "sys.exit(1)")
    assert await source.identity() is second
    assert runs(tmp_path) == 3
    clock += 5
    script(tmp_path, prints({"token": "t-{run}"}))
    assert (await source.identity()).token == "t-4"


@pytest.mark.parametrize(
    "expiry",
    [
        "0001-01-01T00:00:00Z",
        "1969-12-31T23:59:59Z",
        "2020-01-01T00:00:00+14:00",
        "0001-01-01T00:00:00+14:00",
    ],
)
async def test_credential_that_has_expired_already_is_used_without_a_loop(
    tmp_path: Path, expiry: str
) -> None:
    """A clock that is wrong, or a plugin's own cache: the server may still take it."""
    path = script(tmp_path, prints({"token": "t-{run}", "expirationTimestamp": expiry}))
    clock = 0.0
    source = ExecCredentials(plugin(path), clock=lambda: clock)
    for _ in range(5):
        assert (await source.identity()).token == "t-1"
    clock += 5
    assert (await source.identity()).token == "t-2"
    assert runs(tmp_path) == 2


async def test_failing_program_is_not_run_in_a_loop(tmp_path: Path) -> None:
    """Callers without any credential get the error of the last run for some seconds."""
    path = script(tmp_path, "print('no', run, file=sys.stderr); sys.exit(1)")
    clock = 0.0
    source = ExecCredentials(plugin(path), clock=lambda: clock)
    for _ in range(4):
        with pytest.raises(AccessError, match="no 1"):
            await source.identity()
    clock += 5
    with pytest.raises(AccessError, match="no 2"):
        await source.identity()


async def assert_gone(pid: int) -> None:
    """Wait until a process has ended."""
    await until(lambda: not is_running(pid))
