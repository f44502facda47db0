"""Shows both modes at work on this machine: a sandbox cluster, a Consul, and a story told in steps."""

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from k8s_consul_registrar.app.demo_parts import DemoError, Mode, consul_on_path, free_port, table
from k8s_consul_registrar.app.lifecycle import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, Stop

if TYPE_CHECKING:
    from k8s_consul_registrar.sandbox.sandbox import Sandbox

CLUSTER = "demo"
# Seconds the demo gives a change to reach Consul; it takes a fraction of that.
PATIENCE = 15.0
_SCRAPED = {"prometheus.io/scrape": "true"}

Services = Mapping[str, Mapping[str, Any]]


def run_demo(*, keep: bool) -> int:
    """Run the demo and return its exit code; `keep` leaves everything up until Ctrl-C."""
    try:
        from k8s_consul_registrar.sandbox import sandbox  # noqa: F401, PLC0415 - is the extra there?
    except ImportError as error:
        print(f"The demo needs the extra [sandbox] ({error.name} is missing): ", file=sys.stderr, end="")
        print("in a checkout, pip install '.[sandbox]'", file=sys.stderr)
        return EXIT_FAILURE
    try:
        return asyncio.run(_demo(keep=keep))
    except DemoError as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


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
            stopped.cancel()
    return EXIT_OK


async def _story(stack: contextlib.AsyncExitStack) -> list[tuple[str, str]]:
    """Tell the story step by step; returns what can be explored afterwards."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="k8s-consul-registrar-")))
    session = await stack.enter_async_context(
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10), trust_env=False)
    )
    _step("A sandbox starts: a Kubernetes API, three kubelets with TLS and token checks, and Consul")
    sandbox = await stack.enter_async_context(_cluster())
    kubeconfig = sandbox.write_kubeconfig(folder / "kubeconfig")
    consul, which = await _consul(stack, sandbox, folder)
    print(f"  Consul is {which}.")

    proxy_port, proxy_admin, registrar_admin = free_port(), free_port(), free_port()
    common = {"KUBECONFIG": str(kubeconfig), "LOG_FORMAT": "json"}
    _step("The proxy and the registrar start, each a process of its own")
    proxy = Mode("proxy", folder, {**common, "PORT": str(proxy_port), "ADMIN_PORT": str(proxy_admin)})
    proxy.environment |= {"PROXY_ALLOW_LOOPBACK": "true", "DRAIN_DELAY": "0"}
    registrar = Mode("registrar", folder, {**common, "ADMIN_PORT": str(registrar_admin)})
    registrar.environment |= {
        "CLUSTER_NAME": CLUSTER,
        "CONSUL_ADDRESS": consul,
        "SHARD_PATHS": "shard-1,shard-2",
        "SYNC_PERIOD": "1",
        "PROXY_NODE_PORT": str(proxy_port),
    }
    await stack.enter_async_context(proxy.running(session, proxy_admin))
    await stack.enter_async_context(registrar.running(session, registrar_admin))

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
        ("proxy's figures", f"http://127.0.0.1:{proxy_admin}/metrics"),
        ("status page", f"http://127.0.0.1:{registrar_admin}/"),
        ("registrar's figures", f"http://127.0.0.1:{registrar_admin}/metrics"),
        ("logs", f"{proxy.log} {registrar.log}"),
    ]


@asynccontextmanager
async def _cluster() -> AsyncIterator["Sandbox"]:
    """Start a cluster of three Nodes and a few Pods, one of which does not ask to be scraped."""
    from k8s_consul_registrar.sandbox import objects  # noqa: PLC0415 - needs the extra [sandbox]
    from k8s_consul_registrar.sandbox.sandbox import Sandbox  # noqa: PLC0415 - the same

    async with Sandbox() as sandbox:
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


async def _consul(stack: contextlib.AsyncExitStack, sandbox: "Sandbox", folder: Path) -> tuple[str, str]:
    """Return Consul's address and what it is: the one on PATH, else the sandbox's own agent."""
    found = await stack.enter_async_context(consul_on_path(folder))
    if found is not None:
        return found.address, f"a real one from PATH ({found.version})"
    return sandbox.consul.address, "the sandbox's own agent (no `consul` on PATH)"


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
        """Wait until the services are so; raises `DemoError` when they never are."""
        started = time.monotonic()
        while time.monotonic() - started < PATIENCE:
            services = await self.services()
            if is_so(services):
                print(f"  {what}: after {time.monotonic() - started:.2f} s")
                return services
            await asyncio.sleep(0.02)
        raise DemoError(f"after {PATIENCE:g} s it is not so that {what}")


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
    rows = [
        (
            service_id,
            f"{one['Address']}:{one['Port']}",
            one["Meta"]["metrics_path"],
            one["Meta"].get("shard_path", ""),
        )
        for service_id, one in sorted(services.items())
    ]
    print(table(("service", "address", "metrics_path", "shard_path"), rows))


def _step(text: str) -> None:
    print(f"\n== {text}")
