"""Settings of the registrar."""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.model import Kind, Source
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.election import ElectionTiming
from k8s_consul_registrar.registrar.ownership import Policy
from k8s_consul_registrar.settings import parsers as parse
from k8s_consul_registrar.settings.common import ModeSettings
from k8s_consul_registrar.settings.consul import (
    AGENT,
    AUTO,
    CATALOG,
    NONE,
    BackendSettings,
    ConsulSettings,
)
from k8s_consul_registrar.settings.field import Reader, Section, Setting, section
from k8s_consul_registrar.settings.parsers import TEXT, Parser
from k8s_consul_registrar.settings.selection import (
    DISCOVERY,
    HASH,
    IntervalSettings,
    NamingSettings,
    SelectionSettings,
)
from k8s_consul_registrar.targets.scrape_config import PRIMARY
from k8s_consul_registrar.targets.service_names import Template

HTTP_SD = "HTTP service discovery"
# Where Pods are scraped: at their own IP, through the proxy on their Node, at a hostPort there.
AT_POD, AT_PROXY, AT_HOST = "pod", "proxy", "host"
BRAKE = "Mass removals and lost agents"
ELECTION = "Leader election"
EVENTS = "Kubernetes Events"

_POLICY = parse.choice(*Policy)
DEFAULT_PERIOD = 600.0  # seconds
# A shorter period would compare everything with Consul without pause.
SHORTEST_PERIOD = 1.0  # seconds
# Part of the digest: change it when the same settings begin to select or shape objects differently.
RULES_VERSION = 1


def _period(given: str) -> float:
    """Take a period as the original program did: an invalid one becomes the default, here with a warning."""
    period = parse.number(given)
    if period is None or period <= 0:
        problem = f"{given!r} is not a number of seconds above 0: {DEFAULT_PERIOD:g} is used"
        raise parse.Corrected(DEFAULT_PERIOD, problem)
    bounded = min(max(period, SHORTEST_PERIOD), parse.LONGEST)
    if bounded != period:
        bound = "least" if period < bounded else "most"
        unit = "seconds" if bounded > 1 else "second"
        raise parse.Corrected(bounded, f"{given!r}: {bounded:.0f} {unit} is the {bound}, and is used")
    return period


@dataclass(frozen=True, slots=True)
class HttpSdSettings(Section, group=HTTP_SD):
    """Where targets are served over HTTP, and what clients must show; files are read by the server."""

    port: int = Setting("HTTP_SD_PORT", parse.integer(0, 65535, unset=0)).means(
        "Port of `/sd/targets`, HTTP service discovery. Unset: off. 0: the system picks one"
    )
    bearer_token_file: str = Setting("HTTP_SD_BEARER_TOKEN_FILE", parse.secret_file).means(
        "File with bearer tokens, one per line, of which clients must send one. Read again when it changes"
    )
    cert_file: str = Setting("HTTP_SD_TLS_CERT_FILE", parse.file).means(
        "File with the certificate chain of that port, which makes it HTTPS. Read again when it changes, as are "
        "the two below"
    )
    key_file: str = Setting("HTTP_SD_TLS_KEY_FILE", parse.secret_file).means(
        "File with the key of that certificate"
    )
    client_ca_file: str = Setting("HTTP_SD_TLS_CLIENT_CA_FILE", parse.file).means(
        "File with CAs. Clients must show a certificate that one of them signed"
    )

    def check(self, reader: Reader) -> None:
        """Report files of TLS that need another one."""
        reader.require_server_tls("HTTP_SD_TLS")


def _state_file(given: str) -> str:
    if parse.file.parse(given).endswith("/"):
        raise ValueError(f"{given!r} is no path of a file")
    return given


def _json_file(given: str) -> str:
    if parse.file.parse(given) and not given.endswith(".json"):
        raise ValueError(f"{given!r} must end with .json: Prometheus reads no other file so")
    return given


@dataclass(frozen=True, slots=True)
class BrakeSettings(BrakeRules, Section, group=BRAKE):
    """The rules of the brake."""

    confirm: float = Setting("BRAKE_CONFIRM", parse.seconds(), "60").means(
        "Seconds for which lists of the cluster must agree on a mass removal before it is done"
    )
    confirm_start: float = Setting("BRAKE_CONFIRM_START", parse.seconds(), "600").means(
        "The same right after a start, or if a source turns out to be empty. An object that exists but is no "
        "longer selected keeps its service for as long"
    )
    allow_mass: bool = Setting("ALLOW_MASS_DEREGISTER", parse.boolean, "false").means(
        "`true`: do not hold mass removals"
    )


@dataclass(frozen=True, slots=True)
class ElectionSettings(Section, group=ELECTION):
    """Election of a leader among replicas.

    An empty `lease_name` is derived from cluster and instance, an empty `lease_namespace` is the Pod's own.
    """

    lease_name: str = Setting("LEASE_NAME", parse.object_name(253)).means(
        "Name of the Lease. Unset: derived from the names of cluster and instance"
    )
    lease_namespace: str = Setting("LEASE_NAMESPACE", parse.object_name(63)).means(
        "Namespace of the Lease. Unset: the namespace of the Pod"
    )
    lease_duration: int = Setting("LEASE_DURATION", parse.integer(1, 3600), "15").means(
        "Whole seconds after which another replica takes over a Lease that was not renewed"
    )
    renew_deadline: float = Setting("LEASE_RENEW_DEADLINE", parse.seconds(), "10").means(
        "Seconds after the last renewal when a leader stops writing. Less than `LEASE_DURATION`"
    )
    retry_period: float = Setting("LEASE_RETRY_PERIOD", parse.seconds(0.1), "2").means(
        "Seconds between renewals, and between the attempts of standbys. 1.2 times this must be less than "
        "`LEASE_RENEW_DEADLINE`"
    )
    is_agent_shared: bool = Setting("CONSUL_AGENT_SHARED", parse.boolean, "false").means(
        "`true`: all replicas use one agent, so they may elect a leader without the catalog backend"
    )

    @property
    def timing(self) -> ElectionTiming:
        """The times as the election takes them; raises ValueError if they do not fit together."""
        return ElectionTiming(self.lease_duration, self.renew_deadline, self.retry_period)

    def check(self, reader: Reader) -> None:
        """Report times that do not fit together."""
        try:
            _ = self.timing
        except ValueError as error:
            reader.problem("LEASE_DURATION, LEASE_RENEW_DEADLINE, LEASE_RETRY_PERIOD", str(error))


def election_problem(backend: str, election: ElectionSettings | None) -> str:
    """Return why a leader cannot be elected with this backend, empty if it can.

    Each replica with an agent of its own would leave a whole set of services there, and the agent of a
    stalled leader would keep its set alive beside the new leader's.
    """
    if election is None or backend != AGENT or election.is_agent_shared:
        return ""
    return (
        "true needs CONSUL_BACKEND=catalog, since each replica's own agent would hold a set of services; "
        "CONSUL_AGENT_SHARED=true says that all replicas use one agent"
    )


@dataclass(frozen=True, slots=True)
class RegistrarSettings(ModeSettings, group="Cluster and ownership"):
    """All settings of the registrar; times are in seconds."""

    cluster_name: str = Setting("CLUSTER_NAME", parse.name, "default-cluster").means(
        "Name of this cluster in Consul: letters, digits, `.`, `_`, `-`, at most 50. Set it: under the default "
        "name, only services that the cluster's UID proves to be this cluster's are deregistered"
    )
    previous_cluster_names: frozenset[str] = Setting(
        "PREVIOUS_CLUSTER_NAMES", parse.names, complete=lambda given, _: given - {""}
    ).means(
        "Comma-separated earlier names of this cluster. Services written under them belong to this registrar"
    )
    instance: str = Setting("INSTANCE", parse.name).means(
        "Name of this registrar among several of one cluster. Each manages its own services only"
    )
    previous_instances: frozenset[str] = Setting("PREVIOUS_INSTANCES", parse.names).means(
        'Comma-separated instances whose services this registrar takes over. `""` (two quotes) is the empty '
        "instance"
    )
    selection: SelectionSettings = section(SelectionSettings)
    pod_address: str = Setting(
        "POD_ADDRESS", parse.choice(AT_POD, AT_PROXY, AT_HOST), AT_POD, group=DISCOVERY
    ).means(
        "Where Prometheus scrapes Pods: `pod`, at their own IP, `proxy`, through the proxy on their Node, "
        "which needs `PROXY_PODS`, or `host`, at their Node's address and the container's `hostPort`"
    )
    proxy_node_port: int = Setting(
        "PROXY_NODE_PORT", parse.integer(1, 65535), "31112", group=DISCOVERY
    ).means("NodePort of the proxy, with which Nodes are registered")
    proxy_scheme: str = Setting("PROXY_SCHEME", parse.choice("http", "https"), "http", group=DISCOVERY).means(
        "Protocol between Prometheus and the proxy: `http`, or `https` if the proxy has `TLS_CERT_FILE`"
    )
    sync_period: float = Setting(
        "SYNC_PERIOD",
        Parser(_period, parse.seconds(SHORTEST_PERIOD).schema),
        f"{DEFAULT_PERIOD:g}",
        group=DISCOVERY,
    ).means(
        "Seconds between resyncs, which compare everything with Consul. Text, zero and negative numbers become "
        "the default, less than a second becomes 1, each with a warning"
    )
    intervals: IntervalSettings = section(IntervalSettings)
    naming: NamingSettings = section(NamingSettings)
    consul: ConsulSettings = section(ConsulSettings)
    backend: BackendSettings = section(BackendSettings)
    http_sd: HttpSdSettings | None = section(HttpSdSettings, when="HTTP_SD_PORT")
    state_file: str = Setting("HTTP_SD_STATE_FILE", Parser(_state_file, TEXT), group=HTTP_SD).means(
        "File in which the targets are saved, at most every 30 seconds. After a restart they are served, marked "
        "as stale, until the cluster was listed. Its folder must survive the restart"
    )
    file_sd_path: str = Setting("FILE_SD_PATH", Parser(_json_file, TEXT), group=HTTP_SD).means(
        "File in which Prometheus finds the targets by file service discovery, such as `/targets/cluster.json`. "
        "Replaced when they change, at most once a second, and kept when the registrar ends. Unset: off"
    )
    brake: BrakeSettings = section(BrakeSettings)
    quota: int = Setting(
        "MAX_TARGETS_PER_NAMESPACE", parse.integer(0, 1_000_000), "0", group=DISCOVERY
    ).means(
        "Most targets of one namespace. New ones beyond that are blocked, the youngest object first; what is registered "
        "stays. 0: no limit"
    )
    quota_removes: bool = Setting("QUOTA_REMOVE", parse.boolean, "false", group=DISCOVERY).means(
        "`true`: what is registered of a namespace beyond `MAX_TARGETS_PER_NAMESPACE` is removed, the youngest object first, "
        "once it was too much for `BRAKE_CONFIRM_START`"
    )
    policy: Policy = Setting(
        "POLICY", Parser(lambda given: Policy(_POLICY.parse(given)), _POLICY.schema), Policy.SYNC, group=BRAKE
    ).means(
        "What may be changed in Consul. `sync`: everything. `upsert-only`: nothing is removed. `observe`: nothing is "
        "written; what `sync` would write is in metrics and on the status page. Service discovery is the same under each"
    )
    orphan_after: float = Setting("ORPHAN_AFTER", parse.seconds(1), "600", group=BRAKE).means(
        "Seconds for which an agent must be lost before this registrar's services on its node are removed, at "
        "least 1. With `CONSUL_BACKEND=agent` only"
    )
    is_elected: bool = Setting("LEADER_ELECTION", parse.boolean, "false", group=ELECTION).means(
        "`true`: of several replicas only the leader, which holds a Lease, writes. Needs "
        "`CONSUL_BACKEND=catalog`, or `CONSUL_AGENT_SHARED`"
    )
    election: ElectionSettings | None = section(ElectionSettings, when="LEADER_ELECTION")
    emit_events: str = Setting(
        "EMIT_EVENTS", parse.choice("none", "problems", "all"), "none", group=EVENTS
    ).means(
        "Events that the registrar writes about Pods, Nodes and Services, which `kubectl describe` shows: `none`, "
        "`problems` (why something is not scraped), or `all` (registrations and removals too). Needs the overlay `emit-events`"
    )

    @property
    def has_default_name(self) -> bool:
        """True if no cluster name was given, not even the default one."""
        return not self.common.environment.get("CLUSTER_NAME", "").strip()

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources that are listed separately."""
        is_needed = self.naming.namespace_labels or self.selection.namespace_label_selector
        namespaces = (Source(Kind.NAMESPACE),) if is_needed else ()
        return (*namespaces, *self.selection.sources)

    @property
    def pods_through_proxy(self) -> bool:
        """True if Prometheus scrapes Pods through the proxy."""
        return self.pod_address == AT_PROXY

    def check(self, reader: Reader) -> None:
        """Report what does not go together across the sections."""
        if not reader.is_set("CLUSTER_NAME"):
            reader.warnings.append(
                f"CLUSTER_NAME is not set: {self.cluster_name!r} is used, and only services that the cluster's "
                "UID proves to be this cluster's are deregistered"
            )
        renamed = next((ours for ours, theirs in self.naming.meta_keys.renamed if theirs == "service"), "")
        if Kind.ENDPOINT in self.selection.kinds and renamed:
            reader.problem("META_KEYS", f"names {renamed} service, a key that DISCOVER=services needs itself")
        if self.backend.backend == NONE and self.http_sd is None and not self.file_sd_path:
            problem = "none gives targets on HTTP_SD_PORT and in FILE_SD_PATH only, neither of which is set"
            reader.problem("CONSUL_BACKEND", problem)
        if self.backend.backend == NONE and self.policy is not Policy.SYNC:
            reader.problem("POLICY", f"{self.policy} is about Consul, and CONSUL_BACKEND is none")
        if self.quota_removes and not self.quota:
            reader.warnings.append("QUOTA_REMOVE has no effect without MAX_TARGETS_PER_NAMESPACE")
        if self.backend.backend == NONE and self.naming.shard_paths and self.naming.shard_strategy != HASH:
            problem = "must be hash with CONSUL_BACKEND=none: nothing remembers a random shard"
            reader.problem("SHARD_STRATEGY", problem)
        for name, problem in self.backend_problems().items():
            reader.problem(name, problem)

    def decided(self, backend: str, reason: str) -> "RegistrarSettings":
        """Return the settings with the backend that `auto` chose; raises a `SettingsError` if they do not fit it."""
        settings = replace(self, backend=replace(self.backend, backend=backend, reason=reason))
        if problems := settings.backend_problems():
            why = f"CONSUL_BACKEND=auto chose {backend}: {reason}"
            raise SettingsError([f"{name}: {problem} ({why})" for name, problem in problems.items()])
        return settings

    def backend_problems(self) -> dict[str, str]:
        """Return why settings do not fit the backend, by name; those of `auto` are judged once it has chosen."""
        backend = self.backend.backend
        found = {"LEADER_ELECTION": election_problem(backend, self.election)}
        if self.backend.has_readiness and backend not in (CATALOG, AUTO):
            found["REGISTER_READINESS"] = "needs CONSUL_BACKEND=catalog: an agent runs its checks itself"
        if self.consul.login is not None and backend not in (CATALOG, AUTO):
            found["CONSUL_LOGIN_AUTH_METHOD"] = (
                "needs CONSUL_BACKEND=catalog: an agent keeps the token that a service was registered with, and "
                "the token of a login ends"
            )
        return {name: problem for name, problem in found.items() if problem}


def selection_digest(settings: RegistrarSettings) -> str:
    """Return a short digest of the settings that select objects and shape their services.

    Two runs with equal digests make the same targets of the same cluster. Where digests differ, an object that
    is missing may only have been selected by the other settings. Settings that say how to connect, how long to
    wait or where to write are not part of it. The order of a list counts only where it decides something.
    """
    selection, naming = settings.selection, settings.naming
    parts = {
        "rules": RULES_VERSION,
        "cluster": settings.cluster_name,
        "instance": settings.instance,
        "kinds": sorted(selection.kinds),
        "namespaces": sorted(selection.namespaces),
        "pod_label_selector": selection.pod_label_selector,
        "node_label_selector": selection.node_label_selector,
        "annotation_prefix": selection.annotation_prefix,
        "node_address_types": selection.node_address_types,
        "id_prefix": naming.id_prefix,
        "pod_name": _text(naming.pod_name),
        "node_name": _text(naming.node_name),
        "tags": sorted(map(_text, naming.tags)),
        "labels": sorted(naming.labels),
        **({"target_labels": sorted(naming.target_labels)} if naming.target_labels else {}),
        "meta_keys": naming.meta_keys.text,
        "shard_paths": sorted(naming.shard_paths),
        "shard_strategy": naming.shard_strategy if naming.shard_paths else "",
        "proxy_node_port": settings.proxy_node_port,
        "proxy_scheme": settings.proxy_scheme,
        "pods_through_proxy": settings.pods_through_proxy,
    }
    if Kind.ENDPOINT in selection.kinds:
        # Left out otherwise, so that an update alone is no other selection.
        parts["service_label_selector"] = selection.service_label_selector
        parts["endpoint_name"] = _text(naming.endpoint_name)
    parts |= _newer_parts(settings)
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _newer_parts(settings: RegistrarSettings) -> dict[str, Any]:
    """Return the settings that came later, as far as they are not the default: an upgrade is no other selection."""
    default = RegistrarSettings()
    paths, usual_paths = settings.selection.node_paths, default.selection.node_paths
    parts: dict[str, tuple[Any, Any]] = {
        "intervals": (_durations(settings.intervals), _durations(default.intervals)),
        "node_paths": ([paths.linux, paths.windows], [usual_paths.linux, usual_paths.windows]),
        "is_node_path_told": (paths.is_told, usual_paths.is_told),
        "namespace_label_selector": (settings.selection.namespace_label_selector, ""),
        "excluded": (settings.selection.outside_excluded().fields, ""),
        "namespace_labels": (sorted(settings.naming.namespace_labels), []),
        "node_labels": (sorted(settings.naming.node_labels), []),
        "annotations": (sorted(settings.naming.annotations), []),
        "pods_at_host": (settings.pod_address == AT_HOST, False),
        "ip_families": (
            [settings.selection.ip_family, settings.common.node_ip_family],
            [PRIMARY, PRIMARY],
        ),
        "extra_meta": (sorted(settings.naming.extra_meta), []),
    }
    return {name: value for name, (value, usual) in parts.items() if value != usual}


def _durations(intervals: IntervalSettings) -> list[int]:
    given = (intervals.least, intervals.default, intervals.slow, intervals.slow_timeout)
    return [one.milliseconds if one else -1 for one in given]


def _text(template: Template) -> str:
    return "".join(map(str, template.parts))
