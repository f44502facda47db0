"""The registrar as a process: what is not its own, what may go and when, and outages of either side."""

import time

import pytest

from support.daemon import Daemon, moment_of
from support.lab import MANAGED_BY, SandboxLab, running_lab

WEB = "pod--shop--web-1"
FOREVER = "600"


async def test_foreign_service_is_never_touched() -> None:
    """A hand-made service, another cluster's, another instance's and another program's stay as they are."""
    async with running_lab() as lab:
        await lab.seed("db", {"owner": "dba"})
        await lab.seed("pod--by--hand", {"cluster": "elsewhere"})
        await lab.seed_pod("theirs", cluster="other-cluster")
        await lab.seed_pod("blue", instance="blue")
        await lab.seed_pod("tool", managed_by="another-tool")
        await lab.seed_pod("twin", cluster_uid="the-uid-of-another-cluster-of-this-name")
        before = lab.services
        await lab.cluster.add_pod()
        async with await lab.registrar() as daemon:
            await daemon.ready()
            await daemon.passes(3)
        assert lab.writes == [f"register {WEB}"]
        assert {key: value for key, value in lab.services.items() if key != WEB} == before


async def test_id_of_another_owner_is_a_conflict() -> None:
    """It is reported, never overwritten; when its holder goes the Pod gets its ID."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        held = await lab.seed_pod("web-1", cluster="other-cluster")
        await lab.cluster.add_pod()
        await lab.cluster.add_pod("web-2", ips=["198.51.100.11"])
        line = await daemon.until_said("conflict: the service ID is not ours to write")
        assert line["service"] == WEB
        assert (
            line["problem"]
            == f"wanted by pod shop/web-1, held by managed_by={MANAGED_BY}, cluster=other-cluster"
        )
        await daemon.passes(3)
        assert lab.writes == ["register pod--shop--web-2"]
        assert lab.services[WEB] == held
        assert await daemon.metric("conflicts") == 1
        await lab.unseed(WEB)
        await daemon.until(lambda: lab.address(WEB) == "198.51.100.10")
        await daemon.passes()
        await daemon.measures("conflicts", 0)


async def _seed_originals(lab: SandboxLab) -> None:
    """Register what the original program of this cluster and of another one left behind."""
    for name, cluster in (("web-1", "lab"), ("gone", "lab"), ("far", "far-cluster")):
        meta = {"metrics_path": "/metrics", "cluster": cluster, "namespace": "shop", "shard_path": "two"}
        await lab.seed(f"pod--shop--{name}", meta)
    await lab.seed("node--192.0.2.10", {"metrics_path": "/x", "cluster": "lab", "namespace": ""})
    await lab.seed("node--192.0.2.99", {"metrics_path": "/x", "cluster": "lab", "namespace": ""})
    await lab.cluster.add_pod()
    await lab.cluster.add_node("node-a", ("InternalIP", "192.0.2.10"))


async def test_services_of_the_original_program_are_adopted() -> None:
    """Wanted ones become ours in place, with their shard; unwanted ones of this cluster go."""
    async with running_lab() as lab:
        await _seed_originals(lab)
        async with await lab.registrar(SHARD_PATHS="one,two,three") as daemon:
            await daemon.until(lambda: lab.has(WEB, "pod--shop--far", "node--192.0.2.10"))
            assert lab.meta(WEB)["managed_by"] == lab.meta("node--192.0.2.10")["managed_by"] == MANAGED_BY
            assert lab.meta(WEB)["shard_path"] == "two"
            assert sorted(lab.writes) == [
                "deregister node--192.0.2.99", "deregister pod--shop--gone",
                "register node--192.0.2.10", f"register {WEB}",
            ]  # fmt: skip


async def test_instance_leaves_the_originals_it_does_not_want() -> None:
    """A registrar of a part of the cluster adopts what it wants and removes nothing of the original's."""
    async with running_lab() as lab:
        await _seed_originals(lab)
        async with await lab.registrar(INSTANCE="blue") as daemon:
            await daemon.ready()
            await daemon.passes(2)
            assert sorted(lab.writes) == ["register node--192.0.2.10", f"register {WEB}"]
            await daemon.measures('kept_services{why="unproven"}', 2)


async def test_default_cluster_name_removes_nothing_unproven() -> None:
    """It warns, registers, and deregisters only what carries the UID of this very cluster."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        await lab.seed_pod("unproven", cluster="default-cluster")
        await lab.seed_pod("proven", cluster="default-cluster", cluster_uid=await lab.cluster.uid())
        async with await lab.registrar(CLUSTER_NAME="") as daemon:
            await daemon.until(lambda: lab.has(WEB, "pod--shop--unproven"))
            await daemon.passes(3)
            assert lab.writes == [f"register {WEB}", "deregister pod--shop--proven"]
            assert "CLUSTER_NAME is not set: 'default-cluster' is used" in daemon.output
            await daemon.measures('kept_services{why="unproven"}', 1)


async def test_services_of_an_earlier_setting_are_ours() -> None:
    """PREVIOUS_CLUSTER_NAMES and PREVIOUS_INSTANCES take over what was written under them."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        await lab.seed_pod("web-1", cluster="old-name", instance="old")
        await lab.seed_pod("gone", cluster="old-name")
        settings = {"INSTANCE": "new", "PREVIOUS_CLUSTER_NAMES": "old-name", "PREVIOUS_INSTANCES": 'old,""'}
        async with await lab.registrar(**settings) as daemon:
            await daemon.until(lambda: lab.has(WEB))
            assert (lab.meta(WEB)["cluster"], lab.meta(WEB)["instance"]) == ("lab", "new")


PODS = [f"pod--shop--web-{number}" for number in range(6)]


async def _seed_six_and_keep(lab: SandboxLab, kept: int) -> None:
    """Leave Consul as an earlier run did, with six Pods, of which `remaining` still exist."""
    uid = await lab.cluster.uid()
    for number in range(6):
        await lab.seed_pod(f"web-{number}", cluster_uid=uid)
    for number in range(kept):
        await lab.cluster.add_pod(f"web-{number}")


@pytest.mark.parametrize(("kept", "period"), [(0, "1"), (3, "1"), (3, FOREVER)])
async def test_mass_removal_seen_only_by_lists_is_held_and_then_done(kept: int, period: str) -> None:
    """Services whose objects the first lists lack go once the lists agreed for BRAKE_CONFIRM_START, however long the period is."""
    async with running_lab() as lab:
        await _seed_six_and_keep(lab, kept)
        async with await lab.registrar(BRAKE_CONFIRM_START="4", SYNC_PERIOD=period) as daemon:
            line = await daemon.until_said("brake: a mass removal is held")
            assert f"{6 - kept} services are missing from the list" in line["held"]
            assert await daemon.metric("brake_held_services") == 6 - kept
            assert len(lab.services) == 6, "the daemon is ready and still holds the removal"
            await daemon.until(lambda: lab.has(*PODS[:kept]))
            assert time.time() - moment_of(line) > 3.5, "by the daemon's own clock"
            await daemon.until(lambda: is_released(daemon))


async def is_released(daemon: Daemon) -> bool:
    """Return True if the brake holds nothing."""
    return await daemon.metric("brake_held_services") == 0


async def test_held_removal_stays_held_while_its_time_is_not_over() -> None:
    """Passes go by and nothing is removed; new Pods are registered all the same."""
    async with running_lab() as lab:
        await _seed_six_and_keep(lab, 0)
        async with await lab.registrar(BRAKE_CONFIRM_START=FOREVER, BRAKE_CONFIRM=FOREVER) as daemon:
            await daemon.until_said("brake: a mass removal is held")
            await lab.cluster.add_pod("new")
            await daemon.until(lambda: lab.has(*PODS, "pod--shop--new"))
            await daemon.passes(3)
            assert lab.has(*PODS, "pod--shop--new")
            assert len(daemon.said("brake: a mass removal is held")) <= 2, "said once, not at every pass"


async def test_mass_removal_may_be_allowed() -> None:
    """ALLOW_MASS_DEREGISTER lets the first list remove all at once."""
    async with running_lab() as lab:
        await _seed_six_and_keep(lab, 0)
        settings = {"BRAKE_CONFIRM_START": FOREVER, "ALLOW_MASS_DEREGISTER": "true"}
        async with await lab.registrar(**settings) as daemon:
            await daemon.until(lab.holds_nothing)


async def test_change_that_was_seen_is_no_matter_for_the_brake() -> None:
    """Annotations taken away are facts: all six services go at once."""
    async with running_lab() as lab:
        await _seed_six_and_keep(lab, 6)
        async with await lab.registrar(BRAKE_CONFIRM=FOREVER, BRAKE_CONFIRM_START=FOREVER) as daemon:
            await daemon.ready()
            for number in range(6):
                await lab.cluster.annotate_pod({"prometheus.io/scrape": None}, f"web-{number}")
            await daemon.until(lab.holds_nothing)


async def test_api_server_that_is_away_at_the_start() -> None:
    """The daemon waits, says why, holds everything in place, and begins when it comes."""
    async with running_lab() as lab:
        await lab.seed_pod("gone")
        await lab.cluster.add_pod()
        lab.api_door.refuse()
        async with await lab.registrar() as daemon:
            line = await daemon.until_said("cannot list; nothing of it is deregistered meanwhile")
            assert f"no connection to https://{lab.api_door.address}" in line["problem"]
            status, text = await daemon.admin("/readyz")
            assert status == 503
            assert "not synced yet: cannot" in text
            assert (await daemon.admin("/healthz"))[0] == 200
            assert lab.writes == []
            await lab.api_door.heal()
            await daemon.until(lambda: lab.has(WEB))
            await daemon.ready()


async def test_consul_that_is_away_at_the_start() -> None:
    """The daemon waits, says why, and begins when it comes."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        lab.consul_door.refuse()
        async with await lab.registrar() as daemon:
            line = await daemon.until_said("Consul cannot be used; trying again")
            assert f"Consul at http://{lab.consul_door.address}" in line["problem"]
            assert (await daemon.admin("/readyz"))[0] == 503
            assert await daemon.metric("consul_up") == 0
            await lab.consul_door.heal()
            await daemon.until(lambda: lab.has(WEB))
            await daemon.ready()
            assert await daemon.metric("consul_up") == 1


async def test_losing_the_api_server_changes_nothing_that_is_registered() -> None:
    """It stays ready, says so in a metric, removes nothing, and catches up when the server is back."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_pod()
        await lab.cluster.add_node("node-a", ("InternalIP", "192.0.2.10"))
        await daemon.until(lambda: lab.has(WEB, "node--192.0.2.10"))
        await daemon.ready()
        lab.api_door.refuse()
        await lab.cluster.delete_pod()
        await daemon.until_said("cannot list; nothing of it is deregistered meanwhile", "pods")
        await daemon.passes(3)
        assert lab.has(WEB, "node--192.0.2.10")
        assert await daemon.is_ready()
        assert await daemon.metric('source_followed{kind="pod"}') == 0
        await lab.api_door.heal()
        await daemon.until(lambda: lab.has("node--192.0.2.10"))
        assert await daemon.metric('source_followed{kind="pod"}') == 1


async def test_losing_consul_loses_no_change() -> None:
    """Changes in the cluster during an outage are written once Consul is back, and the daemon stays ready."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_pod()
        await daemon.until(lambda: lab.has(WEB))
        await daemon.until_said("resync")
        await daemon.ready()
        lab.consul_door.refuse()
        await daemon.until_said("Consul cannot be used; trying again")
        await lab.cluster.delete_pod()
        await lab.cluster.add_pod("web-2")
        assert await daemon.is_ready()
        await lab.consul_door.heal()
        await daemon.until(lambda: lab.has("pod--shop--web-2"))


async def test_list_that_breaks_off_removes_nothing() -> None:
    """Connections cut again and again in the middle of lists never make a Pod look gone."""
    async with running_lab() as lab, await lab.registrar(SYNC_PERIOD="1") as daemon:
        for number in range(4):
            await lab.cluster.add_pod(f"web-{number}")
        await daemon.until(lambda: len(lab.services) == 4)
        lab.api_door.delay = 0.02
        for _ in range(10):
            await daemon.passes()
            lab.api_door.cut()
        await lab.api_door.heal()
        await daemon.passes(3)
        assert [write for write in lab.writes if write.startswith("deregister")] == []
