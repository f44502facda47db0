"""Several registrars on one Consul, on purpose or by mistake: no loss, no quarrel, and silence at rest."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from support.daemon import Daemon
from support.lab import HEAL_WITHIN, IS_SOAK, ChaosLab, Held, beside, chaos, chaos_lab, created_of
from support.real_servers import RealConsul, real_consul
from support.waiting import until

pytestmark = chaos("chaos-neighbours")

REST = 10.0 if IS_SOAK else 2.5


@pytest.fixture
async def consul() -> AsyncIterator[RealConsul]:
    """Run a Consul for one test."""
    async with real_consul() as running:
        yield running


async def _has_conflicts(daemon: Daemon, count: int) -> bool:
    return await daemon.metric("conflicts") == count


@pytest.mark.parametrize("backend", ["catalog", "agent"])
async def test_wrong_kubeconfig(consul: RealConsul, backend: str) -> None:
    """Under the right name another cluster answers: a conflict by its UID, and nothing is removed."""
    node = {"agent": consul.node}.get(backend, "")
    settings = {"CONSUL_BACKEND": backend, "ALLOW_MASS_DEREGISTER": "true"}
    async with chaos_lab(consul) as right, chaos_lab(consul) as wrong:
        right.put_pods(50)
        right.put_nodes(3)
        async with await right.chaotic(**settings) as daemon:
            await right.equal(daemon, node=node)
        before = await right.records(node)
        wrong.put_pods(5)
        wrong.put_pod("only-there")
        wrong.consul.is_wanted = right.wanted.__contains__
        async with await wrong.chaotic(**settings) as daemon:
            await daemon.until_said("conflict: the service ID is not ours to write")
            await daemon.until(lambda: _has_conflicts(daemon, 5))
            await daemon.until_said("resync")
            await asyncio.sleep(REST)
        wrong.assert_nothing_wrongful()
        after = await right.records(node)
        assert {key: after.get(key) for key in before} == before
        assert after.keys() - before.keys() == {"pod--shop--only-there"}


async def test_cluster_changes_under_a_running_registrar(consul: RealConsul) -> None:
    """An address that leads to another cluster from one moment on takes nothing of the first away."""
    async with chaos_lab(consul) as right, chaos_lab(consul) as wrong:
        right.put_pods(50)
        async with await right.chaotic(ALLOW_MASS_DEREGISTER="true") as daemon:
            await right.equal(daemon)
            before = await right.records()
            wrong.put_pods(5)
            wrong.cluster.access.grant("the-same", token=right.token_file.read_text())
            right.api.turn_to(wrong.api)
            right.api_wire.cut()
            await daemon.until_said("conflict: the service ID is not ours to write")
            await daemon.until(lambda: _has_conflicts(daemon, 5))
            await asyncio.sleep(REST)
            assert await right.records() == before
        right.assert_nothing_wrongful()


@pytest.mark.parametrize("backend", ["catalog", "agent"])
async def test_two_clusters_that_left_their_name_unset(consul: RealConsul, backend: str) -> None:
    """An ID that both want stays with the first and is a conflict for the second; neither removes the other's services."""
    node = {"agent": consul.node, "catalog": "k8s-default-cluster"}[backend]
    settings = {"CLUSTER_NAME": "", "CONSUL_BACKEND": backend}
    async with (
        chaos_lab(consul, name="default-cluster") as one,
        chaos_lab(consul, name="default-cluster") as two,
    ):
        one.put_pods(20)
        async with await one.chaotic(**settings) as first:
            await one.equal(first, node=node)
            before = created_of(await one.records(node))
            two.put_pods(5)
            two.put_pods(20, "bank")
            two.consul.is_wanted = lambda key: key in one.wanted or key in two.wanted
            one.consul.is_wanted = two.consul.is_wanted
            async with await two.chaotic(**settings) as second:
                both = {*one.wanted, *two.wanted}

                async def are_there() -> bool:
                    return (await one.records(node)).keys() == both

                await until(are_there, within=HEAL_WITHIN)
                await second.until_said("conflict: the service ID is not ours to write")
                one.drop_pod("web-19")
                two.drop_pod("web-19", "bank")
                both -= {"pod--shop--web-19", "pod--bank--web-19"}
                await until(are_there, within=HEAL_WITHIN)
                await asyncio.sleep(REST)
                assert all(await asyncio.gather(one.is_quiet_for(REST), two.is_quiet_for(REST)))
        now = created_of(await one.records(node))
        assert {key: now[key] for key in before if key in now} == {
            key: before[key] for key in before if key in now
        }
        one.assert_nothing_wrongful()
        two.assert_nothing_wrongful()


@pytest.mark.parametrize("backend", ["catalog", "agent"])
async def test_two_registrars_of_one_cluster(consul: RealConsul, backend: str) -> None:
    """Without election both write the same and then nothing, not even with shards to choose."""
    node = {"agent": consul.node}.get(backend, "")
    settings = {"CONSUL_BACKEND": backend, "SHARD_PATHS": "a,b,c,d,e,f,g,h"}
    async with chaos_lab(consul) as lab:
        lab.put_pods(300)
        lab.put_nodes(5)
        async with await lab.chaotic(**settings) as first, await lab.chaotic(**settings) as second:
            await lab.equal(first, node=node)
            await first.ready()
            await second.ready()
            for number in range(40):
                lab.drop_pod(f"web-{number}")
                lab.put_pod(f"new-{number}")
                await asyncio.sleep(0.02)
            await lab.equal(second, node=node)
            await asyncio.sleep(REST)
            assert await lab.is_quiet_for(2 * REST)
            lab.assert_nothing_wrongful()


@pytest.mark.parametrize("backend", ["catalog", "agent"])
async def test_two_instances_with_namespaces_of_their_own(consul: RealConsul, backend: str) -> None:
    """Each follows and removes its own alone, on one node."""
    node = {"agent": consul.node}.get(backend, "")
    async with chaos_lab(consul) as lab, beside(lab) as other:
        lab.put_pods(50, "shop")
        lab.put_pods(50, "bank")
        settings = {"CONSUL_BACKEND": backend}
        if backend == "catalog":
            settings["CONSUL_NODE_NAME"] = lab.node
        async with (
            await lab.chaotic(NAMESPACES="shop", INSTANCE="one", **settings) as first,
            await other.chaotic(NAMESPACES="bank", INSTANCE="two", **settings) as second,
        ):
            await lab.equal(first, node=node)
            await first.ready()
            await second.ready()
            lab.drop_pod("web-1", "shop")
            lab.drop_pod("web-1", "bank")
            lab.put_pod("new", "bank")
            await lab.equal(second, node=node)
            await asyncio.sleep(REST)
            await _rest(lab, other)
            assert {write.id.split("--")[1] for write in lab.consul.writes} == {"shop"}
            assert {write.id.split("--")[1] for write in other.consul.writes} == {"bank"}


async def _rest(*labs: ChaosLab) -> None:
    """Fail unless no registrar writes for a while, and none ever asked for a wrongful write."""
    assert all(await asyncio.gather(*(lab.is_quiet_for(REST) for lab in labs)))
    for lab in labs:
        lab.assert_nothing_wrongful()


@pytest.mark.parametrize("backend", ["catalog", "agent"])
async def test_two_clusters_on_one_consul(consul: RealConsul, backend: str) -> None:
    """Named apart, on nodes of their own or on one agent, they have nothing to do with each other."""
    node = {"agent": consul.node}.get(backend, "")
    settings = {"CONSUL_BACKEND": backend}
    async with chaos_lab(consul, name="east") as east, chaos_lab(consul, name="west") as west:
        if node:
            # One agent holds an ID once, so what they want must differ; it is looked at as a whole.
            west.wanted = east.wanted
            west.consul.is_wanted = east.wanted.__contains__
        places = ("east", "west") if node else ("shop", "shop")
        for lab, namespace in zip((east, west), places, strict=True):
            lab.put_pods(50, namespace)
        async with await east.chaotic(**settings) as first, await west.chaotic(**settings) as second:
            await east.equal(first, node=node)
            await west.equal(second, node=node)
            east.drop_pod("web-1", places[0])
            west.put_pod("new", places[1])
            await east.equal(first, node=node)
            await west.equal(second, node=node)
            await asyncio.sleep(REST)
            await _rest(east, west)


@pytest.mark.parametrize("backend", ["catalog", *(["agent"] if IS_SOAK else [])])
async def test_namespace_of_a_thousand_pods_deleted(consul: RealConsul, backend: str) -> None:
    """Deletions that were seen are facts: all are done at once, whatever the brake."""
    node = {"agent": consul.node}.get(backend, "")
    async with chaos_lab(consul) as lab:
        settings = {"BRAKE_CONFIRM": "600", "CONSUL_BACKEND": backend}
        async with await lab.chaotic(**settings) as daemon:
            lab.put_pods(1000, "doomed")
            lab.put_pods(10)
            await lab.equal(daemon, node=node)
            for number in range(1000):
                lab.drop_pod(f"web-{number}", "doomed")
            await lab.equal(daemon, node=node)
            lab.assert_nothing_wrongful()


async def test_true_mass_deletion_seen_only_by_a_list(consul: RealConsul) -> None:
    """Nine tenths gone while no registrar ran: held first, removed once a later list agrees."""
    async with chaos_lab(consul) as lab, await lab.chaotic(BRAKE_CONFIRM="4") as daemon:
        lab.put_pods(1000)
        await lab.equal(daemon)
        lab.api_wire.refuse()
        kept = {key: held for number, (key, held) in enumerate(lab.wanted.items()) if number < 100}
        for key in list(lab.wanted)[100:]:
            lab.drop_pod(key.rpartition("--")[2])
        lab.forget_history()
        await lab.api_wire.heal()
        await daemon.until_said("brake: a mass removal is held", "900 services")
        await _still_held(lab, kept)
        await lab.equal(daemon)
        lab.assert_nothing_wrongful()


async def _still_held(lab: ChaosLab, kept: dict[str, Held]) -> None:
    """Fail unless for two seconds the catalog still holds what the brake holds."""
    until = time.monotonic() + 2
    while time.monotonic() < until:
        assert len(await lab.records()) == 10 * len(kept)
        await asyncio.sleep(0.2)
