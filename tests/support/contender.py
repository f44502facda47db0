"""A replica as a process of its own: takes part in an election, and writes whenever it may.

Run as `contender.py KUBECONFIG NAMESPACE LEASE IDENTITY RECORD DURATION DEADLINE RETRY`; each write is a line of
identity and time (CLOCK_MONOTONIC, which all processes share) at the end of the file RECORD.
"""

import asyncio
import json
import os
import signal
import sys
import time

import uvloop

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.kube.access import load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster import LeaseClient
from k8s_consul_registrar.registrar.election import ElectionTiming
from k8s_consul_registrar.registrar.elector import Elector
from k8s_consul_registrar.telemetry import configure_logging

TIMING = ElectionTiming(4, 2.8, 0.5)  # a busy machine may be late by a second
LONG = ElectionTiming(10, 7, 0.5)  # where the lead must not be lost, however busy the machine is


async def write_while_leading(elector: Elector, identity: str, record: str) -> None:
    """Ask before each write, and write at once."""
    file = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        if elector.is_leader:
            os.write(file, f"{identity} {time.monotonic()}\n".encode())
        await asyncio.sleep(0.002)


async def main(kubeconfig: str, namespace: str, name: str, identity: str, record: str, *timing: str) -> None:
    """Take part until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with KubeClient(load_access({"KUBECONFIG": kubeconfig}), Timing()) as client:
        elector = Elector(
            LeaseClient(client, namespace, name), identity, ElectionTiming(*map(json.loads, timing))
        )
        writing = asyncio.create_task(write_while_leading(elector, identity, record))
        taking_part = asyncio.create_task(elector.run())
        await stop.wait()
        for task in (writing, taking_part):
            task.cancel()
            await asyncio.wait({task})


if __name__ == "__main__":
    configure_logging("info", "json")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
