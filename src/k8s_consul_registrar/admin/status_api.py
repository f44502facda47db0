"""The status page of the registrar and its JSON API: targets, rejections, and the rest as one status."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from importlib import resources
from itertools import islice
from typing import Any

import msgspec
from aiohttp import web

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.index import Index, IndexRules, Search, Snapshot, T, parse_terms
from k8s_consul_registrar.admin.target_groups import BadQuery
from k8s_consul_registrar.admin.view import RegistrarView, TargetRow, TargetState
from k8s_consul_registrar.model import TARGET_KINDS, USUAL_KINDS, ObjectKey, Rejection
from k8s_consul_registrar.registrar.status import Activity, Removal
from k8s_consul_registrar.targets.scrape_config import socket_address

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000
MAX_SEARCH = 200  # characters
# A menu of several thousand namespaces is of no use; the others are found by searching.
MAX_NAMESPACES = 500
MAX_CONFLICTS = 1000
MAX_HELD = 20  # service IDs named of those the brake holds

# Everything comes from this port and nothing is written inside the page; the page never makes HTML out of text
# (trusted-types 'none' lets the browser refuse it). https://www.w3.org/TR/CSP3/
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_PAGE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_API_HEADERS = {
    "Content-Type": "application/json",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FILES = ("page.html", "page.css", "page.js", "parts.js", "language.js", "views.js", "words.js", "icon.svg")


# The files that the proxy's page has in place of the registrar's.
PROXY_FILES = {"views.js": "proxy_views.js", "words.js": "proxy_words.js"}


def page_routes(instead: Mapping[str, str] | None = None) -> list[web.RouteDef]:
    """Return `/` and the files of the page, some replaced; it reads the API of its mode by relative addresses."""
    return [_file_route(name, (instead or {}).get(name, name)) for name in FILES]


def _file_route(name: str, file_name: str) -> web.RouteDef:
    body = (resources.files(__package__) / "static" / file_name).read_bytes()
    tag = hashlib.blake2b(body, digest_size=12).hexdigest()
    kind = _TYPES[name.rpartition(".")[2]]
    headers = {**_PAGE_HEADERS, "Content-Type": f"{kind}; charset=utf-8", "ETag": f'"{tag}"'}

    async def file(request: web.Request) -> web.Response:
        if any(known.value == tag for known in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, headers=headers)

    return web.get("/" if name == "page.html" else f"/{name}", file, allow_head=False)


def target_index(view: RegistrarView, clock: Callable[[], float] = time.monotonic) -> Index[TargetRow]:
    """Return the targets by ID; dropped a minute after the last question, as when the page was closed."""
    rules: IndexRules[TargetRow] = IndexRules(
        {
            "state": lambda row: row.state,
            "kind": lambda row: row.key.kind,
            "namespace": lambda row: row.key.namespace,
        },
        zeros={"state": TargetState, "kind": USUAL_KINDS},
        order=lambda row: row.service.id,
        texts=_texts_of_target,
        fresh_for=1.0,  # the page asks every few seconds
        idle_for=60.0,
    )
    return Index(view.targets, lambda: view.generation, rules, clock)


def rejection_index(view: RegistrarView, clock: Callable[[], float] = time.monotonic) -> Index[Rejection]:
    """Return the rejections by object."""
    rules: IndexRules[Rejection] = IndexRules(
        {
            "reason": lambda one: one.reason,
            "kind": lambda one: one.key.kind,
            "namespace": lambda one: one.key.namespace,
        },
        order=lambda one: one.key,
        texts=lambda one: (f"{one.key.namespace}/{one.key.name}", one.reason, one.detail, one.id),
        max_age=10.0,
    )
    return Index(view.rejections, lambda: (view.generation, len(view.rejections())), rules, clock)


def removal_index(view: RegistrarView, clock: Callable[[], float] = time.monotonic) -> Index[Removal]:
    """Return the latest removals, the newest first."""
    removals = view.status.removals
    rules: IndexRules[Removal] = IndexRules(
        {
            "proof": lambda one: one.proof.ground,
            "kind": lambda one: one.proof.key.kind if one.proof.key else "",
            "namespace": lambda one: one.proof.key.namespace if one.proof.key else "",
        },
        order=lambda one: -one.at,
        texts=lambda one: (one.id, one.place, one.leader, one.proof.brake, one.proof.ground),
        idle_for=60.0,
    )
    return Index(
        lambda: tuple(removals), lambda: (len(removals), removals[0].at if removals else 0.0), rules, clock
    )


def _texts_of_target(row: TargetRow) -> Iterable[str]:
    service, key = row.service, row.key
    return (
        service.id,
        service.name,
        f"{key.namespace}/{key.name}",
        socket_address(service.address, service.port),
        row.state,
        row.detail,
        *service.tags,
        *(value for _, value in service.meta),
    )


def api_routes(view: RegistrarView, clock: Callable[[], float] = time.time) -> list[web.RouteDef]:
    """Return `/api/v1/targets`, `/api/v1/rejections` and `/api/v1/status`; `clock` gives epoch seconds."""
    all_targets, all_rejections = target_index(view), rejection_index(view)
    all_removals = removal_index(view)

    async def targets(request: web.Request) -> web.Response:
        check(request, "kind", "limit", "namespace", "offset", "q", "state")
        snapshot = await all_targets.snapshot()
        total, found, offset, rows = await find_page(request, snapshot, TargetState)
        shown = [_target(row, view) for row in rows]
        return answer({"total": total, "found": found, "offset": offset, "targets": shown})

    async def rejections(request: web.Request) -> web.Response:
        check(request, "kind", "limit", "namespace", "offset", "q", "reason")
        snapshot = await all_rejections.snapshot()
        total, found, offset, rows = await find_page(request, snapshot)
        return answer(
            {
                "total": total,
                "found": found,
                "offset": offset,
                "reasons": dict(snapshot.counts["reason"].most_common()),
                "rejections": [_rejection(one) for one in rows],
            }
        )

    async def status(request: web.Request) -> web.Response:
        check(request)
        snapshot, rejected = await all_targets.snapshot(), await all_rejections.snapshot()
        counts = {
            "targets": len(snapshot.rows),
            "states": snapshot.counts["state"],
            "kinds": snapshot.counts["kind"],
            # Those that a filter can choose: all Services may be rejected.
            "seen_kinds": sorted({*snapshot.counts["kind"], *rejected.counts["kind"]}),
            "rejections": dict(rejected.counts["reason"].most_common()),
            "conflicts": len(view.status.conflicts),
            "removals": Counter(one.proof.ground for one in view.status.removals),
        }
        namespaces = sorted(name for name in snapshot.counts["namespace"] if name)
        return answer(
            {
                **_status(view),
                "unlisted": view.unlisted(),
                "counts": counts,
                "namespaces": namespaces[:MAX_NAMESPACES],
                "now": clock(),
            }
        )

    async def removals(request: web.Request) -> web.Response:
        check(request, "kind", "limit", "namespace", "offset", "q", "proof")
        snapshot = await all_removals.snapshot()
        total, found, offset, rows = await find_page(request, snapshot)
        shown = [_removal(one) for one in rows]
        return answer({"total": total, "found": found, "offset": offset, "removals": shown})

    return [api_route(targets), api_route(rejections), api_route(removals), api_route(status)]


def api_route(handler: Callable[[web.Request], Awaitable[web.Response]]) -> web.RouteDef:
    """Return the route `/api/v1/` with the handler's name; a query that makes no sense gets 400 and an `error`."""

    async def handle(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except BadQuery as error:
            return answer({"error": str(error)}, status=400)

    return web.get(f"/api/v1/{handler.__name__}", handle, allow_head=False)


async def find_page(
    request: web.Request, snapshot: Snapshot[T], states: Iterable[str] = ()
) -> tuple[int, int, int, list[T]]:
    """Return the number of all rows and of those that a query finds, and the offset and rows of its page."""
    limit, offset = _page(request)
    found = await snapshot.find(_search(request, states))
    return len(snapshot.rows), len(found), offset, found[offset : offset + limit]


def check(request: web.Request, *known: str) -> None:
    """Raise BadQuery for an unknown parameter, or a search that is too long."""
    if not request.query.keys() <= set(known):
        raise BadQuery(f"the parameters are {', '.join(known)}" if known else "there are no parameters")
    if len(request.query.get("q", "")) > MAX_SEARCH:
        raise BadQuery(f"q is at most {MAX_SEARCH} characters")


def _page(request: web.Request) -> tuple[int, int]:
    """Return limit and offset."""
    try:
        limit = int(request.query.get("limit", DEFAULT_LIMIT))
        offset = int(request.query.get("offset", 0))
    except ValueError:
        raise BadQuery("limit and offset are whole numbers") from None
    if not 1 <= limit <= MAX_LIMIT or offset < 0:
        raise BadQuery(f"limit is 1 to {MAX_LIMIT}, offset 0 or more")
    return limit, offset


def _search(request: web.Request, known_states: Iterable[str]) -> Search:
    """Return the search of a query; raises BadQuery for a state or kind that does not exist."""
    query = request.query
    states = frozenset(query.getall("state", ()))
    _one_of("state", states, known_states)
    _one_of("kind", {query.get("kind", "")} - {""}, TARGET_KINDS)
    single = (
        (name, frozenset({query.get(name, "")}) - {""}) for name in ("kind", "namespace", "reason", "proof")
    )
    facets = tuple((name, values) for name, values in (("state", states), *single) if values)
    return Search(parse_terms(query.get("q", "")), facets)


def _one_of(name: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    if not set(given) <= set(allowed):
        raise BadQuery(f"{name} is one of {', '.join(allowed)}")


def _status(view: RegistrarView) -> dict[str, Any]:
    """Return the registrar's status as the API shows it, times in seconds of the epoch."""
    about, state, leader = view.about, view.status, view.leader()
    boot = time.time() - time.monotonic()
    role = "single" if leader is None else "standby" if state.is_standby else "leader"
    return {
        "version": __version__,
        "cluster": about.cluster,
        "instance": about.instance,
        "started_at": about.started_at,
        "unready": state.readiness(),
        "leader": {"role": role, "holder": leader or ""},
        "consul": {
            "backend": about.backend,
            "backend_reason": about.backend_reason,
            "address": about.consul,
            "is_up": not state.consul_problem,
            "problem": state.consul_problem or " ".join(state.agent_problems.values()),
        },
        "sources": [
            {
                "name": str(source),
                "is_followed": one.is_followed,
                "listed_at": None if one.listed_at is None else boot + one.listed_at,
                "objects": one.objects,
                "problem": one.problem,
            }
            for source, one in view.sources().items()
        ],
        "conflicts": [
            {"id": service_id, "object": _object(one.key), "holder": one.holder}
            for service_id, one in islice(state.conflicts.items(), MAX_CONFLICTS)
        ],
        "brakes": [
            {
                "source": str(one.source),
                "proof": one.ground,
                "count": len(one.ids),
                "sample": one.ids[:MAX_HELD],
                "since": boot + one.since,
                "until": boot + one.due,
            }
            for one in state.held
        ],
        "proxy_wait": {"count": len(state.awaiting_proxy), "problem": state.proxy_problem},
        "lost_agents": [
            {"node": one.node, "since": boot + one.since, "due": boot + one.due, "stays": one.stays}
            for one in state.lost_agents
        ],
        "passes": [_activity(one) for one in state.recent],
        "settings": [{"name": name, "value": value} for name, value in about.settings.items()],
    }


def _activity(one: Activity) -> dict[str, Any]:
    counts = one.counts
    names = ("registered", "updated", "deregistered", "unchanged", "refused")
    return {
        "kind": "full" if one.is_resync else "changes",
        "outcome": counts.outcome,
        "at": one.at,
        "seconds": counts.seconds,
        "counts": {name: getattr(counts, name) for name in names},
        "problem": "",
    }


def _target(row: TargetRow, view: RegistrarView) -> dict[str, Any]:
    """Return a target as the API shows it; `labels` are the meta as Consul has it."""
    service = row.service
    value = dict(service.meta)
    return {
        "id": service.id,
        "name": service.name,
        "object": _object(row.key),
        "node": value.get("node", ""),
        "address": service.address,
        "port": service.port,
        "socket": socket_address(row.service.address, row.service.port),
        "scheme": value.get("scheme", ""),
        "path": value.get("metrics_path", ""),
        "params": {
            key.removeprefix("param_"): text for key, text in service.meta if key.startswith("param_")
        },
        "shard": value.get("shard_path", ""),
        "tags": service.tags,
        "labels": {view.meta_keys.wire(key): text for key, text in service.meta},
        "state": row.state,
        "detail": row.detail,
    }


def _rejection(one: Rejection) -> dict[str, Any]:
    return {"object": _object(one.key), "reason": one.reason, "detail": one.detail, "kept_id": one.id}


def _removal(one: Removal) -> dict[str, Any]:
    proof = one.proof
    return {
        "at": one.at,
        "id": one.id,
        "object": None if proof.key is None else _object(proof.key),
        "place": one.place,
        "proof": proof.ground,
        "generation": proof.generation,
        "brake": proof.brake,
        "leader": one.leader,
        "is_answered": one.is_answered,
    }


def _object(key: ObjectKey) -> dict[str, str]:
    return {"kind": key.kind, "namespace": key.namespace, "name": key.name}


def answer(value: dict[str, Any], status: int = 200) -> web.Response:
    """Return a value as JSON, with the headers of everything that is no page."""
    try:
        body = msgspec.json.encode(value)
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8; JSON can spell it
        body = json.dumps(value).encode()
    return web.Response(status=status, body=body, headers=_API_HEADERS)
