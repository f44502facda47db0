"""A model-based test: whatever happens in whatever order, in the quiet after it Consul equals the cluster."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chaos_lab import ANNOTATIONS, scaled
from http_door import Recorder
from k8s_consul_registrar.app.lifecycle import Stop
from k8s_consul_registrar.app.registrar import run_registrar
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.sandbox import objects
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from k8s_consul_registrar.sandbox.store import Backup
from k8s_consul_registrar.settings.modes import read_registrar
from real_process import LOOPBACK
from tcp_proxy import TcpProxy

TINY = Timing(
    retry_first=0.01,
    retry_cap=0.05,
    retry_after_cap=0.1,
    connect_timeout=1,
    read_timeout=1,
    gather=0.002,
    probe=0.05,
    tick=0.2,
    watch_timeout=2,
    watch_silence=1,
    watch_settle=0.02,
    relist_opaque=0.2,
)
# Seconds the whole search may take; what is left of it after that does nothing.
SEARCH = scaled(50, 600)
QUIET_WITHIN = 15.0
NAMES = st.integers(0, 11)
HOSTS = st.integers(1, 5)

T = TypeVar("T")


class World(RuleBasedStateMachine):
    """A registrar with tiny delays between a sandbox's cluster and its Consul, and what both ought to hold.

    `wanted` is address by service ID. `steady` are the IDs wanted without a break since the last quiet: to
    ask for the removal of one of those is wrongful, whatever else happens.
    """

    ends_at = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.wanted: dict[str, str] = {}
        self.steady: set[str] = set()
        self.backup: tuple[Backup, dict[str, str]] | None = None
        self.daemon: asyncio.Task[None] | None = None

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something, the daemon beside it."""
        return self.runner.run(work)

    def pause(self, seconds: float = 0.02) -> None:
        """Let the daemon have its turn."""
        self.do(asyncio.sleep(seconds))

    @initialize(backend=st.sampled_from(["catalog", "agent"]), can_stream_lists=st.booleans())
    def begin(self, backend: str, can_stream_lists: bool) -> None:
        """Start everything."""
        self.backend = backend
        self.do(self._open(can_stream_lists))

    async def _open(self, can_stream_lists: bool) -> None:
        enter = self.stack.enter_async_context
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="model-")))
        self.sandbox = await enter(Sandbox(bookmark_period=0.3, can_stream_lists=can_stream_lists))
        self.api_wire = await enter(TcpProxy(LOOPBACK, int(self.sandbox.kube.url.rpartition(":")[2])))
        self.recorder = await enter(Recorder(self.sandbox.consul.url, self.steady.__contains__))
        self.consul_wire = await enter(TcpProxy(LOOPBACK, self.recorder.port))
        self.session = await enter(aiohttp.ClientSession(self.sandbox.consul.url))
        config = self.sandbox.kubeconfig()
        config["clusters"][0]["cluster"]["server"] = f"https://{self.api_wire.address}"
        path = folder / "kubeconfig"
        path.write_bytes(msgspec.json.encode(config))
        self.settings = read_registrar(
            {
                "KUBECONFIG": str(path),
                "CONSUL_ADDRESS": self.consul_wire.address,
                "CONSUL_BACKEND": self.backend,
                "CLUSTER_NAME": "lab",
                "SYNC_PERIOD": "1",
                "BRAKE_CONFIRM": "0.1",
                "BRAKE_CONFIRM_START": "0.2",
                "ADMIN_PORT": "0",
            }
        )
        self._launch()

    def _launch(self) -> None:
        loop = self.runner.get_loop()
        self.daemon = loop.create_task(run_registrar(self.settings, Stop(), TINY))

    async def _kill(self) -> None:
        """End the daemon wherever it is, as a signal that cannot be caught does."""
        assert self.daemon is not None
        self.daemon.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.daemon

    def is_over(self) -> bool:
        """Whether the time for the whole search is spent."""
        return time.monotonic() > World.ends_at

    @rule(number=NAMES, host=HOSTS)
    def put_pod(self, number: int, host: int) -> None:
        """Create or change a Pod."""
        address = f"198.51.100.{host}"
        name, service_id = f"web-{number}", f"pod--shop--web-{number}"
        if service_id not in self.wanted:
            self.steady.discard(service_id)
        self.sandbox.kube.create(objects.pod(name, namespace="shop", ip=address, annotations=ANNOTATIONS))
        self.wanted[service_id] = address
        self.pause()

    @rule(number=NAMES, is_kept=st.booleans())
    def drop_pod(self, number: int, is_kept: bool) -> None:
        """Delete a Pod, or keep it and take its annotations away."""
        service_id = f"pod--shop--web-{number}"
        if self.wanted.pop(service_id, None) is None:
            return
        self.steady.discard(service_id)
        if is_kept:
            self.sandbox.kube.create(objects.pod(f"web-{number}", namespace="shop", ip="198.51.100.9"))
        else:
            self.sandbox.kube.delete("Pod", f"web-{number}", "shop")
        self.pause()

    @rule(number=st.integers(1, 4))
    def turn_node(self, number: int) -> None:
        """Create a Node, or delete it if it is there."""
        address = f"192.0.2.{number}"
        service_id = f"node--{address}"
        if self.wanted.pop(service_id, None) is None:
            self.sandbox.kube.create(objects.node(f"node-{number}", addresses=(("InternalIP", address),)))
            self.wanted[service_id] = address
        else:
            self.sandbox.kube.delete("Node", f"node-{number}")
        self.steady.discard(service_id)
        self.pause()

    @rule()
    def back_up(self) -> None:
        """Take a snapshot of the cluster."""
        self.backup = (self.sandbox.kube.store.backup(), dict(self.wanted))

    @precondition(lambda self: self.backup is not None)
    @rule()
    def restore(self) -> None:
        """Go back to the snapshot, the version with it."""
        assert self.backup is not None
        backup, wanted = self.backup
        self.steady.intersection_update(wanted)
        self.wanted.clear()
        self.wanted.update(wanted)
        self.sandbox.kube.store.restore(backup)
        self.pause()

    @rule()
    def forget_history(self) -> None:
        """Lose the API server's history and every connection."""
        self.api_wire.cut()
        self.sandbox.kube.store.compact()
        self.pause()

    @rule(
        wire=st.sampled_from(["api", "consul"]),
        fault=st.sampled_from(["refuse", "stall", "cut", "black_hole"]),
    )
    def fail(self, wire: str, fault: str) -> None:
        """Let the way to one side fail."""
        door = self.api_wire if wire == "api" else self.consul_wire
        getattr(door, fault)()
        self.pause(0.05)

    @rule(status=st.sampled_from([403, 429, 500]))
    def refuse(self, status: int) -> None:
        """Have Consul refuse everything."""
        self.recorder.refuse(status)
        self.pause(0.05)

    @rule()
    def lose_answers(self) -> None:
        """Have Consul carry out writes that nobody hears of."""
        self.recorder.loses_answers = True
        self.pause(0.05)

    @rule()
    def mend(self) -> None:
        """Let everything through again."""
        self.do(self._mend())
        self.pause(0.05)

    async def _mend(self) -> None:
        self.recorder.heal()
        self.recorder.loses_answers = False
        await self.api_wire.heal()
        await self.consul_wire.heal()

    @rule(seconds=st.sampled_from([0.0, 0.02, 0.1]))
    def restart(self, seconds: float) -> None:
        """Kill the daemon and start another one."""
        self.do(self._kill())
        self.pause(seconds)
        self._launch()
        self.pause(seconds)

    @rule(number=NAMES, is_removed=st.booleans())
    def meddle(self, number: int, is_removed: bool) -> None:
        """Remove or change a service of ours by hand."""
        self.do(self._meddle(f"pod--shop--web-{number}", is_removed))

    async def _meddle(self, service_id: str, is_removed: bool) -> None:
        held = await self._held()
        if service_id not in held:
            return
        if self.backend == "agent":
            path = (
                f"/v1/agent/service/deregister/{service_id}" if is_removed else "/v1/agent/service/register"
            )
            service = self.sandbox.consul.agent.services[service_id]
            body: Any = {"ID": service_id, "Name": service.name, "Address": "203.0.113.1", "Port": 1,
                         "Meta": dict(service.meta or {})}  # fmt: skip
        else:
            node = {"Node": "k8s-lab", "Address": "127.0.0.1"}
            path = "/v1/catalog/deregister" if is_removed else "/v1/catalog/register"
            record = held[service_id]
            service_body = {"ID": service_id, "Service": record["Service"], "Address": "203.0.113.1", "Port": 1,
                            "Meta": record["Meta"]}  # fmt: skip
            body = {**node, **({"ServiceID": service_id} if is_removed else {"Service": service_body,
                               "SkipNodeUpdate": True})}  # fmt: skip
        async with self.session.put(path, json=body) as answer:
            assert answer.status == 200, await answer.text()

    async def _held(self) -> dict[str, Any]:
        node = "k8s-lab" if self.backend == "catalog" else "agent-1"
        async with self.session.get(f"/v1/catalog/node/{node}") as answer:
            found = await answer.json()
        services = (found or {}).get("Services") or {}
        return {key: one for key, one in services.items() if key != "consul"}

    @rule()
    def quiet(self) -> None:
        """Mend everything and wait: Consul comes to hold just what the cluster wants, and is left alone."""
        if self.is_over():
            return
        self.do(self._mend())
        self.do(self._settle())
        self.steady.clear()
        self.steady.update(self.wanted)

    async def _settle(self) -> None:
        until = time.monotonic() + QUIET_WITHIN
        while True:
            held = {key: one["Address"] for key, one in (await self._held()).items()}
            if held == self.wanted:
                break
            assert time.monotonic() < until, (
                f"held and not wanted: {held.keys() - self.wanted.keys()}, wanted and not held: "
                f"{self.wanted.keys() - held.keys()}, other: { {k for k in held if held[k] != self.wanted.get(k)} }"
            )
            await asyncio.sleep(0.02)
        assert self.daemon is not None
        assert not self.daemon.done(), "the daemon ended"

    @invariant()
    def nothing_wrongful(self) -> None:
        """Fail when the removal of what was wanted all the time was asked for."""
        if self.daemon is not None:
            assert self.recorder.wrongful == [], self.recorder.writes[-20:]

    def teardown(self) -> None:
        """End with a quiet, then with everything."""
        try:
            if self.daemon is not None:
                self.quiet()
                self.do(self._kill())
        finally:
            self.do(self.stack.aclose())
            self.pause(0.05)  # transports close in the loop's next turns
            self.runner.close()


@pytest.mark.soak
# By a thread: a daemon that does not end would hold up the end of the test that a signal brings about.
@pytest.mark.timeout(scaled(120, 900), method="thread")
def test_whatever_happens() -> None:
    """Events, faults, hand edits and restarts at random: after each quiet Consul equals the model."""
    World.ends_at = time.monotonic() + SEARCH
    rules = settings(
        max_examples=scaled(25, 400),
        stateful_step_count=30,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # what a loop of its own time does is never the same twice, so no shrinking
        suppress_health_check=list(HealthCheck),
    )
    World.TestCase.settings = rules
    World.TestCase().runTest()
