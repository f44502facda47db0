"""Workloads of the Pods: metrics at the Pods' own addresses."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, ip_address
from typing import Any, Self

from aiohttp import web

# Each takes a socket.
MOST = 200
# Addresses of a sandbox's first Pod; a second sandbox on the machine takes another one.
BLOCKS = tuple(IPv4Address(f"127.{second}.0.1") for second in range(64, 128))

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Workloads:
    """Answers scrapes of Pods with a loopback address; an asynchronous context manager."""

    def __init__(self) -> None:
        self._started = time.time()
        self._scrapes: Counter[str] = Counter()
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def claim(self, pod_at: Callable[[IPv4Address], Mapping[str, Any]]) -> IPv4Address:
        """Run the first Pod in the first block where its port is free, and return the block's address.

        Raises OSError if it is free in none.
        """
        for first_ip in BLOCKS[:-1]:
            with contextlib.suppress(OSError):
                await self.run(pod_at(first_ip))
                return first_ip
        await self.run(pod_at(BLOCKS[-1]))
        return BLOCKS[-1]

    async def run(self, pod: Mapping[str, Any]) -> bool:
        """Answer on a Pod's annotated port, and return True, if the Pod has a loopback address.

        Raises OSError if the port is taken.
        """
        host = pod["status"].get("podIP", "")
        port = pod["metadata"].get("annotations", {}).get("prometheus.io/port", "")
        if not (port.isdecimal() and host and ip_address(host).is_loopback):
            return False
        await web.TCPSite(self._runner, host, int(port)).start()
        return True

    async def _answer(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        host, port = request.transport.get_extra_info("sockname")[:2]
        where = f"{host}:{port}"
        self._scrapes[where] += 1
        text = (
            "# HELP app_scrapes_total Scrapes of this Pod.\n"
            "# TYPE app_scrapes_total counter\n"
            f"app_scrapes_total {self._scrapes[where]}\n"
            "# HELP process_start_time_seconds Start time of this Pod, in seconds since the epoch.\n"
            "# TYPE process_start_time_seconds gauge\n"
            f"process_start_time_seconds {self._started:.3f}\n"
        )
        return web.Response(body=text.encode(), headers={"Content-Type": _CONTENT_TYPE})
