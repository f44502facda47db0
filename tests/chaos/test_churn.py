"""Faults at random while the cluster churns, and then quiet: Consul equals the cluster, memory is flat."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable

import pytest

from support.daemon import Daemon
from support.doors import CutAfter
from support.lab import IS_SOAK, ChaosLab, chaos, chaos_lab, is_blind, scaled
from support.real_servers import real_consul, restart_empty
from support.waiting import PATIENCE_FACTOR

pytestmark = chaos("chaos-consul", soak_seconds=1200)

SECONDS = scaled(24, 600)
RATE = 50  # changes a second
GROWTH = 30  # megabytes that churn may add


class _Churn:
    """Changes a cluster at random, never the same name twice."""

    def __init__(self, lab: ChaosLab, pick: random.Random) -> None:
        self._lab = lab
        self._pick = pick
        self._count = 0

    def step(self) -> None:
        """Make one change."""
        pods = [key for key in self._pick.sample(sorted(self._lab.wanted), 5) if key.startswith("pod")]
        kind = self._pick.random()
        if kind < 0.45 or len(self._lab.wanted) < 100:
            self._count += 1
            self._lab.put_pod(f"churn-{self._count}", address=f"198.18.7.{self._count % 250 + 1}")
        elif kind < 0.85 and pods:
            self._lab.drop_pod(pods[0].removeprefix("pod--shop--"))
        elif pods:
            self._lab.put_pod(
                pods[0].removeprefix("pod--shop--"), address=f"198.18.8.{self._pick.randrange(1, 250)}"
            )


Fault = Callable[[ChaosLab], Awaitable[None] | None]


def _api_refuses(lab: ChaosLab) -> None:
    lab.api.refuse(503)
    lab.api_wire.cut()


def _lists_break_off(lab: ChaosLab) -> None:
    lab.api.fault = lambda _: CutAfter(2000)
    lab.forget_history()


def _slow(lab: ChaosLab) -> None:
    lab.consul_wire.delay = 0.2


async def _restarts(lab: ChaosLab) -> None:
    await lab.real.restart(signal.SIGKILL)


FAULTS: tuple[Fault, ...] = (
    lambda lab: lab.api_wire.refuse(),
    lambda lab: lab.api_wire.cut(),
    lambda lab: lab.forget_history(),
    lambda lab: lab.consul_wire.refuse(),
    lambda lab: lab.consul_wire.cut(),
    lambda lab: lab.consul.refuse(500),
    lambda lab: restart_empty(lab.real),
    _api_refuses,
    _lists_break_off,
    _slow,
    _restarts,
)


async def _befall(lab: ChaosLab, pick: random.Random) -> None:
    """Let something go wrong for a while, and mend it."""
    doing = pick.choice(FAULTS)(lab)
    if doing is not None:
        await doing
    await asyncio.sleep(pick.uniform(0.3, 2))
    await _mend(lab)
    await asyncio.sleep(pick.uniform(0.3, 2))


@pytest.mark.parametrize("backend", ["catalog", *(["agent"] if IS_SOAK else [])])
async def test_churn_with_faults(backend: str) -> None:
    """Through all of it nothing that is wanted is removed, and in the quiet nothing is left to do."""
    pick = random.Random(55)
    async with real_consul() as consul, chaos_lab(consul) as lab:
        node = consul.node if backend == "agent" else ""
        async with await lab.chaotic(CONSUL_BACKEND=backend) as daemon:
            lab.put_pods(500)
            lab.put_nodes(5)
            await lab.equal(daemon, node=node)
            churn = _Churn(lab, pick)
            faults = asyncio.create_task(_go_wrong(lab, pick))
            await _change(churn, SECONDS / 3)
            early = daemon.megabytes()
            await _change(churn, 2 * SECONDS / 3)
            faults.cancel()
            await asyncio.gather(faults, return_exceptions=True)
            await _mend(lab)
            if not await consul.is_ready():  # the last fault was cut short
                await consul.restart(signal.SIGKILL)
            took = await lab.equal(daemon, node=node, within=scaled(60, 30) * PATIENCE_FACTOR)
            await daemon.until(lambda: _sees(daemon))
            assert await lab.is_quiet_for(2), f"still writing {took:g} s after the last fault"
            lab.assert_nothing_wrongful()
            assert daemon.megabytes() < early + GROWTH


async def _sees(daemon: Daemon) -> bool:
    return not (await is_blind(daemon, "pod") or await is_blind(daemon, "node"))


async def _change(churn: _Churn, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        churn.step()
        await asyncio.sleep(1 / RATE)


async def _go_wrong(lab: ChaosLab, pick: random.Random) -> None:
    while True:
        await _befall(lab, pick)


async def _mend(lab: ChaosLab) -> None:
    lab.api.heal()
    lab.consul.heal()
    await lab.api_wire.heal()
    await lab.consul_wire.heal()
