"""Logs: one structured line an event, in JSON for machines or in colour for a terminal."""

import logging
import sys
from collections.abc import Collection
from typing import Any, TextIO

import structlog

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("json", "console")
# Texts of one failure that are logged; more of them are noise.
MOST_TEXTS = 20


def configure_logging(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Send every log line, our own and the libraries', to `stream` (stderr) in one format.

    An empty `log_format` picks console on a terminal and json elsewhere.
    """
    stream = stream or sys.stderr
    chosen = log_format or ("console" if stream.isatty() else "json")
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if chosen == "json":
        last: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # What structlog prefers where `rich` is installed shows local variables, and so secrets.
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # The libraries' own chatter is of use only when it warns.
    root.setLevel(max(number, logging.WARNING))


def get_logger(name: str) -> Any:
    """Return the logger of one part of the program; `part` names it in every line."""
    return structlog.get_logger(part=name)


class Failures:
    """Failures that last: each text is logged once until the failure is over, as texts may alternate."""

    def __init__(self, most_texts: int = MOST_TEXTS) -> None:
        self._most_texts = most_texts
        self._logged: dict[str, set[str]] = {}

    def fresh(self, problems: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
        """Note that just these failures stand, each with a text; return those that were not logged yet."""
        self._logged = {about: self._logged.get(about, set()) for about, _ in problems}
        fresh = []
        for about, text in problems:
            logged = self._logged[about]
            if text not in logged and len(logged) < self._most_texts:
                logged.add(text)
                fresh.append((about, text))
        return fresh
