"""The command line: modes, flags, help, and how mistakes end."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from k8s_consul_registrar import __version__
from k8s_consul_registrar.cli import main
from k8s_consul_registrar.settings.reading import SETTINGS, modes_of
from support.waiting import PATIENCE, until


def test_help_documents_every_variable(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` names each variable, its default and the commands."""
    with pytest.raises(SystemExit) as raised:
        main(["--help"], {})
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    for option in SETTINGS:
        assert option.env in shown
    for command in ("registrar", "proxy", "demo", "MODE"):
        assert command in shown


@pytest.mark.parametrize("mode", ["registrar", "proxy"])
def test_each_command_documents_its_flags(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every setting a mode heeds is a flag of it, except secrets."""
    with pytest.raises(SystemExit):
        main([mode, "--help"], {})
    shown = capsys.readouterr().out
    for option in SETTINGS:
        is_shown = f"{option.flag} …" in shown or f"{option.flag} [true|false]" in shown
        assert is_shown is (mode in modes_of(option) and not option.is_secret), option.env
        assert option.env in shown or mode not in modes_of(option)


def test_boolean_flag_alone_means_true(capsys: pytest.CaptureFixture[str]) -> None:
    """`--allow-mass-deregister` needs no value, and takes one."""
    home = {"HOME": "/nonexistent", "CLUSTER_NAME": "lab"}
    assert main(["registrar", "--allow-mass-deregister"], home) == 2
    assert "KUBECONFIG" in capsys.readouterr().err
    assert main(["registrar", "--allow-mass-deregister", "maybe"], home) == 2
    assert "ALLOW_MASS_DEREGISTER" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` tells the version."""
    with pytest.raises(SystemExit):
        main(["--version"], {})
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [([], {"MODE": "server"}), (["server"], {}), (["server", "--port", "1"], {})],
)
def test_unknown_mode_names_the_choices(
    arguments: list[str], environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Anything but the known modes is exit 2."""
    assert main(arguments, environment) == 2
    shown = capsys.readouterr().err
    assert "'server'" in shown
    assert "registrar, proxy" in shown


def test_mode_chooses_whose_settings_count(capsys: pytest.CaptureFixture[str]) -> None:
    """MODE=proxy heeds the proxy's settings, and flags count before variables."""
    assert main([], {"MODE": "proxy", "PORT": "x", "CLUSTER_NAME": "a b"}) == 2
    shown = capsys.readouterr().err
    assert "PORT:" in shown
    assert "CLUSTER_NAME" not in shown
    assert main(["--cluster-name", "c d", "--admin-port", "y"], {"CLUSTER_NAME": "fine"}) == 2
    shown = capsys.readouterr().err
    assert "'c d'" in shown
    assert "ADMIN_PORT" in shown


@pytest.mark.parametrize(
    "arguments", [["registrar", "--nope"], ["registrar", "extra"], ["proxy", "--cluster-name", "x"]]
)
def test_unknown_arguments_are_exit_2(arguments: list[str]) -> None:
    """A flag of another mode is unknown too."""
    with pytest.raises(SystemExit) as raised:
        main(arguments, {})
    assert raised.value.code == 2


def test_no_cluster_to_talk_to_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Outside a cluster and without a kubeconfig the message says what is missing."""
    assert main(["registrar", "--cluster-name", "lab"], {"HOME": "/nonexistent"}) == 2
    assert "KUBECONFIG" in capsys.readouterr().err


def test_module_is_the_command() -> None:
    """`python -m k8s_consul_registrar` works, and so does a closed pipe behind --help."""
    done = subprocess.run(
        [sys.executable, "-m", "k8s_consul_registrar", "--version"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"k8s-consul-registrar {__version__}")


@pytest.mark.parametrize(("module", "argument"), [("structlog", "--help"), ("aiohttp", "registrar")])
async def test_ctrl_c_is_quiet_while_modules_load(module: str, argument: str, tmp_path: Path) -> None:
    """An interrupt ends the command with 130 and no traceback, also while the command's own module loads."""
    marker = tmp_path / "loading"
    slow = f"import pathlib, time\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(30)\n"
    (tmp_path / f"{module}.py").write_text(slow)
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "k8s_consul_registrar", argument)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=pipe, stderr=pipe, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    try:

        async def is_loading() -> bool:
            return marker.exists()

        await until(is_loading)
        process.send_signal(signal.SIGINT)
        said = await asyncio.wait_for(process.communicate(), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, *said) == (130, b"", b"")


def test_help_loads_neither_a_command_nor_an_http_client() -> None:
    """The parser is built from declarations, so help and completion are quick and a mode loads only its own parts."""
    program = (
        "import sys\nfrom k8s_consul_registrar.cli import build_parser\nbuild_parser().format_help()\n"
        "print(*sorted(name for name in sys.modules if name.startswith('k8s_consul_registrar.commands.')"
        " or name in ('aiohttp', 'prometheus_client', 'shtab', 'yaml')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
