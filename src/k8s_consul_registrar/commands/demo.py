"""The command demo: both modes at work on this machine, on a sandbox cluster and a Consul, step by step."""

import argparse
import asyncio
import contextlib
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from k8s_consul_registrar.errors import OperationalError
from k8s_consul_registrar.runner import EXIT_INTERRUPTED, EXIT_OK, Stop, run_loop

if TYPE_CHECKING:
    from k8s_consul_registrar.sandbox.sandbox import Sandbox

CLUSTER = "demo"
PATIENCE = 60.0  # seconds for a change to reach Consul, and for a process to be ready
STOP_LIMIT = 10.0  # seconds for a process to end
_SCRAPED = {"prometheus.io/scrape": "true"}

Services = Mapping[str, Mapping[str, Any]]

NEXT = """
Next:
  make demo KEEP=1                                           # the same, left up: look at its status page
  {command} plan --consul-backend none   # the targets of your own cluster; writes nothing
  {command} check registrar              # what your cluster and Consul still lack
"""


class DemoError(OperationalError):
    """A step of the demo that failed."""

    def __init__(self, text: str) -> None:
        super().__init__(f"the demo failed: {text}")


def _command() -> str:
    """Return how a shell calls this program: by its name if that is on PATH, otherwise by its path."""
    name = "k8s-consul-registrar"
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).parent / name)


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Run the demo; `--keep` leaves everything up until Ctrl-C."""
    del environment
    try:
        from k8s_consul_registrar.sandbox import sandbox  # noqa: F401, PLC0415 - is the extra there?
    except ImportError as error:
        raise OperationalError(
            f"the demo needs the extra [sandbox] ({error.name} is missing): in a checkout, "
            "pip install '.[sandbox]'"
        ) from None
    return run_loop(_demo(keep=parsed.keep))


async def _demo(*, keep: bool) -> int:
    stop = Stop()
    stop.install()
    started = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        story = asyncio.ensure_future(_story(stack))
        stopped = asyncio.ensure_future(stop.requested.wait())
        await asyncio.wait({story, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not story.done():
            story.cancel()
            await asyncio.wait({story})
            return EXIT_INTERRUPTED
        addresses = story.result()
        print(f"\nAll of it in {time.monotonic() - started:.1f} s.")
        if keep:
            print("\nIt stays up until Ctrl-C:\n")
            print(table(("what", "where"), addresses))
            await stopped
        else:
            print(NEXT.format(command=_command()))
            stopped.cancel()
    return EXIT_OK


async def _story(stack: contextlib.AsyncExitStack) -> list[tuple[str, str]]:
    """Run all steps; returns the addresses that can be explored afterwards."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="k8s-consul-registrar-")))
    session = await stack.enter_async_context(
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10), trust_env=False)
    )
    _step("A sandbox starts: a Kubernetes API, three kubelets with TLS and token checks, and Consul")
    sandbox = await stack.enter_async_context(_cluster())
    kubeconfig = sandbox.write_kubeconfig(folder / "kubeconfig")
    consul = await stack.enter_async_context(_consul(sandbox, session, folder, stack))

    proxy_port, proxy_admin, registrar_admin = (str(reserved_port(stack)) for _ in range(3))
    common = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    common |= {"KUBECONFIG": str(kubeconfig), "LOG_FORMAT": "json"}
    _step("The proxy and the registrar start, each a process of its own")
    modes = {
        "proxy": {
            "PORT": proxy_port,
            "ADMIN_PORT": proxy_admin,
            "PROXY_ALLOW_LOOPBACK": "true",
            "DRAIN_DELAY": "0",
        },
        "registrar": {
            "ADMIN_PORT": registrar_admin,
            "CLUSTER_NAME": CLUSTER,
            "CONSUL_ADDRESS": consul,
            "SHARD_PATHS": "shard-1,shard-2",
            "SYNC_PERIOD": "1",
            "PROXY_NODE_PORT": proxy_port,
        },
    }
    for name, settings in modes.items():
        command, log = (sys.executable, "-m", "k8s_consul_registrar", name), folder / f"{name}.log"
        process = await stack.enter_async_context(_process(command, log, common | settings))
        await _until_ready(session, f"http://127.0.0.1:{settings['ADMIN_PORT']}/readyz", process, log)

    watch = Watch(session, consul)
    services = await watch.until("both kinds are registered", lambda found: len(found) == 6)
    _step("Consul holds what the cluster wants scraped")
    _show(services)
    await _scrape(session, services)
    await _follow(sandbox, watch)
    return [
        ("Kubernetes API", f"KUBECONFIG={kubeconfig}"),
        ("Consul", f"http://{consul}/v1/agent/services"),
        ("proxy", f"http://127.0.0.1:{proxy_port}/api/v1/nodes/<node_ip>:<port>/metrics/cadvisor"),
        ("the proxy's metrics", f"http://127.0.0.1:{proxy_admin}/metrics"),
        ("status page", f"http://127.0.0.1:{registrar_admin}/"),
        ("the registrar's metrics", f"http://127.0.0.1:{registrar_admin}/metrics"),
        ("logs", " ".join(str(folder / f"{name}.log") for name in modes)),
    ]


@asynccontextmanager
async def _cluster() -> AsyncIterator["Sandbox"]:
    """Start a cluster of three Nodes and a few Pods, one of which does not ask to be scraped."""
    from k8s_consul_registrar.sandbox import objects  # noqa: PLC0415 - needs the extra [sandbox]
    from k8s_consul_registrar.sandbox.consul_release import NEWEST, ConsulOptions  # noqa: PLC0415 - the same
    from k8s_consul_registrar.sandbox.sandbox import Sandbox  # noqa: PLC0415 - the same

    async with Sandbox(consul_options=ConsulOptions(NEWEST, is_server=False)) as sandbox:
        for number in (1, 2, 3):
            await sandbox.add_kubelet(f"worker-{number}", f"127.0.0.{number + 1}")
        for name, ip, annotations in (
            ("cart-7d9f8c6b5-abcde", "198.51.100.11", {**_SCRAPED, "prometheus.io/port": "9102"}),
            ("cart-7d9f8c6b5-fghij", "198.51.100.12", {**_SCRAPED, "prometheus.io/port": "9102"}),
            ("search-0", "198.51.100.13", {**_SCRAPED, "prometheus.io/path": "stats?format=prometheus"}),
            ("batch-1", "198.51.100.14", {}),
        ):
            sandbox.kube.create(
                objects.pod(
                    name,
                    namespace="shop",
                    ip=ip,
                    node_name="worker-1",
                    ports={"metrics": 8080},
                    annotations=annotations,
                )
            )
        yield sandbox


@asynccontextmanager
async def _consul(
    sandbox: "Sandbox", session: aiohttp.ClientSession, folder: Path, stack: contextlib.AsyncExitStack
) -> AsyncIterator[str]:
    """Yield the address of a Consul: the program on PATH, run as a server, or else the sandbox's agent."""
    program = shutil.which("consul")
    if program is None:
        print("  Consul is the sandbox's own agent (no `consul` on PATH).")
        yield sandbox.consul.address
        return
    http, server, serf = (reserved_port(stack) for _ in range(3))
    address, log = f"127.0.0.1:{http}", folder / "consul.log"
    command = (
        program, "agent", "-dev", "-bind=127.0.0.1", "-client=127.0.0.1", "-log-level=warn",
        f"-http-port={address.rpartition(':')[2]}", f"-server-port={server}", f"-serf-lan-port={serf}",
        "-serf-wan-port=-1", "-dns-port=-1", "-grpc-port=-1",
    )  # fmt: skip
    version = await asyncio.create_subprocess_exec(program, "version", stdout=asyncio.subprocess.PIPE)
    said, _ = await version.communicate()
    async with _process(command, log, dict(os.environ)) as process:
        leader = f"http://{address}/v1/status/leader"
        await _until_ready(session, leader, process, log, pattern=r'"[^"]+:\d+"')
        print(f"  Consul is a real one from PATH ({said.decode(errors='replace').splitlines()[0]}).")
        yield address


class Watch:
    """Looks at Consul's services until they are as expected."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self._session = session
        self._url = f"http://{address}/v1/agent/services"

    async def services(self) -> Services:
        """Return the services of the demo's cluster by ID."""
        async with self._session.get(self._url) as response:
            found: dict[str, Any] = await response.json()
        return {key: value for key, value in found.items() if (value["Meta"] or {}).get("cluster") == CLUSTER}

    async def until(self, what: str, is_so: Callable[[Services], bool]) -> Services:
        """Wait until the services are so; raises a `DemoError` after PATIENCE."""
        started = time.monotonic()
        while time.monotonic() - started < PATIENCE:
            services = await self.services()
            if is_so(services):
                print(f"  {what}: after {time.monotonic() - started:.2f} s")
                return services
            await asyncio.sleep(0.02)
        raise DemoError(f"after {PATIENCE:g} s it is still not true that {what}")


async def _scrape(session: aiohttp.ClientSession, services: Services) -> None:
    """Scrape one Node through the proxy, the way Prometheus would by its service."""
    service = next(one for one in services.values() if one["Meta"]["kind"] == "node")
    url = f"http://{service['Address']}:{service['Port']}{service['Meta']['metrics_path']}"
    _step(f"Prometheus would scrape a Node through the proxy: GET {url}")
    async with session.get(url) as response:
        text = await response.text()
        if response.status != 200:
            raise DemoError(f"the proxy answers {response.status}: {text}")
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    print(f"  200, {len(text)} bytes, {len(samples)} samples; the first:")
    print(f"  {samples[0][:100]}")


async def _follow(sandbox: "Sandbox", watch: Watch) -> None:
    """Add, change and remove a Pod, and see Consul follow."""
    from k8s_consul_registrar.sandbox import objects  # noqa: PLC0415 - needs the extra [sandbox]

    service_id = "pod--shop--mail-0"

    def pod(ip: str) -> dict[str, Any]:
        annotations = {**_SCRAPED, "prometheus.io/port": "9090"}
        return objects.pod("mail-0", namespace="shop", ip=ip, node_name="worker-2", annotations=annotations)

    _step("A Pod is added, its address changes, it is removed: Consul follows")
    sandbox.kube.create(pod("198.51.100.20"))
    added = await watch.until("the new Pod is registered", lambda found: service_id in found)
    shard = added[service_id]["Meta"]["shard_path"]
    sandbox.kube.update(pod("198.51.100.21"))
    changed = await watch.until(
        "its new address is there",
        lambda found: found.get(service_id, {}).get("Address") == "198.51.100.21",
    )
    if changed[service_id]["Meta"]["shard_path"] != shard:
        raise DemoError("the service lost its shard")
    print(f"  (updated in place: it kept its shard path {shard})")
    sandbox.kube.delete("Pod", "mail-0", "shop")
    await watch.until("it is deregistered", lambda found: service_id not in found)


def _show(services: Services) -> None:
    rows = []
    for service_id, one in sorted(services.items()):
        meta, address = one["Meta"], f"{one['Address']}:{one['Port']}"
        rows.append((service_id, address, meta["metrics_path"], meta.get("shard_path", "")))
    print(table(("service", "address", "metrics_path", "shard_path"), rows))


def _step(text: str) -> None:
    print(f"\n== {text}")


@asynccontextmanager
async def _process(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C must reach only the demo, which ends its processes in order.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_LIMIT):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _until_ready(
    session: aiohttp.ClientSession,
    url: str,
    process: asyncio.subprocess.Process,
    log: Path,
    *,
    pattern: str = "",
) -> None:
    """Wait until an answer holds the pattern; raises a `DemoError` with the end of the log."""
    loop = asyncio.get_running_loop()
    until = loop.time() + PATIENCE
    while loop.time() < until and process.returncode is None:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(url) as response:
                text = await response.text()
                if response.status == 200 and re.search(pattern, text):
                    return
        await asyncio.sleep(0.05)
    raise DemoError(f"{url} is not ready; the end of its log:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-10:])


def reserved_port(stack: contextlib.ExitStack | contextlib.AsyncExitStack) -> int:
    """Return a port that no other program is given until the stack is closed, on any address of the machine.

    It is bound and not listened at, so that one of our servers can still take it: all of them set SO_REUSEADDR.
    On loopback alone it would be free at 127.0.0.2, where a kubelet of the sandbox may listen, and then the
    admin port, which is every address, could not be had.
    """
    family, anywhere = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    holder = stack.enter_context(socket.socket(family))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family is socket.AF_INET6:
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    holder.bind((anywhere, 0))
    port: int = holder.getsockname()[1]
    return port


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(f"  {line}" for line in lines)
