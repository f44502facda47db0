"""The demo, as a user starts it."""

import asyncio
import os
import sys
from pathlib import Path

from support.waiting import PATIENCE


async def test_demo_without_a_consul_on_path_runs_to_its_end(tmp_path: Path) -> None:
    """Every step succeeds on the sandbox, and nothing is left in the folder for temporary files."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "k8s_consul_registrar",
        "demo",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)},
    )
    try:
        shown, said = await asyncio.wait_for(process.communicate(), 4 * PATIENCE)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert (process.returncode, said) == (0, b""), said
    assert b"it is deregistered" in shown
    assert not any(entry.name for entry in os.scandir(tmp_path))
