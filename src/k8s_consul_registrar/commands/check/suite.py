"""All checks: each looks for one thing that a mode needs, and says what to do if it is missing."""

import argparse
import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands.check.cluster import (
    PROXY_PERMISSIONS,
    ClusterView,
    Permission,
    check_cluster,
    event_permissions,
    lease_permissions,
    source_permissions,
)
from k8s_consul_registrar.commands.check.consul import check_backend
from k8s_consul_registrar.commands.check.delivery import URL_FLAG, check_delivery
from k8s_consul_registrar.commands.check.http_sd import check_file_sd, check_http_sd, check_state_file
from k8s_consul_registrar.commands.check.nodes import check_node_port, check_proxied
from k8s_consul_registrar.commands.check.report import Finding, as_json, as_table, fail, is_passed, ok, warn
from k8s_consul_registrar.errors import AccessError, SettingsError
from k8s_consul_registrar.runner import EXIT_FAILURE, EXIT_OK, run_loop
from k8s_consul_registrar.settings.proxy import ProxySettings
from k8s_consul_registrar.settings.reading import MODES, PROXY, REGISTRAR, read_proxy, read_registrar
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.telemetry import configure_logging
from k8s_consul_registrar.wiring.registrar import Wiring

# A person waits for the answer, so timeouts are shorter than the daemon's; in seconds.
TIMING = Timing(connect_timeout=3, read_timeout=6)
LONGEST = 30.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CheckedModes:
    """The modes to check, each with its settings; None for a mode that is not asked about."""

    registrar: RegistrarSettings | None
    proxy: ProxySettings | None
    environment: Mapping[str, str]


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Check what the chosen modes need, and show the findings; exit 1 if anything failed."""
    if parsed.what == "delivery":
        return _run_delivery(parsed, environment)
    mode = parsed.what or environment.get("MODE", "").strip().lower()
    modes = read_modes((mode,) if mode in MODES else MODES, environment)
    configure_logging("error", "console")
    return run_loop(_check_and_show(modes, output=parsed.output))


def _run_delivery(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    if not parsed.prometheus:
        raise SettingsError([f"{URL_FLAG} is missing: check delivery asks that collector"])
    settings = read_registrar(environment)
    configure_logging("error", "console")
    found = check_delivery(settings, parsed.prometheus, parsed.prometheus_token_file, TIMING)
    return run_loop(_show(found, output=parsed.output))


async def _check_and_show(modes: CheckedModes, *, output: str) -> int:
    return await _show(check(modes), output=output)


async def _show(checking: Awaitable[list[Finding]], *, output: str) -> int:
    findings = await checking
    is_terminal = output == "table" and sys.stdout.isatty()
    if output == "json":
        print(as_json(findings))
    else:
        width = shutil.get_terminal_size().columns if is_terminal else 0
        print(as_table(findings, width=width, is_coloured=is_terminal and not os.environ.get("NO_COLOR")))
    return EXIT_OK if is_passed(findings) else EXIT_FAILURE


def read_modes(modes: Collection[str], environment: Mapping[str, str]) -> CheckedModes:
    """Read the settings of these modes; raises a `SettingsError` with every mistake in them."""
    problems: list[str] = []

    def read(mode: str, reader: Callable[[Mapping[str, str]], T]) -> T | None:
        try:
            return reader(environment) if mode in modes else None
        except SettingsError as error:
            problems.extend(error.problems)
            return None

    checked = CheckedModes(read(REGISTRAR, read_registrar), read(PROXY, read_proxy), environment)
    if problems:
        raise SettingsError(list(dict.fromkeys(problems)))
    return checked


async def check(modes: CheckedModes, timing: Timing = TIMING) -> list[Finding]:
    """Check everything concurrently, each part within LONGEST seconds."""
    looking = check_cluster(modes.environment, timing, _permissions(modes), needs_uid=bool(modes.registrar))
    cluster = asyncio.ensure_future(_within("cluster", looking, lambda late: ClusterView((late,))))
    parts: list[Awaitable[list[Finding]]] = []

    def add(name: str, work: Awaitable[list[Finding]]) -> None:
        parts.append(_within(name, work, lambda late: [late]))

    if modes.registrar:
        wiring = Wiring(modes.registrar, timing)
        add("consul", check_backend(wiring, cluster))
        if modes.registrar.http_sd:
            add("http_sd", check_http_sd(modes.registrar.http_sd, timing.read_timeout))
        if modes.registrar.state_file:
            add("http_sd", check_state_file(Path(modes.registrar.state_file), wiring.origin))
        if modes.registrar.file_sd_path:
            add("file_sd", check_file_sd(Path(modes.registrar.file_sd_path)))
        add("node port", check_node_port(wiring, cluster))
    if modes.proxy:
        add("kubelets", check_proxied(modes.proxy, cluster, timing.read_timeout))
    found = await asyncio.gather(*parts)
    of_cluster = (await cluster).findings
    return [*_settings(modes), *of_cluster, *(finding for part in found for finding in part)]


async def _within(name: str, work: Awaitable[T], if_late: Callable[[Finding], T]) -> T:
    try:
        async with asyncio.timeout(LONGEST):
            return await work
    except TimeoutError:
        hint = "something accepts connections and does not answer"
        return if_late(fail(name, f"not done within {LONGEST:g} s", hint))


def _settings(modes: CheckedModes) -> list[Finding]:
    chosen = {mode: value for mode, value in ((REGISTRAR, modes.registrar), (PROXY, modes.proxy)) if value}
    warnings = dict.fromkeys(text for value in chosen.values() for text in value.common.warnings)
    if warnings:
        return [warn("settings", text) for text in warnings]
    return [ok("settings", f"those of the {' and the '.join(chosen)} can be read")]


def _permissions(modes: CheckedModes) -> tuple[Permission, ...]:
    """Return the rights that these modes need at the API server, each once."""
    of_registrar = _registrar_permissions(modes.registrar) if modes.registrar else ()
    pods = modes.proxy.pods if modes.proxy else None
    of_proxy = PROXY_PERMISSIONS if modes.proxy else ()
    return tuple(
        dict.fromkeys((*of_registrar, *of_proxy, *(source_permissions(pods.sources) if pods else ())))
    )


def _registrar_permissions(settings: RegistrarSettings) -> tuple[Permission, ...]:
    followed = source_permissions(settings.sources)
    if settings.emit_events != "none":
        followed += event_permissions(settings.selection.sources)
    if settings.election is None:
        return followed
    wiring = Wiring(settings)
    try:
        namespace = wiring.lease_namespace
    except AccessError:  # outside of a Pod the place of the Lease is not known
        namespace = "default"
    return (*followed, *lease_permissions(namespace, wiring.lease_name))
