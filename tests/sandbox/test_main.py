"""The sandbox in a process of its own."""

import asyncio
import json
import os
import re
import signal
import ssl
import sys
import time
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from k8s_consul_registrar.sandbox.synthetic import dual_stack, synthetic_nodes, synthetic_pod
from k8s_consul_registrar.sandbox.workloads import BLOCKS, Workloads
from support.waiting import PATIENCE, SLACK


async def test_sandbox_serves_until_it_is_terminated(tmp_path: Path) -> None:
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
        _, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, errors) == (0, b"")


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
        headers = {"Authorization": f"Bearer {told['token']}"}
        tls = ssl.create_default_context(cadata=told["ca"])
        async with aiohttp.ClientSession(headers=headers) as session:
            address = await _address_of_the_second_pod(session, told["kube"], tls)
            for scrapes in (1, 2):
                async with session.get(f"http://{address}:9102/metrics") as response:
                    assert f"\napp_scrapes_total {scrapes}\n" in await response.text()
            async with session.get(
                told["kubelets"]["kubelet-000"] + "/metrics/cadvisor", ssl=tls
            ) as response:
                text = await response.text()
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), PATIENCE)
    times = {int(stamp) / 1000 for stamp in re.findall(r" (\d{13})$", text, re.MULTILINE)}
    assert len(times) == 1
    assert abs(times.pop() - time.time()) < SLACK


async def _address_of_the_second_pod(
    session: aiohttp.ClientSession, url: str, tls: ssl.SSLContext
) -> IPv4Address:
    async with session.get(f"{url}/api/v1/pods", ssl=tls) as response:
        pods = (await response.json())["items"]
    return sorted(IPv4Address(pod["status"]["podIP"]) for pod in pods)[1]


async def test_workloads_beside_another_sandbox_take_another_block() -> None:
    """Where the first Pod's port is taken, all Pods are in the next block whose first address is free."""

    def pod_at(first_ip: IPv4Address) -> dict[str, Any]:
        return synthetic_pod(0, 0, first_ip)

    async with Workloads() as one, Workloads() as other, aiohttp.ClientSession() as session:
        first, second = await one.claim(pod_at), await other.claim(pod_at)
        assert first < second
        assert {first, second} <= set(BLOCKS)
        for address in (first, second):
            async with session.get(f"http://{address}:9102/metrics") as response:
                assert "\napp_scrapes_total 1\n" in await response.text()


async def test_without_streamed_lists_a_list_comes_only_in_pages() -> None:
    """With --no-streamed-lists initial events are 422; the other Pods that were asked for are there."""
    switches = ["--no-streamed-lists", "--small-pods", "3", "--rejected-pods", "2"]
    command = [sys.executable, "-W", "error", "-m", "k8s_consul_registrar.sandbox", *switches]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        told = json.loads(await process.stdout.readline())
        headers = {"Authorization": f"Bearer {told['token']}"}
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cadata=told["ca"]))
        async with aiohttp.ClientSession(told["kube"], headers=headers, connector=connector) as session:
            initial = {"watch": "1", "sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
            async with session.get("/api/v1/pods", params=initial) as response:
                assert response.status == 422
            async with session.get("/api/v1/pods", params={"limit": "2"}) as response:
                page = await response.json()
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), PATIENCE)
    assert [item["metadata"]["namespace"] for item in page["items"]] == ["rejected"] * 2
    assert page["metadata"]["remainingItemCount"] == 3


async def test_consul_answers_as_the_release_that_was_asked_for() -> None:
    """`--consul-release` names it; without it Consul is the newest. It is an agent, not a server."""
    for switches, version in (([], "2.1.0"), (["--consul-release", "1.15"], "1.15.10")):
        command = [sys.executable, "-W", "error", "-m", "k8s_consul_registrar.sandbox", *switches]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            assert process.stdout is not None
            told = json.loads(await process.stdout.readline())
            url = f"http://{told['consul']}/v1/agent/self"
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                config = (await response.json())["Config"]
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), PATIENCE)
        assert (config["Version"], config["Server"]) == (version, False)


async def test_terminal_is_shown_addresses_and_no_secret(tmp_path: Path) -> None:
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
        await asyncio.wait_for(process.wait(), PATIENCE)
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


def test_dual_stack_nodes_and_pods_have_their_ipv6_addresses_second() -> None:
    """As a cluster reports them whose first family is IPv4."""
    (node,) = map(dual_stack, synthetic_nodes(1))
    assert node["status"]["addresses"] == [
        {"type": "InternalIP", "address": "127.32.0.1"},
        {"type": "InternalIP", "address": "2001:db8::7f20:1"},
    ]
    status = dual_stack(synthetic_pod(0, 1))["status"]
    assert (status["podIP"], status["hostIP"]) == ("127.64.0.1", "127.32.0.1")
    assert status["podIPs"] == [{"ip": "127.64.0.1"}, {"ip": "2001:db8::7f40:1"}]
    assert status["hostIPs"] == [{"ip": "127.32.0.1"}, {"ip": "2001:db8::7f20:1"}]


def test_synthetic_pods_are_like_real_ones() -> None:
    """They are about 7 KB, each unlike the others, and four fifths ask to be scraped."""
    pods = [synthetic_pod(number, 3) for number in range(50)]
    assert 6_500 < len(json.dumps(pods[7], separators=(",", ":"))) < 7_500
    assert len({pod["status"]["podIP"] for pod in pods}) == 50
    assert len({(pod["metadata"]["namespace"], pod["metadata"]["name"]) for pod in pods}) == 50
    assert sum("annotations" in pod["metadata"] for pod in pods) == 40
