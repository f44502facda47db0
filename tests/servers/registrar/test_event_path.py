"""The walk of one Pod event through the code, from the API server's bytes to the write that reaches Consul."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import FrameType

import msgspec
import pytest

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands.registrar import run_registrar
from k8s_consul_registrar.runner import Stop
from k8s_consul_registrar.sandbox import objects
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from k8s_consul_registrar.settings.reading import read_registrar
from support.files import PACKAGE
from support.waiting import until

# The walk crossed about 45 files before the core was rebuilt.
MOST_FILES = 25
ANNOTATIONS = {"prometheus.io/scrape": "true", "prometheus.io/port": "9102"}
# The registrar does nothing of its own accord while it is traced.
STILL = Timing(tick=60, probe=600, watch_silence=600)


@contextlib.contextmanager
def traced(consul: Consul) -> Iterator[set[str]]:
    """Collect the files of the package whose functions run until the next write has reached Consul.

    The sandbox runs in the same thread; its files do not count, and tell when the write is there.
    """
    files: set[str] = set()
    sandbox = str(PACKAGE / "sandbox")
    written = len(consul.writes)

    def note(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(str(PACKAGE)):
            return
        if not name.startswith(sandbox):
            files.add(str(Path(name).relative_to(PACKAGE)))
        elif frame.f_code.co_name != "writes" and len(consul.writes) > written:
            sys.setprofile(None)

    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)


@contextlib.asynccontextmanager
async def synced_registrar(sandbox: Sandbox, folder: Path, backend: str) -> AsyncIterator[None]:
    """Run a registrar that has synced one Pod and has nothing left to do."""
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_bytes(msgspec.json.encode(sandbox.kubeconfig()))
    settings = read_registrar(
        {
            "KUBECONFIG": str(kubeconfig),
            "CONSUL_ADDRESS": sandbox.consul.address,
            "CONSUL_BACKEND": backend,
            "CLUSTER_NAME": "lab",
            "ADMIN_PORT": "0",
        }
    )
    sandbox.kube.create(objects.pod("first", namespace="shop", ip="198.51.100.1", annotations=ANNOTATIONS))
    running = asyncio.create_task(run_registrar(settings, Stop(), STILL))
    try:
        await until(lambda: holds(sandbox, "first"))
        await asyncio.sleep(2)
        yield
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def holds(sandbox: Sandbox, pod: str) -> bool:
    """Return whether a Pod's service was written to the sandbox's Consul."""
    service_id = f"pod--shop--{pod}".encode()
    return any(service_id in write.body for write in sandbox.consul.writes)


@pytest.mark.parametrize("backend", ["catalog", "agent"])
async def test_event_path_crosses_few_files(backend: str, tmp_path: Path) -> None:
    """From the event's bytes to the write few files of the package run.

    Those that ran for each of three events count: something else may be due during one of them.
    """
    walks = []
    async with Sandbox() as sandbox, synced_registrar(sandbox, tmp_path, backend):
        for name, ip in (("b", "198.51.100.2"), ("c", "198.51.100.3"), ("d", "198.51.100.4")):
            with traced(sandbox.consul) as files:
                sandbox.kube.create(objects.pod(name, namespace="shop", ip=ip, annotations=ANNOTATIONS))
                await until(lambda name=name: holds(sandbox, name))  # type: ignore[misc]
            walks.append(files)
            await asyncio.sleep(0.5)  # its acknowledgement is no part of the next walk
    files = set.intersection(*walks)
    assert len(files) <= MOST_FILES, sorted(files)
