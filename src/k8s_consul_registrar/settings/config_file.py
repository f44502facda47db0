"""The configuration file: YAML with the names of the variables as keys."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k8s_consul_registrar.settings.field import Given, Setting
from k8s_consul_registrar.settings.lookalikes import nearest
from k8s_consul_registrar.settings.parsers import is_path

LARGEST = 1 << 20  # bytes
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,60}")
_FILE_NAME = re.compile(r"[\w.-]+\.(?:ya?ml|json)")


class _Unusable(Exception):
    """The file or a value in it cannot be used; the text says why and quotes no value."""


_EXPECTED = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "object": "a mapping",
    "string": "a text",
}


def read_config(path: str, settings: Mapping[str, Setting[Any]], given: Given) -> None:
    """Add the texts of a file to `given` where the environment has none, and its mistakes."""
    shown = path if is_path(path) or _FILE_NAME.fullmatch(path) else ""
    try:
        content = _load(_read(Path(path)))
    except _Unusable as problem:
        given.problems.append(f"--config{f' {shown}' if shown else ''}: {problem}")
        return
    origin = shown or "the configuration file"
    for key, value in content.items():
        try:
            setting = _setting_of(key, settings)
            text = _text(setting, value)
        except _Unusable as problem:
            name = key if isinstance(key, str) and _KEY.fullmatch(key) else "a key"
            given.problems.append(f"{name}: {problem} (in {origin})")
            continue
        if text and not setting.text_in(given):
            given[setting.env] = text
            given.origins[setting.env] = origin


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise _Unusable("there is no such file") from None
    except IsADirectoryError:
        raise _Unusable("is a directory, not a file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is no path"
        raise _Unusable(f"cannot be read: {reason}") from None
    if len(content) > LARGEST:
        raise _Unusable(f"is larger than {LARGEST >> 20} MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _Unusable("is not a text in UTF-8") from None
    if not text.strip():
        raise _Unusable("is empty")
    return text


def _load(text: str) -> Mapping[Any, Any]:
    import yaml  # noqa: PLC0415 - only a configuration file needs it

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice; YAML would use the last one."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in dict.fromkeys(keys):
                if keys.count(key) > 1:
                    name = f"the key {key}" if _KEY.fullmatch(key) else "a key"
                    raise _Unusable(f"has {name} more than once")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise _Unusable(f"is not valid YAML{where}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise _Unusable("is not valid YAML") from None
    if content is None:
        raise _Unusable("is empty")
    if not isinstance(content, Mapping):
        raise _Unusable("is not a mapping of settings to values")
    return content


def _setting_of(key: object, settings: Mapping[str, Setting[Any]]) -> Setting[Any]:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise _Unusable("is not the name of a setting")
    if key == "MODE":
        raise _Unusable("is not read from a file: name the mode as the command, or set the variable")
    if key not in settings:
        name = key.upper().replace("-", "_")
        near = [name] if name in settings else nearest(name, settings)
        raise _Unusable("is not a setting" + (f": {' or '.join(near)} is meant?" if near else ""))
    setting = settings[key]
    if setting.is_secret:
        other = f" or {key}_FILE" if f"{key}_FILE" in settings else ""
        raise _Unusable(f"is a secret and must not be in a configuration file: use the variable{other}")
    return setting


def _text(setting: Setting[Any], value: object) -> str:
    """Return a value as the text that a variable would have; raises _Unusable."""
    kind = setting.parser.schema["type"]
    if value is None:
        return ""
    if isinstance(value, Mapping) and kind == "object":
        return ",".join(f"{_part(key, '=')}={_part(one, '=')}" for key, one in value.items())
    if isinstance(value, list) and kind in ("array", "object"):
        return ",".join(_part(one) or '""' for one in value)
    if isinstance(value, bool) and kind == "boolean":
        return "true" if value else "false"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and kind in ("integer", "number"):
        return f"{value}"
    if isinstance(value, str):
        return _printable(value)
    raise _Unusable(f"must be {_EXPECTED[kind]}{_quoting(value) if kind == 'string' else ''}")


def _quoting(value: object) -> str:
    """Return what repairs a text that YAML takes for something else (`no`, `1e3`, `2026-01-02`)."""
    return "" if isinstance(value, (list, Mapping)) else ": put it in quotes"


def _part(value: object, *taken: str) -> str:
    """Return an entry of a list or a side of a mapping."""
    if not isinstance(value, str):
        raise _Unusable(f"must hold texts only{_quoting(value)}")
    for char in (",", *taken):
        if char in value:
            raise _Unusable(f"holds an entry with {char!r}, which separates entries")
    return _printable(value).strip()


def _printable(text: str) -> str:
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise _Unusable("holds characters that no variable can have")
    return text
