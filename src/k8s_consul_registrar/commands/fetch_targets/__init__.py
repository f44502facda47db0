"""The command fetch-targets: keeps files equal to what registrars serve, beside a Prometheus far from them."""

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

import aiohttp

from k8s_consul_registrar.admin.metrics import new_registry
from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.commands.fetch_targets.arguments import read_arguments
from k8s_consul_registrar.commands.fetch_targets.follower import Follower
from k8s_consul_registrar.runner import EXIT_FAILURE, EXIT_OK, Stop, run_loop, run_mode, run_until_stopped
from k8s_consul_registrar.settings import parsers as parse
from k8s_consul_registrar.telemetry import LEVELS, configure_logging, get_logger

log = get_logger("fetch")


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Follow every URL until a signal, or fetch each once: exit 0 all written, 1 one failed, 2 wrong arguments."""
    level = parse.choice(*LEVELS).parse(environment.get("LOG_LEVEL", ""))
    configure_logging(level or ("error" if parsed.once else "info"), "")
    followers = [
        Follower(source, tls, token, wait=parsed.wait) for source, tls, token in read_arguments(parsed)
    ]
    if parsed.once:
        return run_loop(_once(followers))
    return run_mode(lambda stop: _follow(followers, parsed.admin_port, stop))


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
    )


async def _once(followers: Sequence[Follower]) -> int:
    async with _session() as session:
        problems = await asyncio.gather(*(one.fetch_once(session) for one in followers))
    for one, problem in zip(followers, problems, strict=True):
        print(f"{one.source.name}: {problem or f'{one.source.path} holds its targets'}", file=sys.stderr)
    return EXIT_FAILURE if any(problems) else EXIT_OK


class _Health:
    """The command as its probes see it."""

    def __init__(self, followers: Sequence[Follower]) -> None:
        self._followers = followers

    def is_alive(self) -> bool:
        return True

    def readiness(self) -> str:
        return "; ".join(f"{one.source.name}: {one.problem}" for one in self._followers if one.problem)


async def _follow(followers: Sequence[Follower], admin_port: int | None, stop: Stop) -> None:
    async with _session() as session, AsyncExitStack() as stack:
        ports = {}
        if admin_port is not None:
            admin = AdminServer(
                port=admin_port, health=_Health(followers), registry=new_registry("fetch-targets")
            )
            await stack.enter_async_context(admin)
            ports["admin_port"] = admin.port
        log.info("fetching targets", files=[str(one.source.path) for one in followers], **ports)
        await run_until_stopped(stop, *(one.run(session) for one in followers))
    log.info("fetching ends; the files stay")
