"""Flags, help, tables, a template of variables and a JSON schema, derived from the declarations of settings."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from textwrap import fill
from typing import Any

from k8s_consul_registrar.settings.field import Setting
from k8s_consul_registrar.settings.reading import SETTINGS, modes_of

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"
_UNSET = "–"  # noqa: RUF001 - a dash in a table


class _RefusedSecret(argparse.Action):
    """Refuses the flag of a secret without showing its value, as argparse would."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(
            f"{self.dest} has no flag, since every process can read command lines: set the variable {self.dest}"
        )


def add_flags(parser: argparse.ArgumentParser, settings: Iterable[Setting[Any]]) -> None:
    """Add a flag for each setting, in groups; `dest` is the variable."""
    for name, of_group in _groups(settings).items():
        group = parser.add_argument_group(name)
        for one in of_group:
            text = f"{_sentence(one)} Variable: {one.env}.".replace("%", "%%")
            options: dict[str, Any] = {"metavar": "…", "help": text}
            if one.is_boolean:
                options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
            if one.is_secret:
                options = {"nargs": "?", "action": _RefusedSecret, "help": argparse.SUPPRESS}
            group.add_argument(one.flag, dest=one.env, **options)


def help_on_variables() -> str:
    """Return the help on every variable, in groups."""
    lines = []
    for group, settings in _groups(SETTINGS).items():
        lines += ["", f"{group}:"]
        for one in settings:
            marks = "".join(f"[{mode[0]}]" for mode in modes_of(one))
            lines += [f"  {one.env} {marks}", _wrapped(one, "      ")]
    return "\n".join(lines)


def tables(
    helps: Mapping[str, str] | None = None, header: str = "variable | default | meaning"
) -> dict[str, str]:
    """Return a Markdown table for each group; `helps` has the texts of another language."""
    return {group: _table(settings, helps or {}, header) for group, settings in _groups(SETTINGS).items()}


def markdown() -> str:
    """Return every setting in tables."""
    return "\n".join(f"## {group}\n\n{table}" for group, table in tables().items())


def env() -> str:
    """Return a template of a file of variables.

    All are commented out: a variable that is set to its default is not always the same as one that is not set.
    """
    lines = []
    for group, settings in _groups(SETTINGS).items():
        lines += [f"## {group}", ""]
        for one in settings:
            lines += [_wrapped(one, "# "), f"#{one.env}={one.default}", ""]
    return "\n".join(lines)


def json_schema() -> str:
    """Return the JSON schema of the configuration file."""
    schema = {
        "$schema": SCHEMA_ID,
        "title": "Configuration of k8s-consul-registrar",
        "type": "object",
        "additionalProperties": False,
        "properties": properties(SETTINGS),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def properties(settings: Iterable[Setting[Any]]) -> dict[str, Any]:
    """Return the JSON schema of each setting, by its variable."""
    return {one.env: _property(one) for one in settings}


RENDERERS: Mapping[str, Callable[[], str]] = {"markdown": markdown, "json-schema": json_schema, "env": env}
OUTPUTS = tuple(RENDERERS)


def _groups(settings: Iterable[Setting[Any]]) -> dict[str, list[Setting[Any]]]:
    groups: dict[str, list[Setting[Any]]] = {}
    for one in settings:
        groups.setdefault(one.group, []).append(one)
    return groups


def _sentence(one: Setting[Any]) -> str:
    return f"{one.plain_help}.{f' Default: {one.default}.' if one.default else ''}"


def _wrapped(one: Setting[Any], indent: str) -> str:
    return fill(_sentence(one), 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _table(settings: Iterable[Setting[Any]], helps: Mapping[str, str], header: str) -> str:
    lines = [f"| {header} |", "|---|---|---|"]
    for one in settings:
        default = f"`{one.default}`" if one.default else _UNSET
        cells = (f"`{one.env}`", default, helps.get(one.env, one.help))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _property(one: Setting[Any]) -> dict[str, Any]:
    described = {"description": one.plain_help}
    if one.is_secret:
        return {**described, "not": {}}  # refused in a file
    schema = {**one.parser.schema, **described}
    return {**schema, "default": _default(one)} if one.default else schema


def _default(one: Setting[Any]) -> Any:
    match one.parser.schema["type"]:
        case "boolean" | "integer" | "number":
            return json.loads(one.default)
        case "array":
            return one.default.split(",")
        case _:
            return one.default
