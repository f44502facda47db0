"""The settings of a run: texts of configuration file, environment and flags in, frozen values out."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from k8s_consul_registrar.settings.common import ModeSettings
from k8s_consul_registrar.settings.config_file import read_config
from k8s_consul_registrar.settings.field import Given, Reader, Setting, declared
from k8s_consul_registrar.settings.lookalikes import lookalikes
from k8s_consul_registrar.settings.proxy import ProxySettings
from k8s_consul_registrar.settings.registrar import RegistrarSettings

REGISTRAR = "registrar"
PROXY = "proxy"
MODES = (REGISTRAR, PROXY)
_KINDS: Mapping[str, type[ModeSettings]] = {REGISTRAR: RegistrarSettings, PROXY: ProxySettings}
_BY_MODE = {mode: {one.env: one for one in declared(kind)} for mode, kind in _KINDS.items()}
# Every setting: those of both modes first.
_SHARED = {env: one for env, one in _BY_MODE[REGISTRAR].items() if env in _BY_MODE[PROXY]}
SETTINGS: tuple[Setting[Any], ...] = tuple((_SHARED | _BY_MODE[REGISTRAR] | _BY_MODE[PROXY]).values())

M = TypeVar("M", bound=ModeSettings)


def settings_of(mode: str) -> Iterator[Setting[Any]]:
    """Yield the settings of a mode."""
    return (one for one in SETTINGS if one.env in _BY_MODE[mode])


def modes_of(setting: Setting[Any]) -> tuple[str, ...]:
    """Return the modes that have a setting."""
    return tuple(mode for mode in MODES if setting.env in _BY_MODE[mode])


def shown_settings(environment: Mapping[str, str], mode: str = REGISTRAR) -> dict[str, str]:
    """Return the settings of a mode as anyone may see them: of a secret, only that it is set."""
    return {one.env: one.shown(environment) for one in settings_of(mode)}


def gather(
    environment: Mapping[str, str], flags: Mapping[str, str] | None = None, config: str | None = None
) -> Given:
    """Return the texts of all sources: flags take precedence over the environment, and that over a file."""
    given = Given(environment)
    if config is not None:
        read_config(config, {one.env: one for one in SETTINGS}, given)
    for name, text in (flags or {}).items():
        given[name] = text
        given.origins.pop(name, None)
    return given


def read_registrar(environment: Mapping[str, str]) -> RegistrarSettings:
    """Read the registrar's settings; raises a `SettingsError` with every mistake."""
    return _read(RegistrarSettings, environment)


def read_proxy(environment: Mapping[str, str]) -> ProxySettings:
    """Read the proxy's settings; raises a `SettingsError` with every mistake."""
    return _read(ProxySettings, environment)


def _read(kind: type[M], environment: Mapping[str, str]) -> M:
    reader = Reader(environment, kind)
    settings = reader.section(kind)
    reader.finish()
    resembling = lookalikes(environment, {one.env for one in SETTINGS})
    warnings = (
        *reader.warnings,
        *(f"{name} is not a setting: {' or '.join(near)} is meant?" for name, near in resembling.items()),
    )
    changes: dict[str, Any] = {"environment": environment, "warnings": warnings}
    return replace(settings, common=replace(settings.common, **changes))
