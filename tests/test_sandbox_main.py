"""The sandbox in a process of its own."""

import asyncio
import json
import os
import re
import signal
import ssl
import sys
import time
from pathlib import Path

import aiohttp
import pytest
import yaml

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


@pytest.mark.timeout(30)
async def test_live_pods_and_kubelets_can_be_scraped(tmp_path: Path) -> None:
    """With --live a Pod answers at its own address, and a kubelet's samples are of this moment."""
    port_file = tmp_path / "ports.json"
    sizes = ["--pods", "2", "--kubelets", "1", "--live", "--port-file", str(port_file)]
    command = [sys.executable, "-W", "error", "-m", "k8s_consul_registrar.sandbox", *sizes]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe)
    try:
        assert process.stdout is not None
        told = json.loads(await process.stdout.readline())
        pod = synthetic_pod(1, 0)
        headers = {"Authorization": f"Bearer {told['token']}"}
        tls = ssl.create_default_context(cadata=told["ca"])
        async with aiohttp.ClientSession(headers=headers) as session:
            for scrapes in (1, 2):
                async with session.get(f"http://{pod['status']['podIP']}:9102/metrics") as response:
                    assert f"\napp_scrapes_total {scrapes}\n" in await response.text()
            async with session.get(
                told["kubelets"]["kubelet-000"] + "/metrics/cadvisor", ssl=tls
            ) as response:
                text = await response.text()
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 10)
    times = {int(stamp) / 1000 for stamp in re.findall(r" (\d{13})$", text, re.MULTILINE)}
    assert len(times) == 1
    assert abs(times.pop() - time.time()) < 20


@pytest.mark.timeout(30)
async def test_a_terminal_is_shown_addresses_and_no_secret(tmp_path: Path) -> None:
    """Who starts it by hand reads where everything is; the token stays in the kubeconfig."""
    kubeconfig = tmp_path / "config"
    command = [sys.executable, "-m", "k8s_consul_registrar.sandbox", "--kubelets", "1"]
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(*command, "--kubeconfig", str(kubeconfig), stdout=theirs)
    try:
        text = ""
        while "Ctrl-C" not in text:
            text += (await asyncio.to_thread(os.read, ours, 4096)).decode()
    finally:
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.wait(), 10)
        os.close(theirs)
        os.close(ours)
    assert process.returncode == 0
    assert f"KUBECONFIG={kubeconfig}" in text
    assert "http://127.0.0.1:" in text
    assert "kubelet-000" in text
    assert yaml.safe_load(kubeconfig.read_text())["users"][0]["user"]["token"] not in text


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
