"""The JSON API of the proxy's status page: the Nodes and Pods with their latest scrape, and the rest as one status."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from aiohttp import web

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.index import Index, IndexRules
from k8s_consul_registrar.admin.status_api import answer, api_route, check, find_page
from k8s_consul_registrar.model import Kind, ObjectKey
from k8s_consul_registrar.proxy.nodes import Endpoint, Nodes
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.proxy.routes import Pods
from k8s_consul_registrar.proxy.stats import Failure, LastScrape, ProxyStats

MAX_CONTESTS = 100


class UpstreamState(StrEnum):
    """The result of the latest scrape of a Node or Pod."""

    ANSWERS = "answers"
    FAILS = "fails"
    IDLE = "idle"  # not scraped since the start


class UpstreamRow(NamedTuple):
    """A Node or Pod that can be scraped, its latest scrape, and its failures of the last minutes."""

    key: ObjectKey
    address: str
    state: UpstreamState
    last: LastScrape | None
    failures: int
    failure: Failure | None


class Relaying(Protocol):
    """A proxy, in one process or several."""

    def stats(self) -> ProxyStats:
        """Return the current figures."""

    def failures(self) -> Sequence[Failure]:
        """Return the scrapes that failed lately, the latest last."""

    def last_scrapes(self) -> Mapping[Endpoint, LastScrape]:
        """Return the latest scrape of each upstream."""


class SourceRow(NamedTuple):
    """A kind of object that the proxy follows; `behind` is in seconds."""

    name: str
    objects: int
    behind: float
    problem: str


class Certificate(NamedTuple):
    """A certificate that the proxy shows; `expires_at` is in seconds of the epoch, None if it cannot be read."""

    of: str
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class ProxyView:
    """Everything the status page shows of a proxy; the values that do not change are given, the others are read."""

    server: Relaying
    nodes: Nodes
    pods: Pods | None
    sources: Callable[[], Sequence[SourceRow]]
    certificates: Callable[[], Sequence[Certificate]]
    readiness: Callable[[], str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    started_at: float = field(default_factory=time.time)  # seconds of the epoch

    def rows(self) -> Iterator[UpstreamRow]:
        """Yield every Node, and every port of every Pod, that can be scraped."""
        last, failures = _latest(self.server.last_scrapes()), _by_upstream(self.server.failures())
        for name, endpoint in list(self.nodes.current.by_name.items()):
            yield _row(endpoint, ObjectKey(Kind.NODE, "", name), last, failures)
        for (namespace, name), pod in [] if self.pods is None else list(self.pods.items()):
            for route in pod.routes:
                yield _row(route.endpoint, ObjectKey(Kind.POD, namespace, name), last, failures)

    def status(self, clock: Callable[[], float]) -> dict[str, Any]:
        """Return everything but the rows."""
        stats = self.server.stats()
        return {
            "version": __version__,
            **self.facts,
            "started_at": self.started_at,
            "unready": self.readiness(),
            "sources": [one._asdict() for one in self.sources()],
            "connections": {
                "clients": stats.callers,
                "kept": stats.kept,
                "running": stats.running,
                "waiting": stats.waiting,
            },
            "workers": None if stats.workers is None else [stats.workers, stats.worker_deaths],
            "certificates": [one._asdict() for one in self.certificates()],
            "scrapes": {outcome.value: count for outcome, count in stats.outcomes.items() if count},
            "contests": [one._asdict() for one in self.nodes.current.contests[:MAX_CONTESTS]],
            "settings": [{"name": name, "value": value} for name, value in self.settings.items()],
            "now": clock(),
        }


# An upstream is known by its object, its port and how it is spoken to: a Node is scraped at any of its addresses.
_Key = tuple[str, int, str]


def _key(endpoint: Endpoint) -> _Key:
    return endpoint.uid, endpoint.port, endpoint.peer


def _latest(scrapes: Mapping[Endpoint, LastScrape]) -> dict[_Key, LastScrape]:
    found: dict[_Key, LastScrape] = {}
    for endpoint, scrape in list(scrapes.items()):
        key = _key(endpoint)
        found[key] = max(found.get(key, scrape), scrape)
    return found


def _by_upstream(failures: Sequence[Failure]) -> dict[_Key, list[Failure]]:
    found: dict[_Key, list[Failure]] = {}
    for failure in failures:
        found.setdefault(_key(failure.endpoint), []).append(failure)
    return found


def _row(
    endpoint: Endpoint,
    key: ObjectKey,
    last: Mapping[_Key, LastScrape],
    failures: Mapping[_Key, list[Failure]],
) -> UpstreamRow:
    scrape, failed = last.get(_key(endpoint)), failures.get(_key(endpoint), [])
    state = UpstreamState.IDLE
    if scrape is not None:
        state = UpstreamState.ANSWERS if scrape.outcome is Outcome.OK else UpstreamState.FAILS
    return UpstreamRow(key, str(endpoint), state, scrape, len(failed), failed[-1] if failed else None)


def proxy_routes(view: ProxyView, clock: Callable[[], float] = time.time) -> list[web.RouteDef]:
    """Return `/api/v1/upstreams` and `/api/v1/status` of a proxy; `clock` gives epoch seconds."""
    rules: IndexRules[UpstreamRow] = IndexRules(
        {
            "state": lambda row: row.state,
            "kind": lambda row: row.key.kind,
            "namespace": lambda row: row.key.namespace,
        },
        zeros={"state": UpstreamState, "kind": Kind},
        order=lambda row: (row.key, row.address),
        texts=_texts,
        max_age=2.0,  # a scrape changes a row, and there may be hundreds a second
        idle_for=60.0,
    )
    index = Index(view.rows, lambda: 0, rules)

    async def upstreams(request: web.Request) -> web.Response:
        check(request, "kind", "limit", "namespace", "offset", "q", "state")
        snapshot = await index.snapshot()
        total, found, offset, rows = await find_page(request, snapshot, UpstreamState)
        return answer(
            {"total": total, "found": found, "offset": offset, "upstreams": [_shown(row) for row in rows]}
        )

    async def status(request: web.Request) -> web.Response:
        check(request)
        snapshot = await index.snapshot()
        counts = {
            "upstreams": len(snapshot.rows),
            "states": snapshot.counts["state"],
            "kinds": snapshot.counts["kind"],
        }
        namespaces = sorted(name for name in snapshot.counts["namespace"] if name)
        return answer({**view.status(clock), "counts": counts, "namespaces": namespaces[:500]})

    return [api_route(upstreams), api_route(status)]


def _texts(row: UpstreamRow) -> tuple[str, ...]:
    reason = "" if row.failure is None else row.failure.reason
    return (f"{row.key.namespace}/{row.key.name}", row.address, row.state, reason)


def _shown(row: UpstreamRow) -> dict[str, Any]:
    last, failure = row.last, row.failure
    return {
        "object": {"kind": row.key.kind, "namespace": row.key.namespace, "name": row.key.name},
        "address": row.address,
        "state": row.state,
        "at": None if last is None else last.at,
        "seconds": None if last is None else last.seconds,
        "expires_at": None if last is None else last.expires_at,
        "failures": row.failures,
        "failed_at": None if failure is None else failure.at,
        "outcome": "" if failure is None else failure.outcome,
        "reason": "" if failure is None else failure.reason,
    }
