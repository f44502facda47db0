"""The place where a scenario runs, and what it returns."""

import contextlib
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from registering.churn import is_annotated
from registering.stage import NODES, Api, sandbox_api


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one run by their keys, and notes for a reader."""

    figures: dict[str, float]
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Bench:
    """The place where scenarios run: a folder, the sandboxes that runs share, and how long changes go on."""

    folder: Path
    seconds: float
    with_limits: bool
    hour: float = 3600.0
    _sandboxes: dict[tuple[int, int, int, int], Api] = field(default_factory=dict)
    _agents: dict[int, str] = field(default_factory=dict)
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def api(self, pods: int, *, small: int = 0, rejected: int = 0, endpoints: int = 0) -> Api:
        """Return a sandbox with these objects, one for all runs of a row."""
        key = (pods, small, rejected, endpoints)
        if key not in self._sandboxes:
            stage = sandbox_api(self.folder, pods=pods, small=small, rejected=rejected, endpoints=endpoints)
            self._sandboxes[key] = await self._stack.enter_async_context(stage)
        return self._sandboxes[key]

    async def agent(self, foreign: int, stage: AbstractAsyncContextManager[str]) -> str:
        """Return the Consul agent that holds these foreign services, one for all runs of a row."""
        if foreign not in self._agents:
            self._agents[foreign] = await self._stack.enter_async_context(stage)
        return self._agents[foreign]

    async def close(self) -> None:
        """End what the runs shared."""
        self._sandboxes.clear()
        self._agents.clear()
        await self._stack.aclose()


def targets_of(pods: int) -> int:
    """Return the number of targets of a sandbox with these Pods, Nodes included."""
    return sum(is_annotated(number) for number in range(pods)) + NODES


def milliseconds(seconds: float) -> str:
    """Return seconds as text in milliseconds."""
    return f"{seconds * 1e3:.0f} ms"
