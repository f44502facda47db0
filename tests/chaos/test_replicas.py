"""Two replicas of which one writes: the leader is killed, stopped, ended and cut off, and the other goes on."""

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from support.cluster import REGISTRAR_RULES, rule
from support.daemon import Daemon
from support.doors import Refuse
from support.lab import IS_SOAK, ChaosLab, beside, chaos, chaos_lab, created_of, scaled
from support.real_servers import RealConsul
from support.waiting import PATIENCE, Lateness, until

pytestmark = chaos("chaos-replicas")

RULES = [*REGISTRAR_RULES, rule("get create update", "leases", group="coordination.k8s.io")]
DURATION, DEADLINE, RETRY = (15, 10.0, 2.0) if IS_SOAK else (6, 4.0, 0.3)
ELECTION = {
    "LEADER_ELECTION": "true",
    "LEASE_NAMESPACE": "default",
    "LEASE_DURATION": str(DURATION),
    "LEASE_RENEW_DEADLINE": str(DEADLINE),
    "LEASE_RETRY_PERIOD": str(RETRY),
    "HTTP_SD_PORT": "0",
}
TAKE_OVER = 25.0  # seconds from a fault to the change made under it
RELEASE = 3.0 if IS_SOAK else TAKE_OVER  # the same after an orderly end: a stretched retry, and a little
# In the short runs only a lease that was given back is another's so soon.
ENDURING = {} if IS_SOAK else {"LEASE_DURATION": "90", "LEASE_RENEW_DEADLINE": "60"}
SLACK = 0.5  # seconds the doors, which share a loop with the test, may see a write late, beside the loop's own lateness
NUMBERS = itertools.count()


class Replica:
    """A registrar, the doors it alone goes through, and a collector that asks it for its targets all the time."""

    def __init__(self, lab: ChaosLab, daemon: Daemon) -> None:
        self.lab = lab
        self.daemon = daemon
        self.missed: list[str] = []
        self._is_excused = False
        self._collecting: asyncio.Task[None] | None = None

    async def collect(self, steady: frozenset[str]) -> None:
        """Ask for its targets from now on; each must hold what is wanted all the time."""
        url = f"http://127.0.0.1:{await self.daemon.port('http_sd_port')}/sd/targets"
        await self.daemon.until(self.daemon.is_ready)
        self._collecting = asyncio.create_task(self._collect(url, steady))

    async def excuse(self) -> None:
        """Ask no more."""
        if self._collecting is not None:
            self._collecting.cancel()
            await asyncio.gather(self._collecting, return_exceptions=True)
            self._collecting = None

    async def _collect(self, url: str, steady: frozenset[str]) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session:
            while True:
                try:
                    async with session.get(url) as response:
                        groups = await response.json() if response.status == 200 else []
                    lacks = steady - {group["labels"]["__meta_consul_service_id"] for group in groups}
                    if lacks:
                        self.missed.append(f"{response.status}, {len(lacks)} are missing")
                except (aiohttp.ClientError, TimeoutError) as error:
                    self.missed.append(repr(error))
                await asyncio.sleep(0.2)


class Pair:
    """The leader, the standby, and a cluster that never rests."""

    def __init__(self, old: Replica, new: Replica, before: dict[str, int]) -> None:
        self.old, self.new = old, new
        self.lab = old.lab
        self.before = before
        self.struck_at = 0.0
        self.took: dict[str, float] = {}
        self.lateness = Lateness()
        self._numbers = itertools.count()

    async def restless(self) -> None:
        """Change the cluster, and spoil in Consul what must be repaired, ten times a second."""
        for number in self._numbers:
            self.lab.put_pod(f"churn-{number}")
            if number >= 20:
                self.lab.drop_pod(f"churn-{number - 20}")
            self.lab.put_pod("moving", address=f"198.51.100.{number % 200 + 1}")
            await self._spoil(f"web-{number % 10}")
            await asyncio.sleep(0.1)

    async def _spoil(self, name: str) -> None:
        """Write a wrong port over a service, as an operator might by hand; the leader must put it right."""
        held = self.lab.wanted[f"pod--shop--{name}"]
        service = {"ID": f"pod--shop--{name}", "Service": held.name, "Address": held.address, "Port": 1}
        meta = {"managed_by": "k8s-consul-registrar", "cluster": held.cluster}
        body = {
            "Node": self.lab.node,
            "SkipNodeUpdate": True,
            "Service": {**service, "Meta": meta},
        }
        status, answer = await self.lab.real.request("PUT", "/v1/catalog/register", body)
        assert status in (0, 200), answer

    async def taken_over(self, within: float) -> None:
        """Wait until the other writes and what is wanted since the fault is in Consul."""
        key = self.lab.put_pod("since-the-fault")

        async def is_there() -> bool:
            return bool(self.new.lab.consul.since(self.struck_at)) and key in await self.lab.records()

        try:
            await until(is_there, within=within - (time.monotonic() - self.struck_at), every=0.1)
        except TimeoutError:
            pytest.fail(f"no take-over in {within:g} s:\n{self.new.daemon.output[-6000:]}")
        self.took["take-over"] = time.monotonic() - self.struck_at

    async def judge(self) -> None:
        """Fail unless one at a time wrote, the old not after its deadline, and nothing was lost."""
        old, new = self.old.lab.consul.writes, self.new.lab.consul.writes
        last, first = max(write.at for write in old), min(write.at for write in new)
        deadline = max(self.old.lab.api.renewals) + DEADLINE
        self.took["last write before the deadline"] = deadline - last
        self.took["silence between the two"] = first - last
        print({what: round(seconds, 2) for what, seconds in self.took.items()})  # noqa: T201 - figures of `make soak -s`
        assert last <= deadline + SLACK + self.lateness.most
        assert last < first
        self.old.lab.assert_nothing_wrongful()
        self.new.lab.assert_nothing_wrongful()
        await self.lab.equal(self.new.daemon)
        assert created_of(await self.lab.records(), list(self.before)) == self.before
        assert (self.old.missed, self.new.missed) == ([], [])


@contextlib.asynccontextmanager
async def pair(
    consul: RealConsul, *, is_restless: bool = True, is_enduring: bool = False
) -> AsyncIterator[Pair]:
    """Run two replicas, the first of which leads, over a cluster that is all in Consul and rests or does not."""
    # What is spoilt among our own writes is found by a full pass; at rest those would only be in the way.
    settings = {**ELECTION, "SYNC_PERIOD": "1" if is_restless else "600", **(ENDURING if is_enduring else {})}
    async with chaos_lab(consul, name=f"pair-{next(NUMBERS)}") as lab, beside(lab) as other:
        lab.rules = other.rules = RULES
        lab.put_pods(100)
        lab.put_nodes(5)
        steady = frozenset(lab.wanted)
        lab.put_pod("moving")
        async with contextlib.AsyncExitStack() as running:
            first = await running.enter_async_context(await lab.chaotic(**settings))
            await first.until_said("became leader")
            second = await running.enter_async_context(await other.chaotic(**settings))
            await lab.equal(first)
            await second.until_said("standing by")
            old, new = Replica(lab, first), Replica(other, second)
            await old.collect(steady)
            await new.collect(steady)
            two = Pair(old, new, created_of(await lab.records(), list(steady)))
            restless = asyncio.create_task(two.restless() if is_restless else asyncio.sleep(0))
            watching = asyncio.create_task(two.lateness.watch())
            try:
                await asyncio.sleep(scaled(1, 5))
                assert other.consul.writes == [], "a standby writes"
                yield two
            finally:
                restless.cancel()
                watching.cancel()
                await asyncio.gather(restless, watching, return_exceptions=True)
            await old.excuse()
            await new.excuse()
            await two.judge()


@pytest.mark.parametrize("end", ["killed", "terminated"])
async def test_leader_ends(consul: RealConsul, end: str) -> None:
    """By kill -9 the other leads when the lease has run out; by SIGTERM at once, since it is given back."""
    async with pair(consul, is_enduring=end == "terminated") as two:
        await two.old.excuse()
        two.struck_at = time.monotonic()
        two.old.daemon.send(signal.SIGKILL if end == "killed" else signal.SIGTERM)
        await two.taken_over(TAKE_OVER if end == "killed" else RELEASE)
        assert await two.old.daemon.ended() == (-signal.SIGKILL if end == "killed" else 0)


async def test_leader_is_stopped(consul: RealConsul) -> None:
    """SIGSTOP past the lease: continued, it writes nothing, follows on and stands by."""
    async with pair(consul) as two:
        await two.old.excuse()
        two.struck_at = time.monotonic()
        two.old.daemon.send(signal.SIGSTOP)
        await two.taken_over(TAKE_OVER)
        continued_at = time.monotonic()
        two.old.daemon.send(signal.SIGCONT)
        await two.old.daemon.until_said("lost leadership")
        await asyncio.sleep(scaled(1, 15))
        assert two.old.lab.consul.since(continued_at) == []
        assert await two.old.daemon.metric("leader") == 0


@pytest.mark.parametrize("what", ["refused", *(["stalled"] if IS_SOAK else []), "the lease alone"])
async def test_leader_loses_the_api_server(consul: RealConsul, what: str) -> None:
    """Cut off from it, though not from Consul, it repairs until its deadline and not beyond."""
    async with pair(consul) as two:
        api, wire = two.old.lab.api, two.old.lab.api_wire
        two.struck_at = time.monotonic()
        match what:
            case "refused":
                wire.refuse()
            case "stalled":
                wire.stall()
            case _:
                api.fault = lambda request: Refuse(500) if "/leases" in request.path else None
        await two.taken_over(TAKE_OVER)
        assert two.old.lab.consul.since(two.struck_at), "it had nothing to write: the deadline was not tried"
        await two.old.daemon.until_said("lost leadership")
        await asyncio.sleep(scaled(1, 15))
        api.heal()
        await wire.heal()
        await two.old.daemon.until_said("the lease can be read and renewed again")
        await asyncio.sleep(scaled(1, 5))
        assert await two.old.daemon.metric("leader") == 0


def _in_the_system(port: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of connections to a loopback port, by client: those not sent yet, and those not read yet."""
    server = f"0100007F:{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    unsent = {row[1]: int(row[4].partition(":")[0], 16) for row in rows if row[2] == server}
    unread = {row[2]: int(row[4].partition(":")[2], 16) for row in rows if row[1] == server}
    return unsent, unread


async def _has_a_write_stuck(two: Pair) -> None:
    """Have the leader's system hold a whole transaction that Consul's side does not take."""
    wire = two.old.lab.consul_wire

    def is_stuck() -> bool:
        return sum(_in_the_system(wire.port)[0].values()) > 10_000

    def is_delivered() -> bool:
        """Return True if another request is with Consul's side as a whole: it cannot be taken back."""
        unsent, unread = _in_the_system(wire.port)
        return any(size and not unsent.get(client) for client, size in unread.items())

    for attempt in range(10):
        await two.lab.equal(two.old.daemon)
        wire.deafen()
        two.lab.put_pods(64, prefix=f"stuck-{attempt}")
        with contextlib.suppress(TimeoutError):
            await until(is_stuck, within=0.5 * (attempt + 1), every=0.02)
            await asyncio.sleep(0.2)  # the Pods may come as several transactions, the last one small
            if not is_delivered():
                return
        await wire.heal()  # it was about to read, or has a whole request
    pytest.fail("no write was caught")


@pytest.mark.parametrize("fault", ["stopped", *(["cut off"] if IS_SOAK else [])])
async def test_write_that_does_not_get_through(consul: RealConsul, fault: str) -> None:
    """A request that the old leader's system still holds at the deadline never leaves, even when the network is free again."""
    async with pair(consul, is_restless=False) as two:
        await two.old.excuse()
        lab = two.old.lab
        await _has_a_write_stuck(two)
        two.struck_at = time.monotonic()
        if fault == "stopped":
            two.old.daemon.send(signal.SIGSTOP)
        else:
            lab.api_wire.refuse()
        await two.taken_over(TAKE_OVER)
        healed_at = time.monotonic()
        await lab.consul_wire.heal()
        await asyncio.sleep(1)
        two.old.daemon.send(signal.SIGCONT)
        await lab.api_wire.heal()
        await two.old.daemon.until_said("lost leadership")
        await asyncio.sleep(scaled(1, 5))
        assert lab.consul.since(healed_at) == []
