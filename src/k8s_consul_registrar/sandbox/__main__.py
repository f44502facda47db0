"""Runs a sandbox in a process of its own: `python -m k8s_consul_registrar.sandbox --pods 10000 --nodes 200`.

Prints one line of JSON with the addresses and the administrator's kubeconfig, and ends on SIGTERM or
SIGINT.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop

from k8s_consul_registrar.sandbox.sandbox import Sandbox
from k8s_consul_registrar.sandbox.synthetic import synthetic_nodes, synthetic_pods


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m k8s_consul_registrar.sandbox", description=__doc__)
    parser.add_argument("--pods", type=int, default=0, help="synthetic Pods of about 7 KB to begin with")
    parser.add_argument("--nodes", type=int, default=0, help="synthetic Nodes, without kubelets")
    parser.add_argument("--kubelets", type=int, default=0, help="Nodes with kubelets on 127.0.0.2 and on")
    parser.add_argument(
        "--metrics-file", type=Path, help="what the kubelets answer instead of the recorded text"
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
    ports = {"kube_port": arguments.kube_port, "consul_port": arguments.consul_port}
    async with Sandbox(**ports) as sandbox:
        for node in synthetic_nodes(arguments.nodes):
            sandbox.kube.create(node)
        for pod in synthetic_pods(arguments.pods, arguments.nodes):
            sandbox.kube.create(pod)
        metrics = arguments.metrics_file.read_bytes() if arguments.metrics_file else None
        for index in range(arguments.kubelets):
            host = f"127.0.{(index + 2) // 256}.{(index + 2) % 256}"
            await sandbox.add_kubelet(f"kubelet-{index:03d}", host, metrics=metrics)
        if arguments.kubeconfig:
            sandbox.write_kubeconfig(arguments.kubeconfig)
        announce(sandbox, arguments.port_file)
        await stopped.wait()


def announce(sandbox: Sandbox, port_file: Path | None) -> None:
    """Tell where everything is, by stdout and, in one step, by a file."""
    line = msgspec.json.encode(
        {
            "kube": sandbox.kube.url,
            "ca": sandbox.ca_pem.decode(),
            "token": sandbox.admin_token,
            "consul": sandbox.consul.address,
            "kubelets": {name: kubelet.url for name, kubelet in sandbox.kubelets.items()},
        }
    )
    if port_file:
        unfinished = port_file.with_name(f"{port_file.name}.{os.getpid()}")
        unfinished.write_bytes(line + b"\n")
        unfinished.rename(port_file)
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(run(parse_arguments(sys.argv[1:])))
