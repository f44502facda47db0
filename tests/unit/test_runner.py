"""Errors as exit codes, and the module of each command."""

import logging
from importlib import import_module
from unittest.mock import Mock

import pytest

from k8s_consul_registrar.asyncio_tools import new_loop
from k8s_consul_registrar.commands import COMMANDS, Command
from k8s_consul_registrar.errors import AccessError, ClusterForbidden, ConsulUnreachable, SettingsError
from k8s_consul_registrar.runner import exit_code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            SettingsError(["PORT: wrong", "CLUSTER_NAME: wrong"]),
            2,
            "  - PORT: wrong\n  - CLUSTER_NAME: wrong\n",
        ),
        (AccessError("KUBECONFIG: cannot be read"), 2, "  - KUBECONFIG: cannot be read\n"),
        (ConsulUnreachable("no answer"), 1, "k8s-consul-registrar: no answer\n"),
        (ClusterForbidden("list pods"), 1, "k8s-consul-registrar: list pods\n"),
        (KeyboardInterrupt(), 130, ""),
        (EOFError(), 130, ""),
    ],
)
def test_exit_code_of_an_expected_error_is_its_own_and_said_in_lines(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind of error has one exit code, and its text is on stderr without a traceback."""

    def command() -> int:
        raise error

    assert exit_code(command) == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_exit_code_of_a_command_that_ends_is_its_own() -> None:
    """A command's own exit code is passed on."""
    assert exit_code(lambda: 3) == 3


def test_exit_code_of_a_fault_is_not_hidden() -> None:
    """An error that is not raised on purpose keeps its traceback."""

    def command() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_code(command)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_command_has_a_module_of_its_name(command: Command) -> None:
    """The module or package that a command loads has the function `run`."""
    module = command.name.replace("-", "_")
    assert callable(import_module(f"k8s_consul_registrar.commands.{module}").run)


@pytest.mark.parametrize(
    ("error", "is_closed", "is_logged"),
    [
        (RuntimeError("the handler is closed"), True, False),
        (RuntimeError("the handler is closed"), False, True),
        (ZeroDivisionError("a fault"), True, True),
    ],
)
def test_error_of_the_loop_is_logged_unless_it_only_tells_of_a_close(
    error: Exception, is_closed: bool, is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """TLS that writes to a connection closed in the same turn leaves no traceback; a fault does."""
    loop = new_loop()
    transport = Mock(is_closing=Mock(return_value=is_closed))
    with caplog.at_level(logging.ERROR):
        loop.call_exception_handler(
            {"message": "Fatal error on SSL protocol", "exception": error, "transport": transport}
        )
    loop.close()
    assert [record.getMessage().splitlines()[0] for record in caplog.records] == (
        ["Fatal error on SSL protocol"] if is_logged else []
    )
