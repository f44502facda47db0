"""The demo, as a user starts it."""

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path

from k8s_consul_registrar.commands.demo import reserved_port
from support.waiting import PATIENCE


async def run_demo(folder: Path) -> bytes:
    """Run the demo without a Consul on PATH to its end, and return what it shows."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "k8s_consul_registrar",
        "demo",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PATH": "/usr/bin:/bin", "TMPDIR": str(folder)},
    )
    try:
        shown, said = await asyncio.wait_for(process.communicate(), 4 * PATIENCE)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert (process.returncode, said) == (0, b""), said
    return shown


async def test_two_demos_at_once_run_to_their_ends(tmp_path: Path) -> None:
    """Every step of both succeeds, what to try next is shown, and no temporary file is left."""
    for shown in await asyncio.gather(run_demo(tmp_path), run_demo(tmp_path)):
        assert b"it is deregistered" in shown
        assert b"plan --consul-backend none" in shown
    assert not any(entry.name for entry in os.scandir(tmp_path))


def test_reserved_port_is_given_once_and_can_be_listened_at() -> None:
    """A server that sets SO_REUSEADDR takes it; no one else is given it, however many are asked for."""
    with contextlib.ExitStack() as stack:
        ports = [reserved_port(stack) for _ in range(200)]
        assert len(set(ports)) == len(ports)
        for address in ("127.0.0.1", ""):
            with socket.create_server((address, ports[0])):
                pass


def test_reserved_port_is_given_to_no_kubelet() -> None:
    """A server on another address of loopback, which takes any free port, leaves it to the admin server."""
    with contextlib.ExitStack() as stack:
        ports = {reserved_port(stack) for _ in range(250)}
        kubelets = [stack.enter_context(socket.create_server(("127.0.0.2", 0))) for _ in range(600)]
        assert not ports & {kubelet.getsockname()[1] for kubelet in kubelets}
