"""The page Prometheus scrapes of the daemon itself."""

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder


async def nothing() -> None:
    """Prepare nothing."""


def metrics_routes(
    registry: CollectorRegistry, prepare: Callable[[], Awaitable[None]] = nothing
) -> list[web.RouteDef]:
    """Return `/metrics`: the registry in the text format, or in OpenMetrics where `Accept` asks for it.

    `prepare` is awaited first: it counts what takes longer than the loop may stand still.
    """

    async def metrics(request: web.Request) -> web.Response:
        await prepare()
        encode, content_type = choose_encoder(",".join(request.headers.getall("Accept", [])))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    return [web.get("/metrics", metrics)]
