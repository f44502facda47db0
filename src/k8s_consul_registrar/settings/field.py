"""Declarations of settings, and the reader that turns texts into values of the declared fields."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar, cast

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.settings.parsers import Corrected, Parser

T = TypeVar("T")
_SETTING = "setting"
_SECTION = "section"
# Kubernetes sets `<SERVICE>_PORT=tcp://…` for each Service of the namespace unless enableServiceLinks is false.
SERVICE_LINK = re.compile(r"(?:tcp|udp|sctp)://\S+")


class Section:
    """Some settings: a frozen dataclass whose fields are declared with `Setting` and `section`.

    `group` is the heading of its settings in the help and the docs.
    """

    __slots__ = ()
    GROUP = ""

    def __init_subclass__(cls, *, group: str = "") -> None:
        if group:  # `dataclass` makes the class a second time, and without it
            cls.GROUP = group

    def check(self, reader: "Reader") -> None:
        """Report what is wrong with, or has no effect on, these values together."""


S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class Setting(Generic[T]):
    """One setting, by default of its section's group.

    A secret has no flag, since every process can read command lines. `complete` adds to the parsed value what
    depends on other settings. `help` is a phrase without a full stop at its end, names and values in backticks.
    """

    env: str
    parser: Parser[T]
    default: str = ""
    group: str = ""
    is_secret: bool = False
    complete: "Callable[[T, Reader], T] | None" = None
    help: str = ""

    def means(self, help: str) -> T:  # noqa: A002 - as in argparse
        """Declare a field of a `Section` as this setting; without a reader it has the parsed default."""
        metadata = {_SETTING: replace(self, help=help)}
        return field(default=self.parser.parse(self.default), repr=not self.is_secret, metadata=metadata)

    @property
    def flag(self) -> str:
        """The flag: the variable's name in the style of flags."""
        return "--" + self.env.lower().replace("_", "-")

    @property
    def is_boolean(self) -> bool:
        """True if the setting is true or false, so that its flag without a value means true."""
        return bool(self.parser.schema["type"] == "boolean")

    @property
    def plain_help(self) -> str:
        """The help text for a terminal, without backticks."""
        return self.help.replace("`", "")

    def text_in(self, environment: Mapping[str, str]) -> str:
        """Return the text that was given, empty if none was; only spaces count as none."""
        return environment.get(self.env, "").strip()

    def shown(self, environment: Mapping[str, str]) -> str:
        """Return the text in effect as anyone may see it: of a secret, only that it is set."""
        text = self.text_in(environment)
        if self.is_secret:
            return "set" if text else "not set"
        return text or self.default


def section(kind: type[S], *, when: str = "") -> S:
    """Declare a field of a `Section` as another section.

    With `when` the field is None unless that setting is given and not false; mistakes in it count anyway.
    """
    metadata = {_SECTION: (kind, when)}
    if when:
        return field(default=cast("S", None), metadata=metadata)
    return field(default_factory=kind, metadata=metadata)


def declared(kind: type[Section]) -> Iterator[Setting[Any]]:
    """Yield the settings of a section and of the sections in it."""
    for one in fields(cast("Any", kind)):
        if _SETTING in one.metadata:
            found: Setting[Any] = one.metadata[_SETTING]
            yield found if found.group else replace(found, group=kind.GROUP)
        elif _SECTION in one.metadata:
            yield from declared(one.metadata[_SECTION][0])


class Given(dict[str, str]):
    """The texts of settings by variable, from several sources: a later source takes precedence.

    `problems` are mistakes made in a source, `origins` says where a text is from if not from the environment.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__(environment)
        self.problems: list[str] = []
        self.origins: dict[str, str] = {}


class Reader:
    """The values of declared settings, parsed once each; mistakes are collected, not raised one by one."""

    def __init__(self, environment: Mapping[str, str], kind: type[Section]) -> None:
        self._environment = environment
        self._settings = {one.env: one for one in declared(kind)}
        self._origins = environment.origins if isinstance(environment, Given) else {}
        self._problems = list(environment.problems) if isinstance(environment, Given) else []
        self._values: dict[str, Any] = {}
        self.warnings: list[str] = []

    def is_set(self, name: str) -> bool:
        """Return True if the setting was given."""
        return bool(self._settings[name].text_in(self._environment))

    def value(self, name: str) -> Any:
        """Return the parsed value of a setting, that of its default if the given text is a mistake."""
        if name not in self._values:
            one = self._settings[name]
            self._values[name] = self._parse(one, one.text_in(self._environment))
        return self._values[name]

    def problem(self, name: str, text: str) -> None:
        """Report a mistake in the setting `name`."""
        origin = self._origins.get(name)
        self._problems.append(f"{name}: {text}{f' (in {origin})' if origin else ''}")

    def require_pair(self, certificate: str, key: str) -> None:
        """Report a certificate without its key, and a key without its certificate."""
        for name, other in ((certificate, key), (key, certificate)):
            if self.is_set(name) and not self.is_set(other):
                self.problem(other, f"is missing: {name} needs it")

    def require_server_tls(self, prefix: str) -> None:
        """Report files for TLS of a port that the program opens, if they need another one."""
        self.require_pair(f"{prefix}_CERT_FILE", f"{prefix}_KEY_FILE")
        if self.is_set(f"{prefix}_CLIENT_CA_FILE") and not self.is_set(f"{prefix}_CERT_FILE"):
            self.problem(
                f"{prefix}_CLIENT_CA_FILE",
                f"needs {prefix}_CERT_FILE: without TLS no client shows a certificate",
            )

    def section(self, kind: type[S]) -> S:
        """Return a section with the values that were given."""
        values: dict[str, Any] = {}
        for one in fields(cast("Any", kind)):
            if _SETTING in one.metadata:
                declaration: Setting[Any] = one.metadata[_SETTING]
                value = self.value(declaration.env)
                complete = declaration.complete
                values[one.name] = complete(value, self) if complete else value
            elif _SECTION in one.metadata:
                inner, when = one.metadata[_SECTION]
                made = self.section(inner)
                is_wanted = not when or (self.is_set(when) and self.value(when) is not False)
                values[one.name] = made if is_wanted else None
        whole = kind(**values)
        whole.check(self)
        return whole

    def finish(self) -> None:
        """Raise a `SettingsError` with every mistake, if there are any."""
        if self._problems:
            raise SettingsError(self._problems)

    def _parse(self, one: Setting[Any], text: str) -> Any:
        try:
            return one.parser.parse(text or one.default)
        except Corrected as corrected:
            self.warnings.append(f"{one.env} {corrected}")
            return corrected.value
        except ValueError as error:
            for problem in error.args:
                self.problem(one.env, f"{problem}{_service_link_hint(one, text)}")
            return one.parser.parse(one.default)


def _service_link_hint(one: Setting[Any], text: str) -> str:
    if one.is_secret or not SERVICE_LINK.fullmatch(text):
        return ""
    return "; Kubernetes sets it so for a Service of that name: set enableServiceLinks to false"
