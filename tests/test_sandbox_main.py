"""The sandbox in a process of its own."""

import asyncio
import json
import signal
import ssl
import sys
from pathlib import Path

import aiohttp
import pytest

from k8s_consul_registrar.sandbox.synthetic import synthetic_pod


@pytest.mark.timeout(30)
async def test_it_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    """It tells its addresses on stdout and in the file, serves what was asked for and ends with 0."""
    port_file, kubeconfig = tmp_path / "ports.json", tmp_path / "config"
    command = [sys.executable, "-W", "error", "-m", "k8s_consul_registrar.sandbox"]
    sizes = ["--pods", "10", "--nodes", "2", "--kubelets", "1"]
    files = ["--port-file", str(port_file), "--kubeconfig", str(kubeconfig)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, *sizes, *files, stdout=pipe, stderr=pipe)
    try:
        assert process.stdout is not None
        told = json.loads(await process.stdout.readline())
        assert json.loads(port_file.read_text()) == told
        assert kubeconfig.exists()
        await _look_around(told)
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), 10)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, errors) == (0, b"")


async def _look_around(told: dict[str, str]) -> None:
    tls = ssl.create_default_context(cadata=told["ca"])
    headers = {"Authorization": f"Bearer {told['token']}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        for path, count in (("/api/v1/pods", 10), ("/api/v1/nodes", 3)):
            async with session.get(told["kube"] + path, ssl=tls) as response:
                assert len((await response.json())["items"]) == count
        async with session.get(f"http://{told['consul']}/v1/agent/services") as response:
            assert await response.json() == {}


def test_synthetic_pods_are_like_real_ones() -> None:
    """They are about 7 KB, each unlike the others, and four fifths ask to be scraped."""
    pods = [synthetic_pod(number, 3) for number in range(50)]
    assert 6_500 < len(json.dumps(pods[7], separators=(",", ":"))) < 7_500
    assert len({pod["status"]["podIP"] for pod in pods}) == 50
    assert len({(pod["metadata"]["namespace"], pod["metadata"]["name"]) for pod in pods}) == 50
    assert sum("annotations" in pod["metadata"] for pod in pods) == 40
