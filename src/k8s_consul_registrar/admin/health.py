"""Whether the daemon is alive and whether it is ready, as its probes ask."""

from typing import Protocol

from aiohttp import web


class Health(Protocol):
    """What the probes need to know of the daemon."""

    def is_alive(self) -> bool:
        """Whether the main loop ticked lately; false asks the kubelet to restart us."""

    def readiness(self) -> str:
        """Why the daemon is not ready, in a line; empty when it is."""


def health_routes(health: Health) -> list[web.RouteDef]:
    """Return `/healthz` and `/readyz`: 200 or 503, with the reason in one line of text."""

    async def healthz(_: web.Request) -> web.Response:
        return _answer("" if health.is_alive() else "the main loop has not ticked lately")

    async def readyz(_: web.Request) -> web.Response:
        return _answer(health.readiness())

    return [web.get("/healthz", healthz), web.get("/readyz", readyz)]


def _answer(problem: str) -> web.Response:
    """Return 200 when there is no problem, else 503 with the problem on one line."""
    text = " ".join(problem.split()) or "ok"
    return web.Response(
        status=503 if problem else 200, text=f"{text}\n", headers={"Cache-Control": "no-store"}
    )
