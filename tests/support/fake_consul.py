"""A server that answers as a test tells it to, for what no healthy Consul does."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress
from k8s_consul_registrar.consul.client import ConsulClient

QUICK = Timing(
    retry_first=0.02,
    retry_cap=0.05,
    connect_timeout=1,
    read_timeout=1,
    gather=0.0,
    tick=0.2,
    write_interval=0.0,
    probe=0.02,
)

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    """Serve on a port of loopback; yields the base URL."""
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client_of(
    url: str, *, token: str = "", namespace: str = "", partition: str = "", timing: Timing = QUICK
) -> AsyncIterator[ConsulClient]:
    """Open a client for a Consul at a base URL."""
    access = ConsulAccess(ConsulAddress(url), token=token, namespace=namespace, partition=partition)
    async with ConsulClient(access, timing) as client:
        yield client
