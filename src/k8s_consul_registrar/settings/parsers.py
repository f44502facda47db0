"""Parsers of settings: a text becomes a value or a ValueError, and a JSON schema says which values there are.

Each argument of the ValueError is one mistake, worded for an operator.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from k8s_consul_registrar.targets.annotations import Duration, parse_duration

T = TypeVar("T")

# A longer time is a mistake, and timers cannot hold one that is much longer.
LONGEST = 366 * 86_400.0  # seconds, a year
TEXT: Mapping[str, Any] = {"type": "string"}
TEXTS: Mapping[str, Any] = {"type": "array", "items": TEXT}
# Kubernetes, "Object Names and IDs": names of objects and prefixes of keys are DNS subdomains, those of
# namespaces are labels.
_OBJECT_NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_NAMESPACE = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


@dataclass(frozen=True, slots=True)
class Parser(Generic[T]):
    """A way to read a setting; `schema` is the JSON schema of its value in a configuration file."""

    parse: Callable[[str], T]
    schema: Mapping[str, Any]


class Corrected(Exception):
    """A text that cannot be used as it is: `value` takes its place, with a warning."""

    def __init__(self, value: object, warning: str) -> None:
        super().__init__(warning)
        self.value = value


def matching(pattern: str, problem: str) -> Parser[str]:
    """Take a text that matches a pattern, or none."""

    def parse(given: str) -> str:
        if given and not re.fullmatch(pattern, given):
            raise ValueError(f"{given[:80]!r} {problem}")
        return given

    return Parser(parse, {**TEXT, "pattern": f"^({pattern})?$"})


def object_name(longest: int) -> Parser[str]:
    """Take the name of a Kubernetes object, or none: a DNS subdomain (RFC 1123)."""
    return matching(
        f"(?=.{{1,{longest}}}$){_OBJECT_NAME}", f"is no name of a Kubernetes object of at most {longest}"
    )


def split(given: str) -> tuple[str, ...]:
    """Return the entries of a comma-separated list in order, without spaces, empty entries and repeats."""
    return tuple(dict.fromkeys(entry for part in given.split(",") if (entry := part.strip())))


def entries(parse_one: Callable[[str], T], *, empty: str = "", **schema: Any) -> Parser[tuple[T, ...]]:
    """Take a comma-separated list; `empty` is what is wrong with a text without entries."""

    def parse(given: str) -> tuple[T, ...]:
        parsed: list[T] = []
        problems: list[str] = []
        for entry in split(given):
            try:
                parsed.append(parse_one(entry))
            except ValueError as error:
                problems += error.args
        if given and empty and not parsed and not problems:
            problems.append(empty)
        if problems:
            raise ValueError(*problems)
        return tuple(parsed)

    return Parser(parse, {"type": "array", "items": {**TEXT, **schema}})


def choice(*words: str) -> Parser[str]:
    """Take one of these words, in any case, or none."""

    def parse(given: str) -> str:
        return _one_of(words, given.lower()) if given else ""

    return Parser(parse, {**TEXT, "enum": list(words)})


def choices(*words: str, empty: str = "") -> Parser[tuple[str, ...]]:
    """Take a comma-separated list of some of these words."""
    return entries(lambda entry: _one_of(words, entry), empty=empty, enum=list(words))


def _one_of(words: tuple[str, ...], given: str) -> str:
    if given not in words:
        raise ValueError(f"{given!r} is none of {', '.join(words)}")
    return given


def integer(least: int, most: int, *, unset: int | None = None) -> Parser[int]:
    """Take a whole number between two bounds; `unset` is the value if none is given."""

    def parse(given: str) -> int:
        if not given and unset is not None:
            return unset
        if not re.fullmatch(r"[0-9]{1,9}", given) or not least <= int(given) <= most:
            raise ValueError(f"{given!r} is not a whole number from {least} to {most}")
        return int(given)

    return Parser(parse, {"type": "integer", "minimum": least, "maximum": most})


def seconds(minimum: float = 0.0) -> Parser[float]:
    """Take a time in seconds from `minimum` to `LONGEST`."""

    def parse(given: str) -> float:
        value = number(given)
        if value is None or value < minimum:
            raise ValueError(f"{given!r} is not a number of seconds, {minimum:g} or more")
        if value > LONGEST:
            raise ValueError(f"{given!r} is more than {LONGEST:.0f} seconds, a year")
        return value

    return Parser(parse, {"type": "number", "minimum": minimum, "maximum": LONGEST})


def duration(*, is_zero_allowed: bool = False) -> Parser[Duration | None]:
    """Take a duration as Prometheus writes it, or none."""

    def parse(given: str) -> Duration | None:
        if not given:
            return None
        try:
            value = parse_duration(given)
        except ValueError as error:
            raise ValueError(f"{given[:80]!r} {error}") from None
        if not (value.milliseconds or is_zero_allowed):
            raise ValueError(f"{given!r} must be more than 0")
        return value

    return Parser(parse, TEXT)


def number(given: str) -> float | None:
    """Return a finite number, None if the text is none."""
    try:
        value = float(given)
    except ValueError:
        return None
    return value if math.isfinite(value) and given.isascii() else None


def is_path(given: str) -> bool:
    """Return True if a text is a path beyond doubt, so that it may be shown."""
    return given.startswith(("/", "./", "../", "~/"))


def _boolean(given: str) -> bool:
    word = given.lower()
    if word not in _TRUE | _FALSE:
        raise ValueError(f"{word!r} is neither true nor false")
    return word in _TRUE


def _printable(given: str) -> str:
    if not given.isprintable():
        raise ValueError("is not printable")
    return given


def _file(given: str) -> str:
    """Take the path of a file; its content, given by mistake, is refused without being shown."""
    if any(char < " " for char in given) or "-----BEGIN" in given or given.startswith("{"):
        raise ValueError("must be the path of a file, not its content")
    return given


def _secret_file(given: str) -> str:
    """Take the path of a file with a secret.

    The secret may be given by mistake, so a text that is neither an absolute path nor an existing file is
    refused without being shown.
    """
    if _file(given) and not is_path(given) and not Path(given).exists():
        raise ValueError("there is no such file; the value is not shown, as it may be the secret itself")
    return given


text = Parser(str, TEXT)
selector = Parser(_printable, TEXT)  # the API server parses it
annotation_prefix = matching(
    rf"(?=.{{1,253}}/$){_OBJECT_NAME}/", "is not a DNS name in lower case and a slash"
)
_namespace = matching(_NAMESPACE, "is no namespace: lower-case letters, digits and '-', at most 63")
namespaces = entries(_namespace.parse, empty="names no namespace", pattern=f"^{_NAMESPACE}$")
boolean = Parser(_boolean, {"type": "boolean"})
port = integer(0, 65535)
file = Parser(_file, TEXT)
secret_file = Parser(_secret_file, TEXT)
name = matching(r"[A-Za-z0-9._-]{0,50}", "must be letters, digits, '.', '_' or '-', at most 50")
_names = entries(lambda entry: "" if entry == '""' else name.parse(entry))
# Two quotes stand for the empty name.
names: Parser[frozenset[str]] = Parser(lambda given: frozenset(_names.parse(given)), TEXTS)
