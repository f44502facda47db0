"""Pods that move to the proxy: their services wait until it serves Pods, and nothing moves back."""

import contextlib
import json
from collections.abc import AsyncIterator

from support.cluster import PROXY_RULES, rule
from support.daemon import Daemon
from support.lab import SandboxLab, running_lab
from support.processes import LOOPBACK, reserve_ports

POD, OTHER = "pod--shop--web-1", "pod--shop--web-2"
OWN = "198.51.100.10"
WAITS = "Pods stay at their own addresses until the proxy serves them"
MOVES = "the proxy serves Pods; their services move to it"


@contextlib.asynccontextmanager
async def proxy(lab: SandboxLab, port: int, **environment: str) -> AsyncIterator[Daemon]:
    """Run a proxy that asks for a token, with PROXY_PODS or without."""
    token = lab.folder / "inbound"
    token.write_text("what-prometheus-shows\n")
    account = lab.folder / "proxy-token"
    account.write_text(await lab.cluster.token([*PROXY_RULES, rule("list watch", "pods")]))
    settings = {
        "PORT": str(port),
        "PROXY_BEARER_TOKEN_FILE": str(token),
        "KUBECONFIG": str(kubeconfig_of(lab)),
    }
    async with await lab.proxy(**{**settings, **environment}) as daemon:
        await daemon.ready()
        yield daemon


def kubeconfig_of(lab: SandboxLab) -> str:
    """Return a kubeconfig with the proxy's own token."""
    path = lab.folder / "proxy-kubeconfig"
    path.write_text(lab.kubeconfig.read_text().replace(str(lab.token_file), str(lab.folder / "proxy-token")))
    return str(path)


async def test_pods_move_to_the_proxy_once_it_serves_them() -> None:
    """Until then they stay where they are, which log, metric and status say; afterwards nothing moves back."""
    (port,) = reserve_ports(1)
    moved = {"POD_ADDRESS": "proxy", "PROXY_NODE_PORT": str(port)}
    async with running_lab() as lab:
        await lab.cluster.add_pod("web-1", ips=[OWN], host_ip=LOOPBACK)
        async with await lab.registrar() as daemon:
            await daemon.ready()
            assert lab.address(POD) == OWN
            assert await daemon.terminate() == 0
        async with await lab.registrar(**moved) as daemon:
            await daemon.ready()
            assert "cannot be reached" in (await daemon.until_said(WAITS))["problem"]
            await daemon.measures("awaiting_proxy_services", 1)
            async with proxy(lab, port):
                assert "relays no Pods" in (await daemon.until_said(WAITS, "relays no Pods"))["problem"]
                status = json.loads((await daemon.admin("/api/v1/status"))[1])
                assert status["proxy_wait"]["count"] == 1
                assert "relays no Pods" in status["proxy_wait"]["problem"]
                await daemon.passes()
                assert lab.address(POD) == OWN
            # What is new has no address to stay at, and what is gone goes.
            await lab.cluster.add_pod("web-2", ips=["198.51.100.11"], host_ip=LOOPBACK)
            await daemon.until(lambda: lab.address(OTHER) == LOOPBACK)
            await lab.cluster.delete_pod("web-2")
            await daemon.until(lambda: lab.has(POD))
            assert lab.address(POD) == OWN
            async with proxy(lab, port, PROXY_PODS="true"):
                assert (await daemon.until_said(MOVES))["services"] == 1
                await daemon.until(lambda: lab.address(POD) == LOOPBACK)
            await daemon.measures("awaiting_proxy_services", 0)
            await daemon.passes()
            assert lab.address(POD) == LOOPBACK
            assert await daemon.terminate() == 0
        async with await lab.registrar(**moved) as daemon:
            await daemon.ready()
            await daemon.passes()
            assert lab.address(POD) == LOOPBACK
            assert not daemon.said(WAITS)
        assert not any(write == f"deregister {POD}" for write in lab.writes)
