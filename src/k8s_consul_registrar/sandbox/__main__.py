"""Runs a sandbox in a process of its own: `python -m k8s_consul_registrar.sandbox --pods 10000 --nodes 200`.

Prints where everything is, as one line of JSON unless it is to a terminal, and ends on SIGTERM or SIGINT.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from k8s_consul_registrar.sandbox.sandbox import Sandbox
from k8s_consul_registrar.sandbox.synthetic import (
    FIRST_POD_IP,
    small_pods,
    synthetic_nodes,
    synthetic_pod,
    synthetic_pods,
)
from k8s_consul_registrar.sandbox.workloads import MOST, Workloads

SMALL, REJECTED = "small", "rejected"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m k8s_consul_registrar.sandbox", description=__doc__)
    parser.add_argument("--pods", type=int, default=0, help="synthetic Pods of about 7 KB to begin with")
    parser.add_argument("--small-pods", type=int, default=0, help=f"Pods in the namespace {SMALL}")
    parser.add_argument(
        "--rejected-pods",
        type=int,
        default=0,
        help=f"Pods in the namespace {REJECTED}, with a port they lack",
    )
    parser.add_argument("--nodes", type=int, default=0, help="synthetic Nodes, without kubelets")
    parser.add_argument("--kubelets", type=int, default=0, help="Nodes with kubelets on 127.0.0.2 and on")
    parser.add_argument(
        "--metrics-file", type=Path, help="what the kubelets answer instead of the recorded text"
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help=f"the first {MOST} synthetic Pods answer scrapes, and kubelets stamp samples with the present time",
    )
    parser.add_argument(
        "--no-streamed-lists",
        action="store_true",
        help="refuse sendInitialEvents, as an API server without the feature gate WatchList does",
    )
    parser.add_argument("--kube-port", type=int, default=0, help="0: any free port")
    parser.add_argument("--consul-port", type=int, default=0, help="0: any free port")
    parser.add_argument("--kubeconfig", type=Path, help="where to write the administrator's kubeconfig")
    parser.add_argument("--port-file", type=Path, help="where to write the line of JSON as well, atomically")
    return parser.parse_args(arguments)


async def run(arguments: argparse.Namespace) -> None:
    """Serve until a signal comes."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with (
        Sandbox(
            kube_port=arguments.kube_port,
            consul_port=arguments.consul_port,
            can_stream_lists=not arguments.no_streamed_lists,
        ) as sandbox,
        Workloads() as workloads,
    ):
        await create_objects(sandbox, workloads, arguments)
        metrics = arguments.metrics_file.read_bytes() if arguments.metrics_file else None
        for index in range(arguments.kubelets):
            host = f"127.0.{(index + 2) // 256}.{(index + 2) % 256}"
            await sandbox.add_kubelet(f"kubelet-{index:03d}", host, metrics=metrics, is_live=arguments.live)
        if arguments.kubeconfig:
            sandbox.write_kubeconfig(arguments.kubeconfig)
        places = places_of(sandbox)
        if arguments.port_file:
            announce(places, arguments.port_file)
        text = summary(places, arguments.kubeconfig) if sys.stdout.isatty() else as_line(places)
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        await stopped.wait()


async def create_objects(sandbox: Sandbox, workloads: Workloads, arguments: argparse.Namespace) -> None:
    """Create the Nodes and Pods that the command line asks for."""
    for node in synthetic_nodes(arguments.nodes):
        sandbox.kube.create(node)
    first_ip = FIRST_POD_IP
    if arguments.live and arguments.pods:
        first_ip = await workloads.claim(lambda ip: synthetic_pod(0, arguments.nodes, ip))
    for index, pod in enumerate(synthetic_pods(arguments.pods, arguments.nodes, first_ip)):
        sandbox.kube.create(pod)
        if arguments.live and 0 < index < MOST:
            await workloads.run(pod)
    for pod in small_pods(arguments.small_pods, SMALL):
        sandbox.kube.create(pod)
    for pod in small_pods(arguments.rejected_pods, REJECTED, is_rejected=True):
        sandbox.kube.create(pod)


def places_of(sandbox: Sandbox) -> dict[str, Any]:
    """Return where everything is, and what lets in."""
    return {
        "kube": sandbox.kube.url,
        "ca": sandbox.ca_pem.decode(),
        "token": sandbox.admin_token,
        "consul": sandbox.consul.address,
        "kubelets": {name: kubelet.url for name, kubelet in sandbox.kubelets.items()},
    }


def as_line(places: Mapping[str, Any]) -> str:
    """Return the places for a program."""
    return msgspec.json.encode(places).decode()


def summary(places: Mapping[str, Any], kubeconfig: Path | None) -> str:
    """Return the places for a reader; what lets in is in the kubeconfig, not on the screen."""
    hint = f"KUBECONFIG={kubeconfig}" if kubeconfig else "--kubeconfig FILE writes what lets you in"
    lines = [f"Kubernetes API  {places['kube']}   {hint}", f"Consul          http://{places['consul']}"]
    lines += [f"{name:<15} {url}" for name, url in list(places["kubelets"].items())[:10]]
    return "\n".join([*lines, "Ctrl-C ends it."])


def announce(places: Mapping[str, Any], port_file: Path) -> None:
    """Tell where everything is by a file, in one step."""
    unfinished = port_file.with_name(f"{port_file.name}.{os.getpid()}")
    unfinished.write_text(as_line(places) + "\n")
    unfinished.rename(port_file)


if __name__ == "__main__":
    uvloop.run(run(parse_arguments(sys.argv[1:])))
