"""Real Consul agents and Prometheus servers for tests: found, started on loopback, and cleaned up.

A binary on PATH counts only if it has what the test needs; otherwise the ones that `scripts/fetch-real-servers`
left in `.cache/real`. Where there is none the test is skipped with the reason, or fails when
`REQUIRE_REAL_SERVERS=1`. Tests that use them carry `pytestmark = REAL`.
"""

import asyncio
import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeVar
from urllib.parse import urlencode

import aiohttp
import pytest

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.model import Service
from support.files import ROOT
from support.processes import LOOPBACK, PortTakenError, Program, reserve_ports
from support.waiting import PATIENCE, until

REAL = pytest.mark.real
CACHE = ROOT / ".cache" / "real"
ROOT_TOKEN = "3f1c6d0e-8f5b-4a52-9d3c-0b7a52a1c9e4"  # the management token of a test's own Consul
START_WITHIN = 2 * PATIENCE  # seconds until a server must be ready
PORT_ATTEMPTS = 5

Mechanism = Literal["consul_sd", "http_sd"]
_PROBES: dict[Mechanism, str] = {
    "consul_sd": "consul_sd_configs: [{server: 'localhost:8500'}]",
    "http_sd": "http_sd_configs: [{url: 'http://localhost/'}]",
}
_CACHED: dict[Mechanism, str] = {"consul_sd": "prometheus-2.24", "http_sd": "prometheus-2.42"}


class PrometheusTools(NamedTuple):
    """The server and promtool of one Prometheus."""

    prometheus: Path
    promtool: Path


def unavailable(reason: str) -> NoReturn:
    """Skip the test for want of a real server, or fail it when they are required."""
    if os.environ.get("REQUIRE_REAL_SERVERS") == "1":
        pytest.fail(f"REQUIRE_REAL_SERVERS=1: {reason}", pytrace=False)
    pytest.skip(reason)


def _output(*command: str | Path) -> str:
    """Return what a command prints, empty when it fails or does not start."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=2 * PATIENCE, check=False, text=True)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


@functools.cache
def consul_version(binary: Path) -> tuple[int, int, int]:
    """Return the version a Consul binary names, (0, 0, 0) where it is no Consul."""
    found = re.search(r"^Consul v(\d+)\.(\d+)\.(\d+)", _output(binary, "version"), re.MULTILINE)
    return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)


def consul_binary() -> Path:
    """Return a Consul that says its version, the one on PATH first; skip or fail without one."""
    on_path = shutil.which("consul")
    for binary in (*([Path(on_path)] if on_path else []), CACHE / "consul-1.8.7/usr/bin/consul"):
        if consul_version(binary) > (0, 0, 0):
            return binary
    unavailable("no consul on PATH that runs, and none in .cache/real (scripts/fetch-real-servers)")


@functools.cache
def supports(promtool: Path, mechanism: Mechanism) -> bool:
    """Return whether a promtool accepts a configuration with this discovery mechanism."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "prometheus.yml")
        config.write_text(f"scrape_configs: [{{job_name: probe, {_PROBES[mechanism]}}}]\n")
        return bool(_output(promtool, "check", "config", config))


def prometheus_tools(mechanism: Mechanism) -> PrometheusTools:
    """Return a Prometheus that has this mechanism, the one on PATH first; skip or fail without one."""
    on_path = shutil.which("prometheus"), shutil.which("promtool")
    cached = CACHE / _CACHED[mechanism] / "usr/bin"
    for server, tool in (on_path, (str(cached / "prometheus"), str(cached / "promtool"))):
        if server and tool and supports(Path(tool), mechanism):
            return PrometheusTools(Path(server), Path(tool))
    unavailable(f"no prometheus with {mechanism} on PATH or in .cache/real (scripts/fetch-real-servers)")


def fetched_prometheus(version: str) -> PrometheusTools:
    """Return the Prometheus of this version that was fetched; skip or fail without it."""
    folder = CACHE / f"prometheus-{version}" / "usr/bin"
    if not (folder / "prometheus").is_file():
        unavailable(f"no prometheus-{version} in .cache/real (scripts/fetch-real-servers)")
    return PrometheusTools(folder / "prometheus", folder / "promtool")


async def _answer(method: str, url: str, *, token: str = "", body: Any = None) -> tuple[int, Any]:
    """Return the status and the JSON (or text) of one request; status 0 when there was no answer."""
    headers = {"X-Consul-Token": token} if token else {}
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
        try:
            async with session.request(method, url, json=body) as response:
                is_json = response.content_type == "application/json"
                return response.status, await (response.json() if is_json else response.text())
        except (aiohttp.ClientError, TimeoutError):
            return 0, None


class _Startable(Protocol):
    """A server whose program can be started and waited for."""

    program: Program

    async def start(self) -> None:
        """Start it and wait until it is ready."""


_S = TypeVar("_S", bound=_Startable)


class RealConsul:
    """One Consul agent on loopback, a server or a client of one; restarts keep its ports and its data.

    `address` is the HTTP API's `host:port`; `serf` is what another agent joins; `token` is the management
    token, empty without ACLs.
    """

    def __init__(
        self, binary: Path, folder: Path, flags: Sequence[str], *, join: str, acl: bool, node: str
    ) -> None:
        http, serf, rpc = reserve_ports(3)
        self.version = consul_version(binary)
        self.address = f"{LOOPBACK}:{http}"
        self.url = f"http://{self.address}"
        self.serf = f"{LOOPBACK}:{serf}"
        self.token = ROOT_TOKEN if acl else ""
        self.node = node
        ports = f"ports {{ http={http} serf_lan={serf} server={rpc} serf_wan=-1 dns=-1 grpc=-1 https=-1 }}"
        role = [f"-retry-join={join}", "-retry-interval=1s"] if join else ["-server", "-bootstrap-expect=1"]
        settings = [
            f"-data-dir={folder / 'data'}", f"-node={node}", f"-bind={LOOPBACK}", f"-client={LOOPBACK}",
            f"-hcl={ports}", "-hcl=performance { raft_multiplier = 1 }", "-hcl=disable_update_check = true",
            *([f"-hcl={self._acl_hcl()}"] if acl else []),
        ]  # fmt: skip
        self.program = Program([str(binary), "agent", *settings, *role, *flags], folder / "consul.log")

    def _acl_hcl(self) -> str:
        """Return the setting that denies by default; the management token was renamed in 1.11."""
        name = "initial_management" if self.version >= (1, 11, 0) else "master"
        tokens = f'tokens {{ {name} = "{ROOT_TOKEN}" agent = "{ROOT_TOKEN}" }}'
        return f'acl {{ enabled = true default_policy = "deny" {tokens} }}'

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send one request with the management token; return its status (0: no answer) and its JSON."""
        return await _answer(method, self.url + path, token=self.token, body=body)

    async def is_ready(self) -> bool:
        """Return whether there is a leader and the agent is in the catalog, so that it takes writes."""
        status, leader = await self.request("GET", "/v1/status/leader")
        if status != 200 or not leader:
            return False
        status, found = await self.request("GET", f"/v1/catalog/node/{self.node}")
        return status == 200 and bool(found)

    async def start(self) -> None:
        """Start it and wait until it takes writes; a StartFailedError holds the end of its log."""
        self.program.launch()
        await self.program.ready(self.is_ready, START_WITHIN)

    async def restart(self, number: int = signal.SIGTERM) -> None:
        """End it by a signal and start it again with its data and ports."""
        await self.program.stop(number)
        await self.start()


async def _started(make: Callable[[], _S]) -> _S:
    """Start what `make` gives; when someone took one of its ports meanwhile, make another."""
    for attempt in range(PORT_ATTEMPTS):
        server = make()
        try:
            await server.start()
        except BaseException as error:
            await server.program.stop(signal.SIGKILL)
            if not isinstance(error, PortTakenError) or attempt == PORT_ATTEMPTS - 1:
                raise
        else:
            return server
    raise AssertionError("unreachable: the last attempt returns or raises")


@contextlib.asynccontextmanager
async def real_consul(
    *flags: str, join: str = "", acl: bool = False, node: str = "test-node"
) -> AsyncIterator[RealConsul]:
    """Run one Consul agent and wait for its leader; `join` (a server's `serf`) makes it a client agent.

    `flags` come last on its command line, so they win; `acl` denies all but the management token.
    """
    binary = consul_binary()
    with tempfile.TemporaryDirectory(prefix="consul-", ignore_cleanup_errors=True) as folder:

        def make() -> RealConsul:
            home = Path(tempfile.mkdtemp(dir=folder))
            return RealConsul(binary, home, flags, join=join, acl=acl, node=node)

        consul = await _started(make)
        try:
            yield consul
        finally:
            await consul.program.stop(signal.SIGKILL)


@contextlib.asynccontextmanager
async def real_servers(count: int) -> AsyncIterator[tuple[RealConsul, ...]]:
    """Run this many Consul servers of one cluster, named `server-0` and so on, and wait until each takes writes."""
    binary = consul_binary()
    with tempfile.TemporaryDirectory(prefix="consul-", ignore_cleanup_errors=True) as folder:
        servers: list[RealConsul] = []
        for number in range(count):
            flags = [f"-bootstrap-expect={count}", "-retry-interval=1s"]
            flags += [f"-retry-join={one.serf}" for one in servers[:1]]
            home = Path(tempfile.mkdtemp(dir=folder))
            servers.append(RealConsul(binary, home, flags, join="", acl=False, node=f"server-{number}"))
        try:
            for one in servers:
                one.program.launch()
            for one in servers:
                await one.program.ready(one.is_ready, START_WITHIN)
            yield tuple(servers)
        finally:
            for one in servers:
                await one.program.stop(signal.SIGKILL)


@contextlib.contextmanager
def shared_consul(*flags: str) -> Iterator[RealConsul]:
    """Run one Consul agent for tests on several loops, such as all of a module."""
    binary = consul_binary()
    with tempfile.TemporaryDirectory(prefix="consul-", ignore_cleanup_errors=True) as folder:

        def make() -> RealConsul:
            home = Path(tempfile.mkdtemp(dir=folder))
            return RealConsul(binary, home, flags, join="", acl=False, node="test-node")

        consul = asyncio.run(_started(make))
        try:
            yield consul
        finally:
            asyncio.run(consul.program.stop(signal.SIGKILL))


class RealPrometheus:
    """One Prometheus server on loopback; `url` is its base address."""

    def __init__(
        self, tools: PrometheusTools, folder: Path, config: str, flags: Sequence[str], host: str
    ) -> None:
        self.port = reserve_ports(1)[0]
        self.address = f"{host}:{self.port}"
        self.url = f"http://{self.address}"
        self.config = folder / "prometheus.yml"
        self.config.write_text(config)
        settings = [
            f"--config.file={self.config}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.address}",
        ]  # fmt: skip
        self.program = Program([str(tools.prometheus), *settings, *flags], folder / "prometheus.log")

    async def start(self) -> None:
        """Start it and wait until it serves queries."""
        self.program.launch()
        await self.program.ready(self.is_ready, START_WITHIN)

    async def is_ready(self) -> bool:
        """Return whether it serves queries."""
        status, _ = await _answer("GET", f"{self.url}/-/ready")
        return status in (200, 401)  # it may want a password

    async def targets(self) -> list[dict[str, Any]]:
        """Return the active targets as its API gives them (`labels`, `discoveredLabels`, `health`, …)."""
        _, answer = await _answer("GET", f"{self.url}/api/v1/targets?state=active")
        found: list[dict[str, Any]] = answer["data"]["activeTargets"] if answer else []
        return found

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query (`metric`, `value`)."""
        _, answer = await _answer("GET", f"{self.url}/api/v1/query?{urlencode({'query': expression})}")
        found: list[dict[str, Any]] = answer["data"]["result"] if answer else []
        return found

    async def wait_for(self, expression: str, count: int) -> list[dict[str, Any]]:
        """Wait until an instant query gives exactly `count` samples; raise TimeoutError with the last answer."""
        found: list[dict[str, Any]] = []

        async def has_count() -> bool:
            nonlocal found
            found = await self.query(expression)
            return len(found) == count

        await until(
            has_count,
            f"{count} samples of {expression}",
            every=0.2,
            context=lambda: f"{found}; {self.program.tail()}",
        )
        return found


@contextlib.asynccontextmanager
async def real_prometheus(
    config: str,
    *flags: str,
    mechanism: Mechanism = "consul_sd",
    tools: PrometheusTools | None = None,
    host: str = LOOPBACK,
) -> AsyncIterator[RealPrometheus]:
    """Run one Prometheus, the first that has the mechanism unless it is given, and wait until it is ready."""
    tools = tools or prometheus_tools(mechanism)
    with tempfile.TemporaryDirectory(prefix="prometheus-", ignore_cleanup_errors=True) as folder:
        prometheus = await _started(lambda: RealPrometheus(tools, Path(folder), config, flags, host))
        try:
            yield prometheus
        finally:
            await prometheus.program.stop(signal.SIGKILL)


NAMES = ("victoria-metrics", "victoria-metrics-prod")
OLDER, NEWER = "1.79", "1.145"


def victoria_binary() -> Path:
    """Return a VictoriaMetrics, the one on PATH first; skip or fail without one."""
    for name in NAMES:
        if found := shutil.which(name):
            return Path(found)
    return fetched_victoria(OLDER)


def fetched_victoria(version: str) -> Path:
    """Return the VictoriaMetrics of this version that was fetched; skip or fail without it."""
    binary = CACHE / f"victoria-metrics-{version}" / "usr/bin/victoria-metrics"
    if not binary.is_file():
        unavailable(f"no victoria-metrics-{version} in .cache/real (scripts/fetch-real-servers)")
    return binary


class RealVictoria:
    """One VictoriaMetrics on loopback, the single-node server: it scrapes by Prometheus' own configuration."""

    def __init__(self, binary: Path, folder: Path, config: str, more: Mapping[str, str]) -> None:
        address = f"{LOOPBACK}:{reserve_ports(1)[0]}"
        self.url = f"http://{address}"
        (folder / "scrape.yml").write_text(config)
        flags = {
            "httpListenAddr": address,
            "storageDataPath": folder / "data",
            "promscrape.config": folder / "scrape.yml",
            "promscrape.httpSDCheckInterval": "1s",
            "memory.allowedBytes": "64MB",
            **more,
        }
        self.program = Program(
            [str(binary), *(f"-{name}={value}" for name, value in flags.items())], folder / "victoria.log"
        )

    async def start(self) -> None:
        """Start it and wait until it serves queries."""
        self.program.launch()
        await self.program.ready(self.is_ready, START_WITHIN)

    async def is_ready(self) -> bool:
        """Return whether it serves queries."""
        return (await _answer("GET", f"{self.url}/health"))[0] == 200

    async def targets(self) -> list[dict[str, Any]]:
        """Return the active targets as its API gives them (`labels`, `scrapeUrl`, `health`, …)."""
        status, answer = await _answer("GET", f"{self.url}/api/v1/targets?state=active")
        found: list[dict[str, Any]] = answer["data"]["activeTargets"] if status == 200 else []
        return found

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query (`metric`, `value`), the latest included."""
        asked = urlencode({"query": expression, "latency_offset": "1ms", "nocache": 1})
        _, answer = await _answer("GET", f"{self.url}/api/v1/query?{asked}")
        found: list[dict[str, Any]] = answer["data"]["result"] if answer else []
        return found


@contextlib.asynccontextmanager
async def real_victoria(
    config: str, *, binary: Path | None = None, flags: Mapping[str, str] | None = None
) -> AsyncIterator[RealVictoria]:
    """Run one VictoriaMetrics, any unless it is given, with this configuration and wait until it is ready."""
    binary = binary or victoria_binary()
    with tempfile.TemporaryDirectory(prefix="victoria-", ignore_cleanup_errors=True) as folder:
        victoria = await _started(lambda: RealVictoria(binary, Path(folder), config, flags or {}))
        try:
            yield victoria
        finally:
            await victoria.program.stop(signal.SIGKILL)


# A loaded machine answers late; what is to be quick is only what is tried again.
PATIENT = Timing(retry_first=0.05, retry_cap=0.2, connect_timeout=5, read_timeout=20)


class Readable(Protocol):
    """A registry, as far as these helpers care."""

    def services(self) -> AsyncIterator[Service]:
        """Yield every service."""
        ...


@asynccontextmanager
async def connected(
    consul: RealConsul, *, token: str | None = None, token_file: str = ""
) -> AsyncIterator[ConsulClient]:
    """Open a client of a real Consul, with its management token unless given another."""
    own = consul.token if token is None else token
    access = ConsulAccess(ConsulAddress(consul.url), token=own, token_file=token_file)
    async with ConsulClient(access, PATIENT) as client:
        yield client


async def held(registry: Readable) -> dict[str, Service]:
    """Return all services by ID."""
    return {service.id: service async for service in registry.services()}


class Token:
    """An ACL token with rules of its own."""

    def __init__(self, accessor: str, secret: str) -> None:
        self.accessor = accessor
        self.secret = secret


async def make_token(consul: RealConsul, name: str, rules: str) -> Token:
    """Create a token that may do what the rules say."""
    status, _ = await consul.request("PUT", "/v1/acl/policy", {"Name": name, "Rules": rules})
    assert status == 200
    status, token = await consul.request("PUT", "/v1/acl/token", {"Policies": [{"Name": name}]})
    assert status == 200
    return Token(token["AccessorID"], token["SecretID"])


async def revoke(consul: RealConsul, token: Token) -> None:
    """Make a token unknown."""
    status, _ = await consul.request("DELETE", f"/v1/acl/token/{token.accessor}")
    assert status == 200


def empty(consul: RealConsul) -> None:
    """Remove the data of a Consul that is not running."""
    (folder,) = [one.partition("=")[2] for one in consul.program.argv if one.startswith("-data-dir=")]
    shutil.rmtree(Path(folder))


async def restart_empty(consul: RealConsul) -> None:
    """Kill a Consul and start it on the same ports without its data."""
    await consul.program.stop(signal.SIGKILL)
    empty(consul)
    await consul.start()
