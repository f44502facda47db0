"""Who fails lately, as JSON: what a label for each node would tell at the price of thousands of series."""

from collections.abc import Callable, Mapping

from aiohttp import web


def failing_routes(report: Callable[[], Mapping[str, object]]) -> list[web.RouteDef]:
    """Return `/api/v1/failing`, which answers with `report` as it is at that moment."""

    async def failing(_: web.Request) -> web.Response:
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return web.json_response(report(), headers=headers)

    return [web.get("/api/v1/failing", failing)]
