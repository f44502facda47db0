"""Reads settings out of text and gathers what is wrong instead of stopping at the first mistake."""

import math
import re
from collections.abc import Mapping

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.settings.options import OPTIONS

_DEFAULTS = {option.env: option.default for option in OPTIONS}
_OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
# A year: more is a mistake, and far more no timer can hold.
LONGEST = 366 * 86_400.0
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


class Reader:
    """Typed access to the variables; a variable set to nothing counts as unset."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._problems: list[str] = []
        self.warnings: list[str] = []

    def problem(self, name: str, text: str) -> None:
        """Note a mistake in the setting `name`."""
        self._problems.append(f"{name}: {text}")

    def check(self) -> None:
        """Raise a `SettingsError` with every mistake found so far."""
        if self._problems:
            raise SettingsError(self._problems)

    def is_set(self, name: str) -> bool:
        """Whether the operator gave the setting."""
        return bool(self.environment.get(name, "").strip())

    def text(self, name: str) -> str:
        """Return the setting without spaces around it, or its default."""
        return self.environment.get(name, "").strip() or _DEFAULTS[name]

    def secret(self, name: str) -> str:
        """Return the setting; nothing of it is ever shown."""
        return self.environment.get(name, "").strip()

    def name(self, name: str) -> str:
        """Return a name: letters, digits, '.', '_', '-', at most 50, possibly empty."""
        text = self.text(name)
        if not re.fullmatch(r"[A-Za-z0-9._-]{0,50}", text):
            self.problem(name, f"{text!r} must be letters, digits, '.', '_' or '-', at most 50")
        return text

    def entries(self, name: str) -> tuple[str, ...]:
        """Return a comma-separated list; spaces, empty entries and repeats are dropped, the order is kept."""
        entries = (entry.strip() for entry in self.text(name).split(","))
        return tuple(dict.fromkeys(entry for entry in entries if entry))

    def names(self, name: str) -> frozenset[str]:
        """Return a comma-separated set of names; two quotes stand for the empty one."""
        entries = [entry.strip() for entry in self.text(name).split(",")]
        for entry in entries:
            if entry != '""' and not re.fullmatch(r"[A-Za-z0-9._-]{0,50}", entry):
                self.problem(name, f"{entry!r} must be letters, digits, '.', '_' or '-', at most 50")
        return frozenset("" if entry == '""' else entry for entry in entries if entry)

    def object_name(self, name: str, longest: int) -> str:
        """Return the name of a Kubernetes object, possibly empty: a DNS subdomain (RFC 1123)."""
        text = self.text(name)
        if text and (len(text) > longest or not _OBJECT_NAME.fullmatch(text)):
            self.problem(name, f"{text[:80]!r} is no name of a Kubernetes object of at most {longest}")
        return text

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Return one of the choices, in lower case."""
        text = self.text(name).lower()
        if text and text not in choices:
            self.problem(name, f"{text!r} is none of {', '.join(choices)}")
        return text

    def boolean(self, name: str) -> bool:
        """Return true or false."""
        text = self.text(name).lower()
        if text not in _TRUE | _FALSE:
            self.problem(name, f"{text!r} is neither true nor false")
        return text in _TRUE

    def integer(self, name: str, least: int, most: int) -> int:
        """Return a whole number between two bounds."""
        text = self.text(name)
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            self.problem(name, f"{text!r} is not a whole number from {least} to {most}")
            return least
        return int(text)

    def seconds(self, name: str, least: float = 0.0) -> float:
        """Return a time in seconds, at least `least` and at most `LONGEST`."""
        value = parse_seconds(self.text(name))
        if value is None or value < least:
            self.problem(name, f"{self.text(name)!r} is not a number of seconds, {least:g} or more")
            return least
        if value > LONGEST:
            self.problem(name, f"{self.text(name)!r} is more than {LONGEST:.0f} seconds, a year")
            return least
        return value


def parse_seconds(text: str) -> float | None:
    """Read a finite number, None where it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and text.isascii() else None
