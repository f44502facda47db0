"""A model-based test: whatever happens in whatever order, in the quiet after it Consul equals the cluster."""

import asyncio
import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import hypothesis.strategies as st
import msgspec
import pytest
import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands.registrar import run_registrar
from k8s_consul_registrar.runner import Stop
from k8s_consul_registrar.sandbox import objects
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from k8s_consul_registrar.sandbox.store import Backup
from k8s_consul_registrar.settings.reading import read_registrar
from support.doors import Recorder, TcpProxy
from support.lab import ANNOTATIONS, scaled
from support.processes import LOOPBACK
from support.waiting import PATIENCE_FACTOR

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
QUIET_WITHIN = 45.0 * PATIENCE_FACTOR
NAMES = st.integers(0, 11)
HOSTS = st.integers(1, 5)
PORTS = st.integers(1, 3)
FIRST_PORT = 9102
CONSUL_UP = "k8s_consul_registrar_consul_up"

T = TypeVar("T")


def act(**values: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a rule that does nothing once the time for the search is over, so that the rest of it is quick."""

    def decorate(step: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(step)
        def unless_over(world: "World", **chosen: Any) -> None:
            if not world.is_over():
                step(world, **chosen)

        return rule(**values)(unless_over)  # type: ignore[call-overload,no-any-return]  # no word for its targets

    return decorate


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
        self.nodes: dict[int, str] = {}
        self.admin_port = 0
        self.steady: set[str] = set()
        self.backup: tuple[Backup, dict[str, str], dict[int, str]] | None = None
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
        if self.is_over():
            return
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
        self.admin = await enter(aiohttp.ClientSession())
        processors = structlog.get_config()["processors"]
        structlog.configure(processors=[self._note_port, *processors])
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

    def _note_port(self, _: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Learn the port that the system gave the admin server."""
        if event["event"] == "registrar starts":
            self.admin_port = event["admin_port"]
        return event

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
        """Return True if the time for the whole search is spent."""
        return time.monotonic() > World.ends_at

    def want(self, owner: str, services: Mapping[str, str]) -> None:
        """Have an object ask for just these services, by address."""
        for service_id in [one for one in self.wanted if one == owner or one.startswith(f"{owner}--")]:
            if service_id not in services:
                del self.wanted[service_id]
                self.steady.discard(service_id)
        self.wanted.update(services)

    def change_pod(self, number: int, host: int, ports: int) -> None:
        """Create a Pod, or change its address and its ports."""
        address, numbers = f"198.51.100.{host}", range(FIRST_PORT, FIRST_PORT + ports)
        annotations = {**ANNOTATIONS, "prometheus.io/port": ",".join(map(str, numbers))}
        self.sandbox.kube.create(
            objects.pod(f"web-{number}", namespace="shop", ip=address, annotations=annotations)
        )
        owner = f"pod--shop--web-{number}"
        ids = [owner, *(f"{owner}--{port}" for port in numbers[1:])]
        self.want(owner, dict.fromkeys(ids, address))

    @act(number=NAMES, host=HOSTS, ports=PORTS)
    def put_pod(self, number: int, host: int, ports: int) -> None:
        """Create or change a Pod; it may drop ports that it had."""
        self.change_pod(number, host, ports)
        self.pause()

    @act(number=NAMES, host=HOSTS, ports=PORTS)
    def miss_events(self, number: int, host: int, ports: int) -> None:
        """Break the watches, change a Pod meanwhile, and let the watches resume."""
        self.api_wire.refuse()
        self.change_pod(number, host, ports)
        self.do(self.api_wire.heal())
        self.pause()

    @act(number=NAMES, is_kept=st.booleans())
    def drop_pod(self, number: int, is_kept: bool) -> None:
        """Delete a Pod, or keep it and take its annotations away."""
        owner = f"pod--shop--web-{number}"
        if owner not in self.wanted:
            return
        self.want(owner, {})
        if is_kept:
            self.sandbox.kube.create(objects.pod(f"web-{number}", namespace="shop", ip="198.51.100.9"))
        else:
            self.sandbox.kube.delete("Pod", f"web-{number}", "shop")
        self.pause()

    @act(number=st.integers(1, 4))
    def turn_node(self, number: int) -> None:
        """Create a Node, or delete it if it is there."""
        if number in self.nodes:
            address = self.nodes.pop(number)
            self.want(f"node--{address}", {})
            self.sandbox.kube.delete("Node", f"node-{number}")
        else:
            self.number_node(number, f"192.0.2.{number}")
        self.pause()

    @act(every=st.booleans(), shift=st.sampled_from([0, 10, 20]))
    def renumber_nodes(self, every: bool, shift: int) -> None:
        """Give one Node, or all of them, another address."""
        for number in sorted(self.nodes)[: None if every else 1]:
            self.want(f"node--{self.nodes[number]}", {})
            self.number_node(number, f"192.0.2.{number + shift}")
        self.pause()

    def number_node(self, number: int, address: str) -> None:
        """Create a Node, or change its address."""
        self.sandbox.kube.create(objects.node(f"node-{number}", addresses=(("InternalIP", address),)))
        self.nodes[number] = address
        self.want(f"node--{address}", {f"node--{address}": address})

    @act()
    def lose_consul(self) -> None:
        """Refuse every connection to Consul: its metric is 0 from the first failure to the end."""
        self.consul_wire.refuse()
        self.do(self._wait_for_consul_up(0.0))
        for _ in range(10):
            self.pause()
            assert self.do(self._consul_up()) == 0.0, "the outage does not show"
        self.do(self._mend())
        self.do(self._wait_for_consul_up(1.0))

    async def _wait_for_consul_up(self, expected: float) -> None:
        until = time.monotonic() + QUIET_WITHIN
        while await self._consul_up() != expected:
            assert time.monotonic() < until, f"consul_up did not become {expected:g}"
            await asyncio.sleep(0.02)

    async def _consul_up(self) -> float | None:
        """Return the metric, None while the admin server is not there."""
        try:
            async with self.admin.get(f"http://{LOOPBACK}:{self.admin_port}/metrics") as answer:
                lines = (await answer.text()).splitlines()
        except aiohttp.ClientError:
            return None
        return next((float(line.split()[1]) for line in lines if line.startswith(f"{CONSUL_UP} ")), None)

    @act()
    def back_up(self) -> None:
        """Take a snapshot of the cluster."""
        self.backup = (self.sandbox.kube.store.backup(), dict(self.wanted), dict(self.nodes))

    @act()
    def restore(self) -> None:
        """Go back to the snapshot, if there is one, the version with it."""
        if self.backup is None:  # no precondition: those that depend on the time are flaky to Hypothesis
            return
        backup, wanted, nodes = self.backup
        self.steady.intersection_update(wanted)
        self.wanted.clear()
        self.wanted.update(wanted)
        self.nodes = dict(nodes)
        self.sandbox.kube.store.restore(backup)
        self.pause()

    @act()
    def forget_history(self) -> None:
        """Lose the API server's history and every connection."""
        self.api_wire.cut()
        self.sandbox.kube.store.compact()
        self.pause()

    @act(
        wire=st.sampled_from(["api", "consul"]),
        fault=st.sampled_from(["refuse", "stall", "cut", "black_hole"]),
    )
    def fail(self, wire: str, fault: str) -> None:
        """Let the way to one side fail."""
        door = self.api_wire if wire == "api" else self.consul_wire
        getattr(door, fault)()
        self.pause(0.05)

    @act(status=st.sampled_from([403, 429, 500]))
    def refuse(self, status: int) -> None:
        """Have Consul refuse everything."""
        self.recorder.refuse(status)
        self.pause(0.05)

    @act()
    def lose_answers(self) -> None:
        """Have Consul carry out writes whose answers are lost."""
        self.recorder.loses_answers = True
        self.pause(0.05)

    @act()
    def mend(self) -> None:
        """Let everything through again."""
        self.do(self._mend())
        self.pause(0.05)

    async def _mend(self) -> None:
        self.recorder.heal()
        self.recorder.loses_answers = False
        await self.api_wire.heal()
        await self.consul_wire.heal()

    @act(seconds=st.sampled_from([0.0, 0.02, 0.1]))
    def restart(self, seconds: float) -> None:
        """Kill the daemon and start another one."""
        self.do(self._kill())
        self.pause(seconds)
        self._launch()
        self.pause(seconds)

    @act(number=NAMES, is_removed=st.booleans())
    def meddle(self, number: int, is_removed: bool) -> None:
        """Remove or change one of our services by hand."""
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

    @act()
    def quiet(self) -> None:
        """Mend everything and wait: Consul comes to hold just what the cluster wants, and is left alone."""
        self.do(self._mend())
        self.do(self._settle())
        self.do(self._wait_for_consul_up(1.0))
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


@pytest.mark.long
@pytest.mark.soak
# By a thread: a daemon that does not end would hold up the end of the test that a signal brings about.
@pytest.mark.timeout(scaled(300, 900) * PATIENCE_FACTOR, method="thread")
def test_consul_equals_the_model_after_any_sequence_of_events() -> None:
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
