"""Faults at random while the cluster churns, and then quiet: Consul equals the cluster, memory is flat."""

import asyncio
import random
import signal
import time

import pytest

from chaos_lab import IS_SOAK, ChaosLab, chaos, chaos_lab, is_blind, scaled
from consul_kit import empty
from daemon import Daemon
from http_door import CutAfter, Refuse
from real_servers import RealConsul, real_consul

pytestmark = chaos("chaos-consul", seconds=150, soak_seconds=1200)

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


async def _befall(lab: ChaosLab, consul: RealConsul, pick: random.Random) -> None:
    """Let something go wrong for a while, and mend it."""
    fault = pick.choice(["api down", "api cut", "api refuses", "half lists", "expired", "consul down",
                         "consul cut", "consul slow", "consul refuses", "consul restarts", "consul is emptied"])  # fmt: skip
    match fault:
        case "api down":
            lab.api_wire.refuse()
        case "api cut":
            lab.api_wire.cut()
        case "api refuses":
            lab.api.fault = lambda _: Refuse(503)
            lab.api_wire.cut()
        case "half lists":
            lab.api.fault = lambda _: CutAfter(2000)
            lab.forget_history()
        case "expired":
            lab.forget_history()
        case "consul down":
            lab.consul_wire.refuse()
        case "consul cut":
            lab.consul_wire.cut()
        case "consul slow":
            lab.consul_wire.delay = 0.2
        case "consul refuses":
            lab.consul.fault = lambda _: Refuse(500)
        case _:
            await consul.program.stop(signal.SIGKILL)
            if fault == "consul is emptied":
                empty(consul)
            await consul.start()
    await asyncio.sleep(pick.uniform(0.3, 2))
    lab.api.heal()
    lab.consul.heal()
    await lab.api_wire.heal()
    await lab.consul_wire.heal()
    await asyncio.sleep(pick.uniform(0.3, 2))


@pytest.mark.parametrize("backend", ["catalog", "agent"] if IS_SOAK else ["catalog"])
async def test_churn_with_faults(backend: str) -> None:
    """Through all of it nothing that is wanted is removed, and in the quiet nothing is left to do."""
    pick = random.Random(55)
    async with real_consul() as consul, chaos_lab(consul) as lab:
        node = consul.node if backend == "agent" else ""
        async with await lab.chaotic(CONSUL_BACKEND=backend, LOG_LEVEL="warning") as daemon:
            lab.put_pods(500)
            lab.put_nodes(5)
            await lab.equal(daemon, node=node)
            churn = _Churn(lab, pick)
            faults = asyncio.create_task(_go_wrong(lab, consul, pick))
            await _change(churn, SECONDS / 3)
            early = daemon.megabytes()
            await _change(churn, 2 * SECONDS / 3)
            faults.cancel()
            await asyncio.gather(faults, return_exceptions=True)
            await _mend(lab, consul)
            took = await lab.equal(daemon, node=node, within=60 if not IS_SOAK else 30)
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


async def _go_wrong(lab: ChaosLab, consul: RealConsul, pick: random.Random) -> None:
    while True:
        await _befall(lab, consul, pick)


async def _mend(lab: ChaosLab, consul: RealConsul) -> None:
    lab.api.heal()
    lab.consul.heal()
    await lab.api_wire.heal()
    await lab.consul_wire.heal()
    if not consul.program.is_running or not await consul.is_ready():
        await consul.program.stop(signal.SIGKILL)
        await consul.start()
