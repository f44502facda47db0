"""What a benchmark stands on: the sandbox's API server, a real Consul, the registrar; each its own process."""

import asyncio
import contextlib
import os
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from real_process import Program, wait_until

FOLDER = Path(__file__).resolve().parent
CLUSTER = "bench"
NODE = f"k8s-{CLUSTER}"
# Nobody shall wait longer for 100,000 Pods, in seconds.
PATIENCE = 600.0
_TICK = 0.01


@dataclass(frozen=True, slots=True)
class Api:
    """The sandbox's API server: its address, its CA and a token for everything."""

    url: str
    ca: Path
    token: str
    kubeconfig: Path

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
async def sandbox_api(folder: Path, *, pods: int, nodes: int) -> AsyncIterator[Api]:
    """Run the sandbox with so many synthetic objects."""
    port_file, kubeconfig, ca = folder / "sandbox.json", folder / "kubeconfig", folder / "ca.pem"
    arguments = ["--pods", str(pods), "--nodes", str(nodes)]
    arguments += ["--port-file", str(port_file), "--kubeconfig", str(kubeconfig)]
    program = Program(
        [sys.executable, "-m", "k8s_consul_registrar.sandbox", *arguments], folder / "sandbox.log"
    )
    program.launch()
    try:

        async def is_up() -> bool:
            return port_file.exists()

        await program.ready(is_up, PATIENCE)
        said = msgspec.json.decode(port_file.read_bytes())
        ca.write_text(said["ca"])
        yield Api(said["kube"], ca, said["token"], kubeconfig)
    finally:
        await program.stop()


class Registrar:
    """One run of the registrar, known from outside: its log and its entry in /proc."""

    def __init__(
        self, folder: Path, api: Api, consul: str, *, backend: str, environment: Mapping[str, str]
    ) -> None:
        self._log = folder / f"registrar-{len(list(folder.glob('registrar-*')))}.log"
        self._program = Program(
            [sys.executable, "-m", "k8s_consul_registrar", "registrar"],
            self._log,
            environment={
                "PATH": os.environ["PATH"],
                "HOME": str(folder),
                "KUBECONFIG": str(api.kubeconfig),
                "CLUSTER_NAME": CLUSTER,
                "CONSUL_ADDRESS": consul,
                "CONSUL_BACKEND": backend,
                "ADMIN_PORT": "0",
                **environment,
            },
        )
        self._read = 0
        self.started = 0.0
        self.lines: list[dict[str, Any]] = []

    def start(self) -> None:
        """Start it."""
        self.started = time.monotonic()
        self._program.launch()

    async def stop(self) -> None:
        """End it."""
        await self._program.stop()

    def said(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of an event so far."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            whole = log.read().rpartition(b"\n")[0]
        if whole:
            self._read += len(whole) + 1
            self.lines += [msgspec.json.decode(line) for line in whole.splitlines() if line[:1] == b"{"]
        return [line for line in self.lines if line["event"] == event]

    async def until_registered(self, count: int) -> float:
        """Wait until its passes say that so many services were registered; return the seconds since start.

        A pass says so once Consul has answered all its writes.
        """

        async def are_registered() -> bool:
            passes = [*self.said("changes"), *self.said("pass")]
            done: int = sum(line["registered"] for line in passes)
            return done >= count

        await self._until(are_registered)
        return time.monotonic() - self.started

    async def until_full_pass(self, count: int = 1) -> None:
        """Wait until it has made so many full passes."""

        async def has_passed() -> bool:
            return len(self.said("pass")) >= count

        await self._until(has_passed)

    async def admin_address(self) -> str:
        """Return where its own endpoints are."""

        async def has_begun() -> bool:
            return bool(self.said("registrar starts"))

        await self._until(has_begun)
        return f"127.0.0.1:{self.said('registrar starts')[0]['admin_port']}"

    @property
    def peak_mb(self) -> float:
        """The most memory it has had so far (VmHWM), in MB of 10^6 bytes."""
        status = Path(f"/proc/{self._program.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6

    @property
    def cpu_seconds(self) -> float:
        """The processor time it has used so far."""
        fields = Path(f"/proc/{self._program.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def _until(self, is_true: Callable[[], Awaitable[bool]]) -> None:
        try:
            await wait_until(is_true, PATIENCE, every=_TICK)
        except TimeoutError:
            raise RuntimeError(f"the registrar does not get there:\n{self._program.tail()}") from None


@contextlib.asynccontextmanager
async def registrar(
    folder: Path, api: Api, consul: str, *, backend: str = "catalog", **environment: str
) -> AsyncIterator[Registrar]:
    """Run the registrar with these variables beside what every benchmark gives it."""
    run = Registrar(folder, api, consul, backend=backend, environment=environment)
    run.start()
    try:
        yield run
    finally:
        await run.stop()


async def run_small(script: str, *arguments: str) -> dict[str, Any]:
    """Run one of the small programs beside this file to its end; return the JSON it prints, and `wall`.

    `wall` is from process start to process end, in seconds.
    """
    return await run_python(str(FOLDER / script), *arguments)


async def run_python(*arguments: str) -> dict[str, Any]:
    """Run Python with these arguments to its end, as `run_small` does."""
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, env=os.environ
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with {process.returncode}")
    said: dict[str, Any] = msgspec.json.decode(output) if output else {}
    return {**said, "wall": time.monotonic() - started}


async def services_in_catalog(consul: str, node: str) -> list[dict[str, Any]]:
    """Return all services of a node of the catalog."""
    url = f"http://{consul}/v1/catalog/node-services/{node}"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        body = await answer.json()
    found: Sequence[dict[str, Any]] = (body or {}).get("Services") or []
    return list(found)
