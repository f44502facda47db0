"""The check of delivery: which of our targets a Prometheus or VictoriaMetrics has, and why it lacks others."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec
from prometheus_client import CollectorRegistry
from yarl import URL

from k8s_consul_registrar.asyncio_tools import end_tasks
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands.check.report import Finding, fail, ok, warn
from k8s_consul_registrar.errors import AccessError, OperationalError, SettingsError
from k8s_consul_registrar.model import Target
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.rotating import clean_token, read_file
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.targets.scrape_config import url_host
from k8s_consul_registrar.tls import Trust, printable
from k8s_consul_registrar.urls import check_url
from k8s_consul_registrar.wiring.registrar import Wiring

URL_FLAG, TOKEN_FLAG = "--prometheus", "--prometheus-token-file"
COLLECTOR, KNOWN, UP, OTHERS = "prometheus", "targets known", "targets up", "other targets"
# Seconds for the answer, and for the lists of the cluster.
ANSWER, LISTS = 30.0, 60.0
SIZE_LIMIT = 256 << 20  # bytes
MOST_NAMED = 5
_SERVICE_ID = "__meta_consul_service_id"
_PREFIX = "__meta_consul_service_metadata_"
_NAMESPACE, _POD = "__meta_kubernetes_namespace", "__meta_kubernetes_pod_name"


class CollectorTarget(msgspec.Struct):
    """A target as a collector's API gives it; `labels` are empty if relabelling dropped it."""

    labels: dict[str, str] = {}
    discovered: dict[str, str] = msgspec.field(name="discoveredLabels", default_factory=dict)
    health: str = ""
    problem: str = msgspec.field(name="lastError", default="")
    pool: str = msgspec.field(name="scrapePool", default="")

    @property
    def job(self) -> str:
        """The job that discovered it."""
        return self.labels.get("job") or self.discovered.get("job") or self.pool

    @property
    def names(self) -> set[object]:
        """Everything by which it can be ours: its service ID, its Pod, and its address."""
        found = self.discovered
        names: set[object] = {found.get(_SERVICE_ID), found.get("__address__")}
        if _POD in found:
            names.add((found.get(_NAMESPACE, ""), found[_POD], found.get("__address__")))
        return names - {None}


class _Targets(msgspec.Struct):
    active: list[CollectorTarget] | None = msgspec.field(name="activeTargets", default=None)
    dropped: list[CollectorTarget] | None = msgspec.field(name="droppedTargets", default=None)


class _Answer(msgspec.Struct):
    status: str
    data: _Targets


_decoder = msgspec.json.Decoder(_Answer)


@dataclass(frozen=True, slots=True)
class Collected:
    """The targets of a collector."""

    active: Sequence[CollectorTarget] = ()
    dropped: Sequence[CollectorTarget] = ()


@dataclass(slots=True)
class _Missing:
    by_cause: dict[tuple[str, str], list[Target]] = field(default_factory=dict)

    def add(self, cause: tuple[str, str], target: Target) -> None:
        self.by_cause.setdefault(cause, []).append(target)


def compare(ours: Sequence[Target], cluster: str, collected: Collected) -> list[Finding]:
    """Return what a collector knows of our targets, which are up, and why it lacks the others."""
    active = {name: one for one in collected.active for name in one.names}
    dropped = {name: one for one in collected.dropped for name in one.names}
    found = {target.id: known for target in ours if (known := _known(target, active)) is not None}
    missing = _Missing()
    for target in ours:
        if target.id not in found:
            missing.add(_cause(target, dropped, collected), target)
    findings = [
        fail(KNOWN, f"{len(targets)} of {len(ours)} are missing: {_named(targets)}: {why}", hint)
        for (why, hint), targets in missing.by_cause.items()
    ]
    if not findings:
        findings = [ok(KNOWN, f"all {len(ours)} are active targets")]
    return [*findings, *_health(found), *_strangers(ours, cluster, collected)]


def _known(target: Target, known: Mapping[object, CollectorTarget]) -> CollectorTarget | None:
    address = f"{url_host(target.address)}:{target.port}"
    pod = (target.key.namespace, target.key.name, address)
    # Several targets can share an address, behind the proxy: only what names the target itself proves it.
    by_name = known.get(target.id) or known.get(pod)
    if by_name is not None:
        return by_name
    by_address = known.get(address)
    return by_address if by_address is not None and _SERVICE_ID not in by_address.discovered else None


def _cause(
    target: Target, dropped: Mapping[object, CollectorTarget], collected: Collected
) -> tuple[str, str]:
    """Return the likely cause that a target is missing, and what to do."""
    if (one := _known(target, dropped)) is not None:
        job = printable(one.job)
        return (
            f"the relabelling of the job {job!r} drops them",
            f"look at relabel_configs of {job!r}: a keep or drop, or the shard of another Prometheus",
        )
    if not any(_SERVICE_ID in one.discovered or _POD in one.discovered for one in collected.active):
        return (
            "no job discovers targets of a registrar",
            "add a job with consul_sd_configs, http_sd_configs or file_sd_configs (docs/prometheus.md)",
        )
    hint = (
        "a change takes up to refresh_interval (30 s by consul_sd, 60 s by http_sd): look again; then at services, "
        "tags and the URL's parameters of the job"
    )
    return "no job has discovered them", hint


def _health(found: Mapping[str, CollectorTarget]) -> list[Finding]:
    down = {one: target for one, target in found.items() if target.health == "down"}
    if not found:
        return []
    if not down:
        unknown = sum(target.health != "up" for target in found.values())
        waiting = f", {unknown} were not scraped yet" if unknown else ""
        return [ok(UP, f"{len(found) - unknown} are up{waiting}")]
    problems = Counter(printable(target.problem) or "no reason is given" for target in down.values())
    why, count = problems.most_common(1)[0]
    some = ", ".join(sorted(down)[:MOST_NAMED])
    detail = f"{len(down)} of {len(found)} are down: {some}; {count} of them: {why}"
    return [warn(UP, detail, "they are delivered; the collector cannot scrape them")]


def _strangers(ours: Sequence[Target], cluster: str, collected: Collected) -> list[Finding]:
    asked = {target.id for target in ours}
    others = {
        one.discovered[_SERVICE_ID]
        for one in collected.active
        if one.discovered.get(f"{_PREFIX}cluster") == cluster and one.discovered.get(_SERVICE_ID) not in asked
        if _SERVICE_ID in one.discovered
    }
    if not others:
        return []
    some = ", ".join(sorted(others)[:MOST_NAMED])
    hint = "the brake keeps them, another instance has them, or the collector has not refreshed yet"
    return [warn(OTHERS, f"{len(others)} of this cluster are active that nothing asks for now: {some}", hint)]


def _named(targets: Sequence[Target]) -> str:
    some = ", ".join(sorted(target.id for target in targets)[:MOST_NAMED])
    return some + (", …" if len(targets) > MOST_NAMED else "")


async def check_delivery(
    settings: RegistrarSettings, url: str, token_file: str, timing: Timing
) -> list[Finding]:
    """List the cluster, ask the collector, and compare; raises a `SettingsError` for a wrong URL."""
    if problem := check_url(url):
        raise SettingsError([f"{URL_FLAG} {problem}"])
    token = clean_token(read_file(Path(token_file), TOKEN_FLAG), TOKEN_FLAG) if token_file else ""
    try:
        collected = await ask_collector(url, token)
    except OperationalError as error:
        return [fail(COLLECTOR, str(error), _hint(error))]
    counted = f"{len(collected.active)} active targets, {len(collected.dropped)} dropped by relabelling"
    try:
        ours = await _targets(settings, timing)
    except OperationalError as error:
        return [
            ok(COLLECTOR, counted),
            fail("cluster", str(error), "k8s-consul-registrar check registrar says more"),
        ]
    return [ok(COLLECTOR, counted), *compare(ours, settings.cluster_name, collected)]


class CollectorError(OperationalError):
    """An answer that is not that of a collector's API; `hint` says what to do."""

    def __init__(self, text: str, hint: str) -> None:
        super().__init__(text)
        self.hint = hint


def _hint(error: OperationalError) -> str:
    return error.hint if isinstance(error, CollectorError) else ""


async def ask_collector(url: str, token: str) -> Collected:
    """Return the targets that a collector has; raises a `CollectorError`."""
    address = URL(url)
    address = address.with_path(f"{address.path.rstrip('/')}/api/v1/targets")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    where = (
        f"{URL_FLAG} is the address of Prometheus' or VictoriaMetrics' web interface, with its path prefix"
    )
    try:
        async with (
            asyncio.timeout(ANSWER),
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.get(address, headers=headers, ssl=Trust().context, allow_redirects=False) as response,
        ):
            if response.status in (401, 403):
                hint = f"give a token by {TOKEN_FLAG}, or user and password in the URL"
                raise CollectorError(f"it asks for authentication ({response.status})", hint)
            if response.status != 200:
                raise CollectorError(f"it answers {response.status} at {address.path}", where)
            content = bytearray()
            async for piece in response.content.iter_chunked(1 << 16):
                content += piece
                if len(content) > SIZE_LIMIT:
                    raise CollectorError(f"its answer is longer than {SIZE_LIMIT >> 20} MiB", where)
        answer = _decoder.decode(content)
    except TimeoutError:
        raise CollectorError(f"it does not answer in {ANSWER:g} s", where) from None
    except (aiohttp.ClientError, OSError) as error:
        why = (isinstance(error, OSError) and error.strerror) or type(error).__name__
        raise CollectorError(f"it cannot be asked: {why}", where) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise CollectorError(
            "it is neither Prometheus nor VictoriaMetrics: its answer is another", where
        ) from None
    if answer.status != "success" or answer.data.active is None:
        raise CollectorError("it is neither Prometheus nor VictoriaMetrics: its answer is another", where)
    return Collected(answer.data.active, answer.data.dropped or ())


async def _targets(settings: RegistrarSettings, timing: Timing) -> list[Target]:
    """List the cluster and return every target that it asks for."""
    wiring = Wiring(settings, timing)
    async with wiring.kube() as kube:
        parts = wiring.core(kube=kube, client=None, metrics=RegistrarMetrics(CollectorRegistry()))
        desired = parts.core.desired
        watching = asyncio.create_task(parts.reflectors.run())
        try:
            async with asyncio.timeout(LISTS):
                while any(  # noqa: ASYNC110 - it is over in a moment, and nothing else runs here
                    status.listed_at is None and not status.problem
                    for status in desired.store.statuses().values()
                ):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AccessError(f"the cluster was not listed within {LISTS:g} s") from None
        finally:
            await end_tasks([watching])
        for source, status in desired.store.statuses().items():
            if status.listed_at is None:
                raise AccessError(f"{source} cannot be listed: {status.problem}")
        return [min(asking, key=lambda one: one.rank) for asking in desired.claims.values() if asking]
