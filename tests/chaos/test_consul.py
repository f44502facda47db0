"""Faults of Consul: it goes away, forgets, has no leader, refuses, hides, and is slow."""

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.daemon import Daemon
from support.doors import Refuse
from support.lab import HEAL_WITHIN, ChaosLab, chaos, chaos_lab, created_of, scaled
from support.real_servers import RealConsul, consul_binary, empty, make_token, real_consul
from support.waiting import PATIENCE, until

pytestmark = chaos("chaos-consul")

OUTAGE = scaled(2, 60)
TARGETS = 2000
SHARDS = {"SHARD_PATHS": "a,b,c,d"}
LIMIT = 200  # megabytes of resident memory that no fault may lead beyond
CANNOT = "Consul cannot be used; trying again"


async def _settled(lab: ChaosLab, daemon: Daemon) -> dict[str, str]:
    """Fill the cluster, wait until the catalog equals it, and return the shard of each service."""
    lab.put_pods(TARGETS - 20)
    lab.put_nodes(20)
    await lab.equal(daemon)
    await daemon.ready()
    return {key: one.shard for key, one in (await lab.records()).items()}


async def _change(lab: ChaosLab) -> None:
    """Let the cluster move on while Consul is out of reach."""
    for number in range(50):
        lab.drop_pod(f"web-{number}")
        lab.put_pod(f"new-{number}")
        lab.put_pod(f"web-{number + 100}", address="198.51.100.200")


async def _sound(lab: ChaosLab, daemon: Daemon, shards: dict[str, str]) -> None:
    """Fail unless everything came right: equal, in its shards, nothing wrongful, no memory gone."""
    await lab.equal(daemon)
    now = {key: one.shard for key, one in (await lab.records()).items()}
    assert {key: now[key] for key in shards if key in now} == {
        key: shards[key] for key in shards if key in now
    }
    lab.assert_nothing_wrongful()
    assert daemon.megabytes() < LIMIT
    assert await daemon.is_ready()


@pytest.mark.parametrize("data", ["kept", "lost"])
async def test_down_and_up_again(data: str) -> None:
    """Killed and started with its data or without, it is filled again, each service in its shard."""
    async with real_consul() as consul, chaos_lab(consul) as lab, await lab.chaotic(**SHARDS) as daemon:
        shards = await _settled(lab, daemon)
        before = created_of(await lab.records())
        await consul.program.stop(signal.SIGKILL)
        await _change(lab)
        await asyncio.sleep(OUTAGE)
        assert daemon.said(CANNOT)
        if data == "lost":
            empty(consul)
        await consul.start()
        await _sound(lab, daemon, shards)
        if data == "kept":
            now = created_of(await lab.records())
            assert all(now[key] == before[key] for key in before.keys() & now.keys())


@pytest.mark.parametrize(
    "fault", ["refused", "stalled", "slow", "narrow", "500", "429", "cut again and again"]
)
async def test_bad_road_to_it(fault: str) -> None:
    """Whatever becomes of requests, everything is right soon after they get through again."""
    async with real_consul() as consul, chaos_lab(consul) as lab, await lab.chaotic(**SHARDS) as daemon:
        shards = await _settled(lab, daemon)
        match fault:
            case "refused":
                lab.consul_wire.refuse()
            case "stalled":
                lab.consul_wire.stall()
            case "slow":
                lab.consul_wire.delay = 1.0
            case "narrow":
                lab.consul_wire.rate = 20_000
            case "500" | "429":
                lab.consul.fault = lambda _: Refuse(int(fault))
        await _change(lab)
        for _ in range(OUTAGE * 4):
            await asyncio.sleep(0.25)
            if fault.startswith("cut"):
                lab.consul_wire.cut()
        lab.consul.heal()
        await lab.consul_wire.heal()
        await _sound(lab, daemon, shards)


async def test_writes_whose_answer_is_lost() -> None:
    """Consul takes them and the answer never comes: nothing is removed, doubled or moved for it."""
    async with real_consul() as consul, chaos_lab(consul) as lab, await lab.chaotic(**SHARDS) as daemon:
        shards = await _settled(lab, daemon)
        created = created_of(await lab.records())
        for number in range(scaled(6, 60)):
            lab.consul.loses_answers = True
            lab.drop_pod(f"web-{number}")
            lab.put_pod(f"new-{number}")
            lab.put_pod(f"web-{number + 100}", address=f"198.51.100.{number + 20}")
            await asyncio.sleep(0.3)
            lab.consul.loses_answers = False
            await asyncio.sleep(0.3)
        await _sound(lab, daemon, shards)
        now = created_of(await lab.records())
        assert all(now[key] == created[key] for key in created.keys() & now.keys())


async def test_few_connections_allowed() -> None:
    """An agent that allows one address a handful of connections is still filled."""
    limits = "-hcl=limits { http_max_conns_per_client = 4 }"
    async with real_consul(limits) as consul, chaos_lab(consul) as lab:
        lab.put_pods(TARGETS)
        settings = {"CONSUL_ADDRESS": consul.address, "SYNC_PERIOD": "2", **SHARDS}
        async with await lab.chaotic(**settings) as daemon:
            # The limit counts by address, so a request from this test would take the daemon's connections.
            await daemon.until_said("resync", f"'unchanged': {TARGETS}", within=HEAL_WITHIN)
        assert await lab.is_equal()


@contextlib.asynccontextmanager
async def _three_servers() -> AsyncIterator[list[RealConsul]]:
    """Run three Consul servers that elect a leader among them."""
    binary = consul_binary()
    with tempfile.TemporaryDirectory(prefix="consul-", ignore_cleanup_errors=True) as folder:
        servers: list[RealConsul] = []
        for number in range(3):
            home = Path(tempfile.mkdtemp(dir=folder))
            join = [f"-retry-join={one.serf}" for one in servers]
            flags = ["-bootstrap-expect=3", "-retry-interval=1s", *join]
            servers.append(RealConsul(binary, home, flags, join="", acl=False, node=f"server-{number}"))
        try:
            for server in servers:
                server.program.launch()
            for server in servers:
                await server.program.ready(server.is_ready, 2 * PATIENCE)
            yield servers
        finally:
            for server in servers:
                await server.program.stop(signal.SIGKILL)


async def test_no_leader() -> None:
    """Of three servers the leader dies, then another: without a quorum nothing goes, with one all is right."""
    async with _three_servers() as servers:
        (leader,) = [
            one
            for one in servers
            if (await one.request("GET", "/v1/agent/self"))[1]["Stats"]["consul"]["leader"] == "true"
        ]
        reached = next(one for one in servers if one is not leader)
        other = next(one for one in servers if one not in (leader, reached))
        async with chaos_lab(reached) as lab, await lab.chaotic(**SHARDS) as daemon:
            shards = await _settled(lab, daemon)
            await leader.program.stop(signal.SIGKILL)
            await _change(lab)
            await lab.equal(daemon)
            await other.program.stop(signal.SIGKILL)
            lab.put_pod("during")
            await asyncio.sleep(OUTAGE)
            assert await daemon.is_ready()
            leader.program.launch()
            other.program.launch()
            await until(reached.is_ready, within=2 * PATIENCE)
            await _sound(lab, daemon, shards)


RULES = 'node_prefix "" { policy = "write" } service_prefix "" { policy = "write" } agent_prefix "" { policy = "read" }'


async def test_token_revoked_and_restored() -> None:
    """Without its rights nothing is touched; with them back all comes right."""
    async with real_consul(acl=True) as consul, chaos_lab(consul) as lab:
        token = await make_token(consul, "registrar", RULES)
        async with await lab.chaotic(**SHARDS, CONSUL_HTTP_TOKEN=token.secret) as daemon:
            shards = await _settled(lab, daemon)
            status, _ = await consul.request("DELETE", f"/v1/acl/token/{token.accessor}")
            assert status == 200
            await _change(lab)
            await daemon.until_said(CANNOT, "403", within=2 * PATIENCE)
            await asyncio.sleep(OUTAGE)
            again = {
                "AccessorID": token.accessor,
                "SecretID": token.secret,
                "Policies": [{"Name": "registrar"}],
            }
            status, answer = await consul.request("PUT", "/v1/acl/token", again)
            assert status == 200, answer
            await _sound(lab, daemon, shards)
            assert token.secret not in daemon.output


async def test_token_that_sees_less_and_less() -> None:
    """Reads that ACLs empty, whole or in part, remove nothing and end when the rights are back."""
    async with real_consul(acl=True) as consul, chaos_lab(consul) as lab:
        token = await make_token(consul, "registrar", RULES)
        _, policies = await consul.request("GET", "/v1/acl/policies")
        policy = next(one for one in policies if one["Name"] == "registrar")["ID"]

        async def allow(rules: str) -> None:
            body = {"ID": policy, "Name": "registrar", "Rules": rules}
            status, answer = await consul.request("PUT", f"/v1/acl/policy/{policy}", body)
            assert status == 200, answer

        async with await lab.chaotic(**SHARDS, CONSUL_HTTP_TOKEN=token.secret, SYNC_PERIOD="1") as daemon:
            shards = await _settled(lab, daemon)
            created = created_of(await lab.records())
            for rules in (
                'node_prefix "" { policy = "read" } service_prefix "pod--shop--web-1" { policy = "write" }',
                'service_prefix "" { policy = "write" }',
                "",
            ):
                await allow(rules)
                lab.put_pod("new")
                await asyncio.sleep(OUTAGE)
                now = created_of(await lab.records())
                assert all(now.get(key) == created[key] for key in created)
            await allow(RULES)
            await _sound(lab, daemon, shards)
