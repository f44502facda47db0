"""The registrar as a process, on a cluster and a Consul: the life of Pods and Nodes."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from k8s_consul_registrar.sandbox.consul_release import ConsulOptions, ConsulRelease
from support.cluster import SCRAPED, Cluster
from support.lab import each_release, running_lab
from support.waiting import PATIENCE

WEB = "pod--shop--web-1"
SHARDS = "shard-a,shard-b,shard-c"


async def test_pod_is_registered_with_all_it_asks_for() -> None:
    """Address, port, path, parameters, scheme and whose it is are what its annotations and status say."""
    annotations = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": "web",
        "prometheus.io/path": "stats?format=prometheus",
        "prometheus.io/scheme": "https",
        "prometheus.io/param-depth": "2",
    }
    async with running_lab() as lab, await lab.registrar(SHARD_PATHS="/one", INSTANCE="blue") as daemon:
        await lab.cluster.add_pod(annotations=annotations, ports={"web": 8080, "debug": 6060})
        await daemon.until(lambda: lab.has(WEB))
        service = lab.services[WEB]
        assert (service.name, service.address, service.port) == (WEB, "198.51.100.10", 8080)
        assert service.meta == {
            "metrics_path": "/stats", "param_format": "prometheus", "param_depth": "2", "scheme": "https",
            "cluster": "lab", "cluster_uid": await lab.cluster.uid(), "instance": "blue", "kind": "pod",
            "managed_by": "k8s-consul-registrar", "namespace": "shop", "node": "node-a", "pod": "web-1",
            "shard_path": "/one",
        }  # fmt: skip


async def _take_annotation_away(cluster: Cluster) -> None:
    await cluster.annotate_pod({"prometheus.io/scrape": None})


async def _say_false(cluster: Cluster) -> None:
    await cluster.annotate_pod({"prometheus.io/scrape": "false"})


async def _succeed(cluster: Cluster) -> None:
    await cluster.set_pod_status(phase="Succeeded", ips=["198.51.100.10"])


async def _fail(cluster: Cluster) -> None:
    await cluster.set_pod_status(phase="Failed", ips=["198.51.100.10"])


async def _delete(cluster: Cluster) -> None:
    await cluster.delete_pod()


@pytest.mark.parametrize("end", [_take_annotation_away, _say_false, _succeed, _fail, _delete])
async def test_pod_that_no_longer_asks_is_deregistered(
    end: Callable[[Cluster], Awaitable[None]],
) -> None:
    """Each way to stop asking takes the service away, and nothing else."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_pod()
        await lab.cluster.add_pod("web-2", ips=["198.51.100.11"])
        await daemon.until(lambda: lab.has(WEB, "pod--shop--web-2"))
        await end(lab.cluster)
        await daemon.until(lambda: lab.has("pod--shop--web-2"))
        assert lab.writes[2:] == [f"deregister {WEB}"]
        assert await daemon.terminate() == 0
        assert lab.has("pod--shop--web-2"), "what is registered stays when the daemon ends"


async def test_pod_being_deleted_stays_until_it_is_gone() -> None:
    """A graceful end leaves the service in place; the Pod's own end takes it away."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_pod()
        await daemon.until(lambda: lab.has(WEB))
        await lab.cluster.delete_pod(grace=600)
        await daemon.passes(3)
        assert lab.writes == [f"register {WEB}"]
        await lab.cluster.delete_pod()
        await daemon.until(lab.holds_nothing)


async def test_pod_waits_for_its_address_and_its_phase() -> None:
    """A Pending Pod asks for nothing; a Running one without an IP is rejected until it has one."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_pod(phase="Pending", ips=[])
        await daemon.passes(2)
        await daemon.measures('rejections{reason="no_ip"}', 0)
        await lab.cluster.set_pod_status(phase="Running", ips=[])
        await daemon.until_said("rejected", "no_ip: ")
        await daemon.measures('rejections{reason="no_ip"}', 1)
        await lab.cluster.set_pod_status(phase="Running", ips=["198.51.100.10"])
        await daemon.until(lambda: lab.has(WEB))


@each_release()
async def test_new_address_is_updated_in_place_and_keeps_its_shard(release: ConsulRelease) -> None:
    """Pods that move are registered over, never taken out in between, and stay with their Prometheus."""
    async with running_lab(ConsulOptions(release)) as lab, await lab.registrar(SHARD_PATHS=SHARDS) as daemon:
        names = [f"web-{number}" for number in range(8)]
        ids = [f"pod--shop--{name}" for name in names]
        for number, name in enumerate(names):
            await lab.cluster.add_pod(name, ips=[f"198.51.100.{number}"])
        await daemon.until(lambda: lab.has(*ids))
        before = {each: lab.meta(each)["shard_path"] for each in ids}
        assert set(before.values()) <= set(SHARDS.split(","))
        for number, name in enumerate(names):
            await lab.cluster.set_pod_status(name, phase="Running", ips=[f"203.0.113.{number}"])
        await daemon.until(lambda: all(lab.address(each).startswith("203.") for each in ids))
        assert {each: lab.meta(each)["shard_path"] for each in ids} == before
        assert sorted(lab.writes[8:]) == [f"register {each}" for each in ids]


@each_release()
async def test_shard_outlives_the_daemon_and_goes_with_its_setting(release: ConsulRelease) -> None:
    """A new run keeps each service's shard while it is still offered, and replaces one that is not."""
    async with running_lab(ConsulOptions(release)) as lab:
        await lab.cluster.add_pod()
        await lab.cluster.add_pod("web-2", ips=["198.51.100.11"])
        uid = await lab.cluster.uid()
        await lab.seed_pod("web-1", shard_path="old-2", cluster_uid=uid)
        await lab.seed_pod("web-2", shard_path="gone", cluster_uid=uid)
        async with await lab.registrar(SHARD_PATHS="old-2") as daemon:
            await daemon.ready()
            assert lab.meta(WEB)["shard_path"] == lab.meta("pod--shop--web-2")["shard_path"] == "old-2"


async def test_life_of_a_node() -> None:
    """A Node is registered at its InternalIP with the proxy's port and the kubelet's own, and goes with it."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        addresses = (("Hostname", "node-a"), ("ExternalIP", "203.0.113.7"), ("InternalIP", "192.0.2.10"))
        await lab.cluster.add_node("node-a", *addresses, kubelet_port=10350)
        await daemon.until(lambda: lab.has("node--192.0.2.10"))
        service = lab.services["node--192.0.2.10"]
        assert (service.name, service.address, service.port) == ("node--192.0.2.10", "192.0.2.10", 31112)
        assert service.meta == {
            "metrics_path": "/api/v1/nodes/192.0.2.10:10350/metrics/cadvisor", "scheme": "http",
            "cluster": "lab", "cluster_uid": await lab.cluster.uid(), "kind": "node", "node": "node-a",
            "managed_by": "k8s-consul-registrar",
        }  # fmt: skip
        await lab.cluster.add_node("node-b", ("Hostname", "node-b"))
        await daemon.until_said("rejected", "no_address: ")
        await lab.cluster.delete_node("node-a")
        await daemon.until(lab.holds_nothing)


async def test_two_nodes_with_one_address_are_one_service() -> None:
    """The Ready one counts, the other is rejected by reason, and they never overwrite each other in turn."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_node("old", ("InternalIP", "192.0.2.10"), is_ready=False)
        await lab.cluster.add_node("new", ("InternalIP", "192.0.2.10"), is_ready=True)
        await daemon.until_said("rejected", "node old")
        await daemon.until(lambda: lab.has("node--192.0.2.10"))
        await daemon.until(lambda: lab.meta("node--192.0.2.10")["node"] == "new")
        written = len(lab.writes)
        await daemon.passes(3)
        assert len(lab.writes) == written
        await daemon.measures('rejections{reason="address_taken"}', 1)


async def test_two_pods_with_one_id_never_overwrite_each_other() -> None:
    """`a`/`b--c` and `a--b`/`c` share an ID: the holder keeps it until it goes, then the other has it."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        for namespace in ("a", "a--b"):
            await lab.cluster.add_namespace(namespace)
        await lab.cluster.add_pod("b--c", "a", ips=["198.51.100.1"])
        await daemon.until(lambda: lab.has("pod--a--b--c"))
        await lab.cluster.add_pod("c", "a--b", ips=["198.51.100.2"])
        line = await daemon.until_said("rejected", "pod a--b/c")
        assert line["reason"] == "id_taken: the service ID pod--a--b--c belongs to pod a/b--c"
        await daemon.passes(3)
        assert lab.writes == ["register pod--a--b--c"]
        await lab.cluster.delete_pod("b--c", "a")
        await daemon.until(lambda: lab.address("pod--a--b--c") == "198.51.100.2")
        assert "deregister pod--a--b--c" not in lab.writes


async def test_holder_of_an_id_keeps_it_before_an_older_pod() -> None:
    """Consul's record of an ID outweighs age: after a restart the ID does not change hands."""
    async with running_lab() as lab:
        pods = []
        for namespace, name in (("a", "b--c"), ("a--b", "c")):
            await lab.cluster.add_namespace(namespace)
            pods.append((await lab.cluster.add_pod(name, namespace))["metadata"])
        older, younger = sorted(pods, key=lambda pod: (pod["creationTimestamp"], pod["uid"]))
        uid = await lab.cluster.uid()
        await lab.seed_pod(younger["name"], younger["namespace"], cluster_uid=uid)
        async with await lab.registrar() as daemon:
            await daemon.until_said("rejected", f"pod {older['namespace']}/{older['name']}")
            await daemon.until(lambda: lab.address("pod--a--b--c") == "198.51.100.10")
            assert lab.meta("pod--a--b--c")["pod"] == younger["name"]


async def test_ipv6_and_dual_stack() -> None:
    """Addresses of either family are taken as they are, and a Node's path has its brackets."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_pod("six", ips=["2001:db8::10"])
        await lab.cluster.add_pod("both", ips=["198.51.100.10", "2001:db8::11"])
        await lab.cluster.add_node("six", ("InternalIP", "2001:db8::1"))
        await lab.cluster.add_node("both", ("InternalIP", "192.0.2.1"), ("InternalIP", "2001:db8::2"))
        ids = ("pod--shop--six", "pod--shop--both", "node--2001:db8::1", "node--192.0.2.1")
        await daemon.until(lambda: lab.has(*ids))
        assert lab.address("pod--shop--six") == "2001:db8::10"
        assert lab.address("pod--shop--both") == "198.51.100.10"
        path = "/api/v1/nodes/[2001:db8::1]:10250/metrics/cadvisor"
        assert lab.meta("node--2001:db8::1")["metrics_path"] == path
        await lab.cluster.delete_node("six")
        await lab.cluster.delete_pod("six")
        await daemon.until(lambda: lab.has("pod--shop--both", "node--192.0.2.1"))


@each_release()
async def test_equal_service_is_not_written_again_and_a_hand_edit_is_mended(release: ConsulRelease) -> None:
    """Further passes write nothing while all is equal; what someone changed is put right in place."""
    async with running_lab(ConsulOptions(release)) as lab, await lab.registrar(SHARD_PATHS=SHARDS) as daemon:
        await asyncio.gather(*(lab.cluster.add_pod(f"web-{number}") for number in range(5)))
        await lab.cluster.add_node("node-a", ("InternalIP", "192.0.2.10"))
        await daemon.until(lambda: len(lab.services) == 6)
        written = lab.writes
        assert len(written) == len(set(written)) == 6
        line = await daemon.passes(3)
        assert lab.writes == written
        assert (line["unchanged"], line["registered"], line["updated"]) == (6, 0, 0)
        right = lab.services[WEB]
        await lab.seed(WEB, right.meta, Address="203.0.113.66", Port=right.port)
        await daemon.until(lambda: lab.address(WEB) == "198.51.100.10")
        assert lab.services[WEB].meta == right.meta
        assert lab.writes == [f"register {WEB}"]


async def test_shortest_way_to_start_it() -> None:
    """`MODE=registrar KUBECONFIG=… CONSUL_ADDRESS=… CLUSTER_NAME=… python -m k8s_consul_registrar` is enough."""
    async with running_lab() as lab:
        await lab.cluster.add_pod(annotations=SCRAPED)
        lab.token_file.write_text(await lab.cluster.token())
        settings = {"MODE": "registrar", "CONSUL_ADDRESS": lab.consul.address, "CLUSTER_NAME": "c1"}
        async with lab.daemon(**settings) as daemon:
            await daemon.until(lambda: lab.has(WEB))
            assert lab.meta(WEB)["cluster"] == "c1"
            assert await daemon.terminate() == 0


@pytest.mark.long
async def test_long_first_sync_is_told_as_it_goes() -> None:
    """A slow Consul: some lines say how far it is and how long it will take, and none once it is done."""
    names = [f"web-{number}" for number in range(600)]
    async with running_lab() as lab:
        for start in range(0, len(names), 50):
            await asyncio.gather(*(lab.cluster.add_pod(name) for name in names[start : start + 50]))
        lab.consul_door.delay = 0.4
        async with await lab.registrar(CONSUL_BACKEND="agent") as daemon:
            line = await daemon.until_said("first sync under way", "seconds_left", within=2 * PATIENCE)
            assert (line["backend"], line["doing"]) == ("agent", "registering")
            assert (line["listed"], line["targets"]) == (600, 600)
            assert 0 < line["registered"] < 600
            assert line["level"] == "info"
            assert line["seconds_left"] > 0
            await lab.consul_door.heal()
            await daemon.ready()
            assert len(lab.services) == 600
            # The interval is over once more; nothing is said of a sync that is done.
            told = len(daemon.said("first sync under way"))
            await asyncio.sleep(5.5)
            assert len(daemon.said("first sync under way")) == told
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_pod()
        await daemon.until(lambda: lab.has(WEB))
        await asyncio.sleep(5.5)
        assert daemon.said("first sync under way") == []
