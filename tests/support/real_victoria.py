"""A real VictoriaMetrics for tests, the single-node server: it scrapes by Prometheus' own configuration.

One on PATH counts, else the one that `scripts/fetch-real-servers` left in `.cache/real`; without either the
test is skipped with the reason, or fails when `REQUIRE_REAL_SERVERS=1`.
"""

import contextlib
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from support.ports import reserve_ports
from support.real_process import LOOPBACK, PortTakenError, Program
from support.real_servers import CACHE, PORT_ATTEMPTS, START_WITHIN, unavailable

NAMES = ("victoria-metrics", "victoria-metrics-prod")
CACHED = CACHE / "victoria-metrics-1.79/usr/bin/victoria-metrics"


def victoria_binary() -> Path:
    """Return a VictoriaMetrics, the one on PATH first; skip or fail without one."""
    for name in NAMES:
        if found := shutil.which(name):
            return Path(found)
    if not CACHED.is_file():
        unavailable("no victoria-metrics on PATH, and none in .cache/real (scripts/fetch-real-servers)")
    return CACHED


class RealVictoria:
    """One VictoriaMetrics on loopback; `url` is its base address."""

    def __init__(self, binary: Path, folder: Path, config: str) -> None:
        address = f"{LOOPBACK}:{reserve_ports(1)[0]}"
        self.url = f"http://{address}"
        (folder / "scrape.yml").write_text(config)
        flags = {
            "httpListenAddr": address,
            "storageDataPath": folder / "data",
            "promscrape.config": folder / "scrape.yml",
            "promscrape.httpSDCheckInterval": "1s",
            "memory.allowedBytes": "64MB",
        }
        self.program = Program(
            [str(binary), *(f"-{name}={value}" for name, value in flags.items())], folder / "victoria.log"
        )

    async def is_ready(self) -> bool:
        """Whether it serves queries."""
        return (await self._answer("/health"))[0] == 200

    async def targets(self) -> list[dict[str, Any]]:
        """Return the active targets as its API gives them (`labels`, `scrapeUrl`, `health`, …)."""
        status, answer = await self._answer("/api/v1/targets?state=active")
        found: list[dict[str, Any]] = answer["data"]["activeTargets"] if status == 200 else []
        return found

    async def _answer(self, path: str) -> tuple[int, Any]:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}{path}") as response:
                is_json = response.content_type == "application/json"
                return response.status, await (response.json() if is_json else response.text())
        except aiohttp.ClientError:
            return 0, None


@contextlib.asynccontextmanager
async def real_victoria(config: str) -> AsyncIterator[RealVictoria]:
    """Run one VictoriaMetrics with this scrape configuration and wait until it is ready."""
    binary = victoria_binary()
    with tempfile.TemporaryDirectory(prefix="victoria-", ignore_cleanup_errors=True) as folder:
        for attempt in range(PORT_ATTEMPTS):
            victoria = RealVictoria(binary, Path(folder), config)
            victoria.program.launch()
            try:
                await victoria.program.ready(victoria.is_ready, START_WITHIN)
                break
            except PortTakenError:
                await victoria.program.stop(signal.SIGKILL)
                if attempt == PORT_ATTEMPTS - 1:
                    raise
        try:
            yield victoria
        finally:
            await victoria.program.stop(signal.SIGKILL)
