"""The settings of each mode, as frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass

from k8s_consul_registrar.settings.backend import BackendSettings, read_backend
from k8s_consul_registrar.settings.backend_options import NONE
from k8s_consul_registrar.settings.consul import ConsulSettings, read_consul
from k8s_consul_registrar.settings.election import ElectionSettings, election_problem, read_election
from k8s_consul_registrar.settings.http_sd import HttpSdSettings, read_http_sd, read_state_file
from k8s_consul_registrar.settings.naming import HASH, NamingSettings, read_naming
from k8s_consul_registrar.settings.proxying import (
    InboundSettings,
    KubeletSettings,
    ProxiedPods,
    read_inbound,
    read_kubelets,
    read_proxied_pods,
)
from k8s_consul_registrar.settings.reader import LONGEST, Reader, parse_seconds
from k8s_consul_registrar.settings.selection import SelectionSettings, read_selection
from k8s_consul_registrar.telemetry import FORMATS, LEVELS

DEFAULT_PERIOD = 600.0
# Less would compare everything with Consul without pause.
SHORTEST_PERIOD = 1.0
# Less would be at once: an agent that restarts is out of sight for some seconds.
SHORTEST_LOSS = 1.0
KUBELET_PATHS = ("/metrics/cadvisor", "/metrics", "/metrics/resource", "/metrics/probes")


@dataclass(frozen=True, slots=True)
class CommonSettings:
    """What either mode heeds. `environment` is what credentials are looked for in (KUBECONFIG)."""

    environment: Mapping[str, str]
    admin_port: int
    log_level: str
    log_format: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BrakeSettings:
    """How long lists must agree on a mass removal, in seconds, and whether it is held at all."""

    confirm: float
    confirm_start: float
    allow_mass: bool


@dataclass(frozen=True, slots=True)
class RegistrarSettings:
    """What the registrar heeds. `sync_period` and `orphan_after` are in seconds."""

    common: CommonSettings
    consul: ConsulSettings
    brake: BrakeSettings
    orphan_after: float
    election: ElectionSettings | None
    cluster_name: str
    has_default_name: bool
    previous_cluster_names: frozenset[str]
    instance: str
    previous_instances: frozenset[str]
    sync_period: float
    backend: BackendSettings
    http_sd: HttpSdSettings | None
    state_file: str
    selection: SelectionSettings
    naming: NamingSettings
    proxy_node_port: int
    proxy_scheme: str
    pods_through_proxy: bool


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """What the proxy heeds; times are in seconds."""

    common: CommonSettings
    port: int
    inbound: InboundSettings
    kubelets: KubeletSettings
    pods: ProxiedPods | None
    paths: tuple[str, ...]
    allow_loopback: bool
    stale_nodes_max: float
    scrape_timeout_max: float
    concurrency_per_node: int
    concurrency: int
    workers: int
    drain_delay: float
    shutdown_grace: float


def read_registrar(environment: Mapping[str, str]) -> RegistrarSettings:
    """Read the registrar's settings; raises a `SettingsError` with every mistake."""
    reader = Reader(environment)
    cluster_name = reader.name("CLUSTER_NAME")
    has_default_name = not reader.is_set("CLUSTER_NAME")
    if has_default_name:
        reader.warnings.append(
            f"CLUSTER_NAME is not set: {cluster_name!r} is used, and nothing is deregistered that the "
            "cluster's UID does not prove ours"
        )
    period = _period(reader)
    previous_names = reader.names("PREVIOUS_CLUSTER_NAMES") - {""}
    instance = reader.name("INSTANCE")
    previous_instances = reader.names("PREVIOUS_INSTANCES")
    consul = read_consul(reader)
    brake = BrakeSettings(
        reader.seconds("BRAKE_CONFIRM"),
        reader.seconds("BRAKE_CONFIRM_START"),
        reader.boolean("ALLOW_MASS_DEREGISTER"),
    )
    orphan_after = reader.seconds("ORPHAN_AFTER", SHORTEST_LOSS)
    election = read_election(reader)
    backend = read_backend(reader, cluster_name, instance)
    selection = read_selection(reader)
    naming = read_naming(reader)
    http_sd = read_http_sd(reader)
    if backend.backend == NONE and http_sd is None:
        reader.problem("CONSUL_BACKEND", "none serves targets on HTTP_SD_PORT alone: give that")
    if backend.backend == NONE and naming.shard_paths and naming.shard_strategy != HASH:
        reader.problem(
            "SHARD_STRATEGY", "must be hash with CONSUL_BACKEND=none: nobody remembers a random shard"
        )
    problem = election_problem(backend.backend, election)
    if problem:
        reader.problem("LEADER_ELECTION", problem)
    node_port = reader.integer("PROXY_NODE_PORT", 1, 65535)
    proxy_scheme = reader.choice("PROXY_SCHEME", ("http", "https"))
    pod_address = reader.choice("POD_ADDRESS", ("pod", "proxy"))
    common = _common(reader)
    reader.check()
    return RegistrarSettings(
        common=common,
        consul=consul,
        brake=brake,
        orphan_after=orphan_after,
        election=election,
        cluster_name=cluster_name,
        has_default_name=has_default_name,
        previous_cluster_names=previous_names,
        instance=instance,
        previous_instances=previous_instances,
        sync_period=period,
        backend=backend,
        http_sd=http_sd,
        state_file=read_state_file(reader),
        selection=selection,
        naming=naming,
        proxy_node_port=node_port,
        proxy_scheme=proxy_scheme,
        pods_through_proxy=pod_address == "proxy",
    )


def read_proxy(environment: Mapping[str, str]) -> ProxySettings:
    """Read the proxy's settings; raises a `SettingsError` with every mistake."""
    reader = Reader(environment)
    inbound = read_inbound(reader)
    settings = ProxySettings(
        port=reader.integer("PORT", 0, 65535),
        inbound=inbound,
        kubelets=read_kubelets(reader),
        pods=read_proxied_pods(reader, inbound),
        paths=_kubelet_paths(reader),
        allow_loopback=reader.boolean("PROXY_ALLOW_LOOPBACK"),
        stale_nodes_max=reader.seconds("STALE_NODES_MAX"),
        scrape_timeout_max=reader.seconds("SCRAPE_TIMEOUT_MAX", 0.1),
        concurrency_per_node=reader.integer("SCRAPE_CONCURRENCY_PER_NODE", 1, 1000),
        concurrency=reader.integer("SCRAPE_CONCURRENCY", 1, 100_000),
        workers=reader.integer("PROXY_WORKERS", 1, 64),
        drain_delay=reader.seconds("DRAIN_DELAY"),
        shutdown_grace=reader.seconds("SHUTDOWN_GRACE"),
        common=_common(reader),
    )
    if settings.port and settings.port == settings.common.admin_port:
        reader.problem("ADMIN_PORT", f"{settings.port} is PORT as well: health and metrics stay apart")
    reader.check()
    return settings


def _common(reader: Reader) -> CommonSettings:
    return CommonSettings(
        environment=reader.environment,
        admin_port=reader.integer("ADMIN_PORT", 0, 65535),
        log_level=reader.choice("LOG_LEVEL", LEVELS),
        log_format=reader.choice("LOG_FORMAT", FORMATS),
        warnings=tuple(reader.warnings),
    )


def _period(reader: Reader) -> float:
    """Return SYNC_PERIOD; as in the original an invalid one becomes the default, here with a warning."""
    text = reader.text("SYNC_PERIOD")
    period = parse_seconds(text)
    if period is None or period <= 0:
        reader.warnings.append(
            f"SYNC_PERIOD {text!r} is not a number of seconds above 0: {DEFAULT_PERIOD:g} is used"
        )
        return DEFAULT_PERIOD
    bounded = min(max(period, SHORTEST_PERIOD), LONGEST)
    if bounded != period:
        bound = "least" if period < bounded else "most"
        reader.warnings.append(
            f"SYNC_PERIOD {text!r}: {bounded:.0f} second{'s' if bounded > 1 else ''} is the {bound}, and is used"
        )
    return bounded


def _kubelet_paths(reader: Reader) -> tuple[str, ...]:
    entries = [entry.strip() for entry in reader.text("PROXY_PATHS").split(",")]
    for entry in entries:
        if entry and entry not in KUBELET_PATHS:
            reader.problem("PROXY_PATHS", f"{entry!r} is none of {', '.join(KUBELET_PATHS)}")
    return tuple(dict.fromkeys((KUBELET_PATHS[0], *(entry for entry in entries if entry))))
