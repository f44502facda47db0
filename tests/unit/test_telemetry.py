"""Logs are one line an event, in either format, and the libraries' go the same way."""

import io
import json
import logging

import pytest

from k8s_consul_registrar.telemetry import configure_logging, get_logger


def test_json_lines() -> None:
    """Each event is one JSON object that names its part, hostile text included."""
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    get_logger("x").info("said", text="a\nb\x1b[31m")
    get_logger("x").debug("unsaid")
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line)
    assert (event["event"], event["part"], event["level"]) == ("said", "x", "info")
    assert "\x1b" not in line


def test_console_outside_a_terminal_has_no_colours() -> None:
    """The console format is plain text where colours are not shown."""
    stream = io.StringIO()
    configure_logging("debug", "console", stream)
    get_logger("x").debug("said", number=1)
    assert "said" in stream.getvalue()
    assert "\x1b[" not in stream.getvalue()


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_traceback_shows_no_values(log_format: str) -> None:
    """A variable of the function that failed may be a token."""
    stream = io.StringIO()
    configure_logging("info", log_format, stream)

    def fail(token: str) -> None:
        raise ValueError(len(token))

    try:
        fail(f"s3cr3t-{'t0ken'}")
    except ValueError:
        get_logger("x").exception("failed")
        logging.getLogger("aiohttp").exception("failed")
    assert stream.getvalue().count("ValueError: 12") == 2
    assert "s3cr3t-t0ken" not in stream.getvalue()


def test_format_defaults_to_json_off_a_terminal() -> None:
    """A pipe gets JSON."""
    stream = io.StringIO()
    configure_logging("info", "", stream)
    get_logger("x").info("said")
    assert json.loads(stream.getvalue())["event"] == "said"


def test_libraries_log_the_same_way() -> None:
    """A library's warning is a line like ours; its chatter is left out."""
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    logging.getLogger("aiohttp").warning("odd %s", "thing")
    logging.getLogger("aiohttp").info("chatter")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["event"] == "odd thing"
