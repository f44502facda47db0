"""Ctrl-C while a command waits."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

from support.waiting import PATIENCE, until


@pytest.mark.parametrize("command", ["check", "plan", "sync"])
async def test_command_that_waits_ends_with_130_on_ctrl_c(command: str, tmp_path: Path) -> None:
    """An API server that accepts connections and never answers does not keep a command from ending."""
    connected = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        with contextlib.suppress(OSError):
            while await reader.read(4096):
                pass
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        kubeconfig = tmp_path / "kubeconfig"
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        user = {"name": "u", "user": {"token": "t"}}
        kubeconfig.write_text(
            yaml.safe_dump(
                {"clusters": [cluster], "contexts": [context], "users": [user], "current-context": "x"}
            )
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "k8s_consul_registrar",
            command,
            "--cluster-name=lab",
            f"--kubeconfig={kubeconfig}",
            f"--consul-address=127.0.0.1:{port}",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "HOME": str(tmp_path)},
        )
        try:
            await until(connected.is_set)
            process.send_signal(signal.SIGINT)
            _, said = await asyncio.wait_for(process.communicate(), PATIENCE)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 130
        assert b"Traceback" not in said
