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
    NEVER_NEEDED,
    PROXY_PERMISSIONS,
    Permission,
    check_credentials,
    check_identity,
    check_permissions,
    check_server,
    lease_permissions,
    some_nodes,
    source_permissions,
)
from k8s_consul_registrar.commands.check.consul import (
    Naming,
    NeededRight,
    check_consul,
    check_token,
    naming_of,
    need_of_agent,
    need_of_catalog,
    need_of_lost_agents,
    needs_of_services,
)
from k8s_consul_registrar.commands.check.http_sd import check_http_sd, check_state_file
from k8s_consul_registrar.commands.check.nodes import Kubelets, check_kubelets, check_node_port
from k8s_consul_registrar.commands.check.report import (
    Finding,
    Result,
    as_json,
    as_table,
    fail,
    is_passed,
    ok,
    skipped,
    warn,
)
from k8s_consul_registrar.commands.check.services import holdings, judge_catalog, judge_holdings
from k8s_consul_registrar.consul.acl import read_service_names
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.errors import AccessError, ConsulError, SettingsError
from k8s_consul_registrar.kube.access import Access, load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.model import Kind, Node
from k8s_consul_registrar.runner import EXIT_FAILURE, EXIT_OK
from k8s_consul_registrar.runner import run as run_loop
from k8s_consul_registrar.settings.consul import CATALOG, NONE
from k8s_consul_registrar.settings.proxy import ProxySettings
from k8s_consul_registrar.settings.reading import MODES, PROXY, REGISTRAR, read_proxy, read_registrar
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.telemetry import configure_logging
from k8s_consul_registrar.wiring.consul import consul_access
from k8s_consul_registrar.wiring.proxy import KubeletIdentity
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

    @property
    def permissions(self) -> tuple[Permission, ...]:
        """The rights that these modes need at the API server, each once."""
        of_registrar = _registrar_permissions(self.registrar) if self.registrar else ()
        of_proxy = _proxy_permissions(self.proxy) if self.proxy else ()
        return tuple(dict.fromkeys((*of_registrar, *of_proxy)))


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The outcome of the first look at the cluster; a part that could not be read is empty."""

    findings: tuple[Finding, ...]
    access: Access | None = None
    uid: str = ""
    nodes: tuple[Node, ...] = ()


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Check what the chosen modes need, and show the findings; exit 1 if anything failed."""
    mode = parsed.what or environment.get("MODE", "").strip().lower()
    modes = read_modes((mode,) if mode in MODES else MODES, environment)
    configure_logging("error", "console")
    return run_loop(_check_and_show(modes, output=parsed.output))


async def _check_and_show(modes: CheckedModes, *, output: str) -> int:
    findings = await check(modes)
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
    registrar = proxy = None
    try:
        registrar = read_registrar(environment) if REGISTRAR in modes else None
    except SettingsError as error:
        problems += error.problems
    try:
        proxy = read_proxy(environment) if PROXY in modes else None
    except SettingsError as error:
        problems += error.problems
    if problems:
        raise SettingsError(list(dict.fromkeys(problems)))
    return CheckedModes(registrar, proxy, environment)


async def check(modes: CheckedModes, timing: Timing = TIMING) -> list[Finding]:
    """Look at everything at once, as far as one thing does not need another, within LONGEST seconds."""
    cluster = asyncio.ensure_future(_within("cluster", _check_cluster(modes, timing), _late_view))
    parts: list[Awaitable[list[Finding]]] = []

    def add(name: str, work: Awaitable[list[Finding]]) -> None:
        parts.append(_within(name, work, lambda late: [late]))

    if modes.registrar:
        wiring = Wiring(modes.registrar, timing)
        add("consul", _check_consul(wiring, cluster))
        if modes.registrar.http_sd:
            add("http_sd", check_http_sd(modes.registrar.http_sd, timing.read_timeout))
        if modes.registrar.state_file:
            add("http_sd", check_state_file(Path(modes.registrar.state_file), wiring.origin))
        add("node port", _check_node_port(wiring, cluster))
    if modes.proxy:
        add("kubelets", _check_kubelets(modes.proxy, cluster, timing))
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


def _late_view(late: Finding) -> ClusterView:
    return ClusterView((late,))


def _settings(modes: CheckedModes) -> list[Finding]:
    chosen = [mode for mode, value in ((REGISTRAR, modes.registrar), (PROXY, modes.proxy)) if value]
    told = [settings.common.warnings for settings in (modes.registrar, modes.proxy) if settings]
    warnings = dict.fromkeys(text for texts in told for text in texts)
    if warnings:
        return [warn("settings", text) for text in warnings]
    return [ok("settings", f"those of the {' and the '.join(chosen)} can be read")]


def _registrar_permissions(settings: RegistrarSettings) -> tuple[Permission, ...]:
    followed = source_permissions(settings.selection.sources)
    if settings.election is None:
        return followed
    wiring = Wiring(settings)
    try:
        namespace = wiring.lease_namespace
    except AccessError:  # outside of a Pod the place of the Lease is not known
        namespace = "default"
    return (*followed, *lease_permissions(namespace, wiring.lease_name))


def _proxy_permissions(settings: ProxySettings) -> tuple[Permission, ...]:
    if settings.pods is None:
        return tuple(PROXY_PERMISSIONS)
    return (*PROXY_PERMISSIONS, *source_permissions(settings.pods.sources))


async def _check_cluster(modes: CheckedModes, timing: Timing) -> ClusterView:
    try:
        access = load_access(modes.environment)
    except AccessError as error:
        return ClusterView((fail("credentials", str(error), "KUBECONFIG names the kubeconfig to use"),))
    credentials = await check_credentials(access)
    if credentials.outcome is Result.FAIL:
        return ClusterView((credentials,))
    async with KubeClient(access, timing) as client:
        server = await check_server(client, access)
        if server.outcome is Result.FAIL:
            missed = skipped("permissions", "not asked, since the API server does not serve us")
            return ClusterView((credentials, server, missed), access)
        permissions, (uid_finding, uid), nodes = await asyncio.gather(
            check_permissions(client, modes.permissions, NEVER_NEEDED),
            check_identity(client),
            some_nodes(client),
        )
    of_identity = [uid_finding] if modes.registrar else []
    return ClusterView((credentials, server, *permissions, *of_identity), access, uid, tuple(nodes))


async def _check_consul(wiring: Wiring, cluster: Awaitable[ClusterView]) -> list[Finding]:
    settings = wiring.settings
    if settings.backend.backend == NONE:
        return [ok("consul", "not used (CONSUL_BACKEND=none)")]
    try:
        access = consul_access(settings.consul)
    except AccessError as error:
        return [fail("consul", str(error))]
    async with ConsulClient(access, wiring.timing) as client:
        is_catalog = settings.backend.backend == CATALOG
        found, node = await check_consul(client, str(access.address), is_catalog=is_catalog)
        if any(finding.outcome is Result.FAIL for finding in found):
            return [*found, skipped("consul token", "not asked, since Consul does not serve us")]
        has_token = bool(access.token or access.token_file)
        of_token = await check_token(client, _needs(settings, node), has_token=has_token)
        sees_all = all(one.outcome is Result.OK for one in of_token)
        of_services = await _check_services(client, wiring, (await cluster).uid, sees_all=sees_all)
        return [*found, *of_token, *of_services]


def _namings(settings: RegistrarSettings) -> list[Naming]:
    naming = settings.naming
    templates = {Kind.POD: naming.pod_name, Kind.NODE: naming.node_name}
    shard = next(iter(naming.shard_paths), "")
    kinds = sorted(settings.selection.kinds, reverse=True)
    return [naming_of(kind, templates[kind], settings.cluster_name, shard) for kind in kinds]


def _needs(settings: RegistrarSettings, agent_node: str) -> list[NeededRight]:
    needs = [*needs_of_services(_namings(settings))]
    if settings.backend.backend == CATALOG:
        return [*needs, need_of_catalog(settings.backend.node_name)]
    return [*needs, need_of_agent(agent_node), need_of_lost_agents()] if agent_node else needs


async def _check_services(client: ConsulClient, wiring: Wiring, uid: str, *, sees_all: bool) -> list[Finding]:
    who = wiring.identity
    try:
        services = [service async for service in wiring.registry(client).services()]
        names = await read_service_names(client)
    except ConsulError as error:
        return [skipped("services", str(error))]
    found = holdings(services, who, uid)
    prefixes = tuple(naming.prefix for naming in _namings(wiring.settings))
    elsewhere = judge_catalog(names, [service.name for service in services], prefixes)
    return [*judge_holdings(found, who, sees_all=sees_all), *elsewhere]


async def _check_node_port(wiring: Wiring, cluster: Awaitable[ClusterView]) -> list[Finding]:
    settings, nodes = wiring.settings, (await cluster).nodes
    if Kind.NODE not in settings.selection.kinds:
        return []
    return [await check_node_port(nodes, settings.proxy_node_port, wiring.timing.connect_timeout)]


async def _check_kubelets(
    settings: ProxySettings, cluster: Awaitable[ClusterView], timing: Timing
) -> list[Finding]:
    view = await cluster
    if view.access is None:
        return [skipped("kubelets", "no credentials to show them")]
    try:
        identity = KubeletIdentity(settings.kubelets, view.access)
        await identity.refresh()
        kubelets = Kubelets(
            trust=identity.trust,
            verifies_node_name=settings.kubelets.tls_server_name == "node",
            token=identity.token(),
            timeout=timing.read_timeout,
        )
    except AccessError as error:
        return [
            fail(
                "kubelets", str(error), "it is read where the proxy runs: is it mounted there, and readable?"
            )
        ]
    return await check_kubelets(view.nodes, kubelets, allow_loopback=settings.allow_loopback)
