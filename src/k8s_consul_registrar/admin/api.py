"""The JSON the status page reads, of use to scripts too: targets, rejections, and the rest as one status."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from k8s_consul_registrar.admin.rejection_index import RejectionIndex, RejectionSearch
from k8s_consul_registrar.admin.sd_query import BadQuery, socket_address
from k8s_consul_registrar.admin.target_index import Search, TargetIndex, parse_terms
from k8s_consul_registrar.admin.view import MetaNames, RegistrarView, SeenTarget, TargetState, as_they_are
from k8s_consul_registrar.model import Kind, ObjectKey, Rejection

DEFAULT_LIMIT = 100
MOST_LIMIT = 1000
LONGEST_SEARCH = 200
# Of several thousand namespaces a menu is of no use; the rest is found by searching.
MOST_NAMESPACES = 500
# Of conflicts as many are shown.
MOST_CONFLICTS = 1000

_TARGET_PARAMETERS = frozenset({"limit", "offset", "q", "kind", "namespace", "state"})
_REJECTION_PARAMETERS = frozenset({"limit", "offset", "q", "kind", "namespace", "reason"})
_HEADERS = {
    "Content-Type": "application/json",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def api_routes(
    view: RegistrarView,
    meta_names: MetaNames = as_they_are,
    clock: Callable[[], float] = time.time,
) -> list[web.RouteDef]:
    """Return `/api/v1/targets`, `/api/v1/rejections` and `/api/v1/status`; `clock` gives epoch seconds."""
    index, refused = TargetIndex(view), RejectionIndex(view)

    async def targets(request: web.Request) -> web.Response:
        asked = _parameters(request, _TARGET_PARAMETERS)
        limit, offset = _page(request)
        states = frozenset(request.query.getall("state", ()))
        _one_of("state", states, TargetState)
        _one_of("kind", {asked["kind"]} - {""}, Kind)
        snapshot = await index.snapshot()
        found = await snapshot.find(
            Search(parse_terms(asked["q"]), asked["kind"], asked["namespace"], states)
        )
        rows = [_row(target, meta_names) for target in found[offset : offset + limit]]
        return _answer(
            {"total": len(snapshot.targets), "found": len(found), "offset": offset, "targets": rows}
        )

    async def rejections(request: web.Request) -> web.Response:
        asked = _parameters(request, _REJECTION_PARAMETERS)
        limit, offset = _page(request)
        _one_of("kind", {asked["kind"]} - {""}, Kind)
        rejected = await refused.snapshot()
        found = await rejected.find(
            RejectionSearch(parse_terms(asked["q"]), asked["kind"], asked["namespace"], asked["reason"])
        )
        return _answer(
            {
                "total": len(rejected.rejections),
                "found": len(found),
                "offset": offset,
                "reasons": dict(rejected.reasons.most_common()),
                "rejections": [_rejection(one) for one in found[offset : offset + limit]],
            }
        )

    async def status(request: web.Request) -> web.Response:
        _parameters(request, frozenset())
        snapshot = await index.snapshot()
        shown = view.status()
        counts = {
            "targets": len(snapshot.targets),
            "states": snapshot.states,
            "kinds": snapshot.kinds,
            "rejections": dict((await refused.snapshot()).reasons.most_common()),
            "conflicts": len(shown.conflicts),
        }
        most = dataclasses.replace(shown, conflicts=shown.conflicts[:MOST_CONFLICTS])
        return _answer(
            {
                **msgspec.to_builtins(most),
                "conflicts": [
                    {"id": one.id, "object": _object(one.key), "holder": one.holder} for one in most.conflicts
                ],
                "unlisted": view.unlisted(),
                "counts": counts,
                "namespaces": sorted(snapshot.namespaces)[:MOST_NAMESPACES],
                "now": clock(),
            }
        )

    return [
        web.get(f"/api/v1/{handler.__name__}", _telling_problems(handler), allow_head=False)
        for handler in (targets, rejections, status)
    ]


def _telling_problems(handler: Handler) -> Handler:
    """Answer a query that makes no sense with 400 and an `error`."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except BadQuery as error:
            return _answer({"error": str(error)}, status=400)

    return handle


def _parameters(request: web.Request, known: frozenset[str]) -> dict[str, str]:
    """Return every known parameter, empty where it is not given; an unknown one is a `BadQuery`."""
    if not request.query.keys() <= known:
        raise BadQuery(
            f"the parameters are {', '.join(sorted(known))}" if known else "there are no parameters"
        )
    given = {name: request.query.get(name, "") for name in known}
    if len(given.get("q", "")) > LONGEST_SEARCH:
        raise BadQuery(f"q is at most {LONGEST_SEARCH} characters")
    return given


def _page(request: web.Request) -> tuple[int, int]:
    """Return limit and offset."""
    try:
        limit = int(request.query.get("limit", DEFAULT_LIMIT))
        offset = int(request.query.get("offset", 0))
    except ValueError:
        raise BadQuery("limit and offset are whole numbers") from None
    if not 1 <= limit <= MOST_LIMIT or offset < 0:
        raise BadQuery(f"limit is 1 to {MOST_LIMIT}, offset 0 or more")
    return limit, offset


def _one_of(name: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    if not set(given) <= set(allowed):
        raise BadQuery(f"{name} is one of {', '.join(allowed)}")


def _row(target: SeenTarget, meta_names: MetaNames) -> dict[str, Any]:
    """Return a target as the API shows it; `labels` are the meta as Consul has it."""
    service = target.service
    value = dict(service.meta)
    return {
        "id": service.id,
        "name": service.name,
        "object": _object(target.key),
        "node": value.get("node", ""),
        "address": service.address,
        "port": service.port,
        "socket": socket_address(target),
        "scheme": value.get("scheme", ""),
        "path": value.get("metrics_path", ""),
        "params": {
            key.removeprefix("param_"): text for key, text in service.meta if key.startswith("param_")
        },
        "shard": value.get("shard_path", ""),
        "tags": service.tags,
        "labels": {meta_names(key): text for key, text in service.meta},
        "state": target.state,
        "detail": target.detail,
    }


def _rejection(one: Rejection) -> dict[str, Any]:
    return {"object": _object(one.key), "reason": one.reason, "detail": one.detail, "kept_id": one.id}


def _object(key: ObjectKey) -> dict[str, str]:
    return {"kind": key.kind, "namespace": key.namespace, "name": key.name}


def _answer(value: dict[str, Any], status: int = 200) -> web.Response:
    try:
        body = msgspec.json.encode(value)
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8; JSON can spell it
        body = json.dumps(value).encode()
    return web.Response(status=status, body=body, headers=_HEADERS)
