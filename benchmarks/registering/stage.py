"""The stage of a benchmark: the sandbox's API server and the registrar of a checkout, each its own process.

The registrar is a black box: an environment, a process, its admin endpoints and what Consul holds.
"""

import asyncio
import contextlib
import itertools
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from registering.processes import LOOPBACK, PATIENCE, ROOT, BenchmarkError, Program, free_ports

FOLDER = Path(__file__).resolve().parent
CLUSTER = "bench"
NODE = f"k8s-{CLUSTER}"
PACKAGE = "k8s_consul_registrar"
NODES = 200


@dataclass(frozen=True, slots=True)
class Checkout:
    """A checkout of this project whose registrar is measured, run by this checkout's interpreter.

    Its registrar has these settings beside those of a scenario; `{folder}` and `{port}` stand for its own. With
    `is_fetched` a `fetch-targets` follows it.
    """

    name: str
    path: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    is_fetched: bool = False

    def environment(self) -> dict[str, str]:
        """Return what makes Python load the package of this checkout."""
        return {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.path / "src")}

    def prepare(self) -> str:
        """Compile the package and return its commit; BenchmarkError when Python loads another one."""
        source = self.path / "src" / PACKAGE
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(source)], check=False)
        script = f"import {PACKAGE}; print({PACKAGE}.__file__)"
        said = subprocess.run(
            [sys.executable, "-c", script],
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if Path(said.stdout.strip()).parent != source:
            raise BenchmarkError(f"{self.path} is no checkout: {said.stdout}{said.stderr}")
        git = ["git", "-C", str(self.path), "describe", "--always", "--dirty", "--abbrev=7"]
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "no commit"


THIS = Checkout("this", ROOT)
# Everything that delivers targets and guards them, switched on; what Pods ask for stays the same.
EVERYTHING = {
    "FILE_SD_PATH": "{folder}/targets.json",
    "HTTP_SD_PORT": "{port}",
    "EMIT_EVENTS": "all",
    "EXCLUDE_NAMESPACES": "kube-public",
    "NAMESPACE_LABEL_SELECTOR": "!left-out",
    "MAX_TARGETS_PER_NAMESPACE": "1000000",
    "QUOTA_REMOVE": "true",
    "TARGET_LABELS": "__sample_limit__",
}


@dataclass(frozen=True, slots=True)
class Api:
    """The sandbox's API server: its address, its CA and a token for everything."""

    url: str
    ca: Path
    token: str
    kubeconfig: Path
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def session(self) -> aiohttp.ClientSession:
        """Return a session that is allowed everything."""
        return aiohttp.ClientSession(
            self.url,
            connector=aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=self.ca)),
            headers={"Authorization": f"Bearer {self.token}"},
        )

    async def requests(self) -> dict[str, int]:
        """Return how many requests the API server took, by verb and resource (`LIST pods`)."""
        async with self.session() as session, session.get("/metrics") as answer:
            text = await answer.text()
        counts = {}
        for line in text.splitlines():
            if line.startswith("apiserver_request_total{"):
                labels, _, value = line.partition("{")[2].rpartition("} ")
                pairs = dict(pair.split("=") for pair in labels.replace('"', "").split(","))
                counts[f"{pairs['verb']} {pairs['resource']}"] = int(value)
        return counts


@contextlib.asynccontextmanager
async def sandbox_api(
    folder: Path, *, pods: int, nodes: int = NODES, small: int = 0, rejected: int = 0, endpoints: int = 0
) -> AsyncIterator[Api]:
    """Run the sandbox with this many synthetic objects; its lists come in pages, never as initial events."""
    home = Path(tempfile.mkdtemp(dir=folder, prefix="sandbox-"))
    port_file, kubeconfig, ca = home / "places.json", home / "kubeconfig", home / "ca.pem"
    counts = {
        "pods": pods,
        "nodes": nodes,
        "small-pods": small,
        "rejected-pods": rejected,
        "endpoints": endpoints,
    }
    arguments = [f"--{name}={count}" for name, count in counts.items()]
    arguments += [f"--port-file={port_file}", f"--kubeconfig={kubeconfig}", "--no-streamed-lists"]
    program = Program(
        [sys.executable, "-m", f"{PACKAGE}.sandbox", *arguments], home / "log", THIS.environment()
    )
    program.launch()
    try:

        async def is_up() -> bool:
            return port_file.exists()

        await program.until_ready(is_up, "the sandbox is up")
        said = msgspec.json.decode(port_file.read_bytes())
        ca.write_text(said["ca"])
        yield Api(said["kube"], ca, said["token"], kubeconfig)
    finally:
        await program.stop()


class Registrar:
    """One run of a checkout's registrar."""

    def __init__(self, folder: Path, checkout: Checkout, api: Api, consul: str, **environment: str) -> None:
        home = Path(tempfile.mkdtemp(dir=folder, prefix="registrar-"))
        ports = free_ports(2)
        self.admin, self.http_sd = (f"{LOOPBACK}:{port}" for port in ports)
        own = {name: value.format(folder=home, port=ports[1]) for name, value in checkout.settings.items()}
        self.started = 0.0
        self.program = Program(
            [sys.executable, "-m", PACKAGE, "registrar"],
            home / "log",
            {
                **checkout.environment(),
                "HOME": str(folder),
                "KUBECONFIG": str(api.kubeconfig),
                "CLUSTER_NAME": CLUSTER,
                "CONSUL_ADDRESS": consul,
                "ADMIN_PORT": self.admin.rpartition(":")[2],
                "LOG_FORMAT": "json",
                **own,
                **environment,
            },
        )

    def start(self) -> None:
        """Start it."""
        self.started = time.monotonic()
        self.program.launch()

    async def metrics(self) -> dict[str, float]:
        """Return its metrics by name with labels; none while it does not answer."""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
                session.get(f"http://{self.admin}/metrics") as answer,
            ):
                text = await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return {}
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    async def last_resync(self) -> float:
        """Return when everything was last compared, in seconds since the epoch; 0 for never."""
        return (await self.metrics()).get(f"{PACKAGE}_last_full_pass_timestamp_seconds", 0.0)

    async def until_resync(self, after: float = 0.0) -> None:
        """Wait until everything was compared since a moment."""

        async def is_resynced() -> bool:
            return await self.last_resync() > after

        await self.program.until_ready(is_resynced, "the registrar compares everything")

    async def until_answering(self) -> float:
        """Wait until it answers /healthz, in whatever way; return the seconds since its start."""
        async with aiohttp.ClientSession() as session:

            async def answers() -> bool:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with session.get(f"http://{self.admin}/healthz"):
                        return True
                return False

            await self.program.until_ready(answers, "the registrar answers /healthz")
        return time.monotonic() - self.started


@contextlib.asynccontextmanager
async def registrar(
    folder: Path, checkout: Checkout, api: Api, consul: str, *, backend: str = "catalog", **environment: str
) -> AsyncIterator[Registrar]:
    """Run a checkout's registrar with these variables beside those that every benchmark gives it."""
    run = Registrar(folder, checkout, api, consul, CONSUL_BACKEND=backend, **environment)
    run.start()
    fetching = Program(
        [sys.executable, "-m", PACKAGE, "fetch-targets", f"http://{run.http_sd}", "--output", str(folder)],
        folder / "fetch.log",
        {**THIS.environment(), "HOME": str(folder)},
    )
    if checkout.is_fetched:
        fetching.launch()
    try:
        yield run
    finally:
        await fetching.stop()
        await run.program.stop()


async def run_small(script: str, *arguments: str) -> dict[str, Any]:
    """Run one of the small programs beside this file to its end; return the JSON it prints, and `wall`.

    `wall` is from process start to process end, in seconds.
    """
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(FOLDER / script), *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        raise BenchmarkError(f"{script} ended with {process.returncode}")
    said: dict[str, Any] = msgspec.json.decode(output) if output else {}
    return {**said, "wall": time.monotonic() - started}
