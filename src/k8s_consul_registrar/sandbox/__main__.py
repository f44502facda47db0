"""The sandbox as a process: `python -m k8s_consul_registrar.sandbox --pods 10000 --nodes 200`.

It prints its addresses, as one line of JSON unless the output is a terminal, and ends on SIGTERM or SIGINT.
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

from k8s_consul_registrar.sandbox.consul_release import NEWEST_RELEASE, RELEASES, ConsulOptions
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from k8s_consul_registrar.sandbox.synthetic import (
    FIRST_POD_IP,
    dual_stack,
    small_pods,
    synthetic_nodes,
    synthetic_pod,
    synthetic_pods,
    synthetic_services,
)
from k8s_consul_registrar.sandbox.workloads import MOST, Workloads

SMALL, REJECTED = "small", "rejected"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m k8s_consul_registrar.sandbox", description=__doc__)
    parser.add_argument("--pods", type=int, default=0, help="synthetic Pods of about 7 KB")
    parser.add_argument("--small-pods", type=int, default=0, help=f"Pods in the namespace {SMALL}")
    parser.add_argument(
        "--rejected-pods",
        type=int,
        default=0,
        help=f"Pods in the namespace {REJECTED} whose port does not exist",
    )
    parser.add_argument("--endpoints", type=int, default=0, help="endpoints of annotated synthetic Services")
    parser.add_argument("--nodes", type=int, default=0, help="synthetic Nodes, without kubelets")
    parser.add_argument(
        "--dual-stack",
        action="store_true",
        help="give synthetic Nodes and Pods an IPv6 address too, at which nothing listens",
    )
    parser.add_argument("--kubelets", type=int, default=0, help="Nodes with kubelets, from 127.0.0.2 on")
    parser.add_argument(
        "--metrics-file", type=Path, help="answer of the kubelets instead of the recorded text"
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help=f"the first {MOST} synthetic Pods answer scrapes, and kubelets give samples the current time",
    )
    parser.add_argument(
        "--no-streamed-lists",
        action="store_true",
        help="refuse sendInitialEvents, like an API server without the feature gate WatchList",
    )
    parser.add_argument(
        "--consul-release",
        choices=list(RELEASES),
        default=NEWEST_RELEASE,
        help="answer as this release of Consul; later ones than 1.8 are simulated (default: %(default)s)",
    )
    parser.add_argument("--kube-port", type=int, default=0, help="0: any free port")
    parser.add_argument("--consul-port", type=int, default=0, help="0: any free port")
    parser.add_argument("--kubeconfig", type=Path, help="file for the administrator's kubeconfig")
    parser.add_argument("--port-file", type=Path, help="file for the line of JSON, written atomically")
    return parser.parse_args(arguments)


async def run(arguments: argparse.Namespace) -> None:
    """Serve until a signal arrives."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with (
        Sandbox(
            kube_port=arguments.kube_port,
            consul_options=ConsulOptions(RELEASES[arguments.consul_release], is_server=False),
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
        addresses = addresses_of(sandbox)
        if arguments.port_file:
            announce(addresses, arguments.port_file)
        text = summary(addresses, arguments.kubeconfig) if sys.stdout.isatty() else as_line(addresses)
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        await stopped.wait()


async def create_objects(sandbox: Sandbox, workloads: Workloads, arguments: argparse.Namespace) -> None:
    """Create the Nodes, Pods and Services of the command line."""
    for node in synthetic_nodes(arguments.nodes):
        sandbox.kube.create(dual_stack(node) if arguments.dual_stack else node)
    first_ip = FIRST_POD_IP
    if arguments.live and arguments.pods:
        first_ip = await workloads.claim(lambda ip: synthetic_pod(0, arguments.nodes, ip))
    for index, pod in enumerate(synthetic_pods(arguments.pods, arguments.nodes, first_ip)):
        sandbox.kube.create(dual_stack(pod) if arguments.dual_stack else pod)
        if arguments.live and 0 < index < MOST:
            await workloads.run(pod)
    for thing in synthetic_services(arguments.endpoints):
        sandbox.kube.create(thing)
    for pod in small_pods(arguments.small_pods, SMALL):
        sandbox.kube.create(pod)
    for pod in small_pods(arguments.rejected_pods, REJECTED, is_rejected=True):
        sandbox.kube.create(pod)


def addresses_of(sandbox: Sandbox) -> dict[str, Any]:
    """Return the addresses and credentials."""
    return {
        "kube": sandbox.kube.url,
        "ca": sandbox.ca_pem.decode(),
        "token": sandbox.admin_token,
        "consul": sandbox.consul.address,
        "kubelets": {name: kubelet.url for name, kubelet in sandbox.kubelets.items()},
    }


def as_line(addresses: Mapping[str, Any]) -> str:
    """Return the addresses and credentials for a program."""
    return msgspec.json.encode(addresses).decode()


def summary(addresses: Mapping[str, Any], kubeconfig: Path | None) -> str:
    """Return the addresses for a person; the credentials are in the kubeconfig, not on the screen."""
    hint = f"KUBECONFIG={kubeconfig}" if kubeconfig else "--kubeconfig FILE writes the credentials"
    lines = [f"Kubernetes API  {addresses['kube']}   {hint}", f"Consul          http://{addresses['consul']}"]
    lines += [f"{name:<15} {url}" for name, url in list(addresses["kubelets"].items())[:10]]
    return "\n".join([*lines, "Ctrl-C ends it."])


def announce(addresses: Mapping[str, Any], port_file: Path) -> None:
    """Write the addresses and credentials to a file, atomically."""
    unfinished = port_file.with_name(f"{port_file.name}.{os.getpid()}")
    unfinished.write_text(as_line(addresses) + "\n")
    unfinished.rename(port_file)


if __name__ == "__main__":
    try:
        uvloop.run(run(parse_arguments(sys.argv[1:])))
    except OSError as error:
        sys.exit(f"the sandbox cannot start: {error}")
