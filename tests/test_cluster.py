"""A followed cluster against the sandbox's API: many sources, lost history, and what is asked at rest."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.kube.access import load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster import FollowedCluster
from k8s_consul_registrar.kube.watch import WatchEvent
from k8s_consul_registrar.model import Kind, Source
from k8s_consul_registrar.sandbox import objects
from k8s_consul_registrar.sandbox.access import Rule
from k8s_consul_registrar.sandbox.resources import NAMESPACES
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from k8s_consul_registrar.targets.resolve import TargetRules, resolve

PODS, NODES = Source(Kind.POD), Source(Kind.NODE)
TIMING = Timing(retry_first=0.02, retry_cap=0.1, read_timeout=2.0, watch_settle=0.05)
SCRAPED = {"prometheus.io/scrape": "true", "prometheus.io/port": "9102"}


def pod(name: str, namespace: str = "shop", ip: str = "198.51.100.10", **changes: str) -> dict[str, Any]:
    """Return a Pod that is scraped."""
    return objects.pod(
        name, namespace=namespace, ip=ip, annotations={**SCRAPED, **changes}, labels={"app": name}
    )


@asynccontextmanager
async def followed(
    sandbox: Sandbox,
    folder: Path,
    *,
    sources: Sequence[Source] = (PODS, NODES),
    token: str = "",
    timing: Timing = TIMING,
    follow: bool = True,
    selectors: Mapping[Kind, str] | None = None,
    client_type: type[KubeClient] = KubeClient,
) -> AsyncIterator[FollowedCluster]:
    """Follow a sandbox with a kubeconfig of its own."""
    config = sandbox.write_kubeconfig(folder / "kubeconfig", token)
    async with client_type(load_access({"KUBECONFIG": str(config)}), timing) as client:
        cluster = FollowedCluster(
            client,
            sources,
            lambda item: resolve(item, TargetRules()),
            period=0.1,
            timing=timing,
            follow=follow,
            selectors=selectors or {},
        )
        task = asyncio.create_task(cluster.run())
        try:
            yield cluster
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def until(condition: Callable[[], bool], within: float = 10.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)


def names(cluster: FollowedCluster) -> set[str]:
    """Return the names of the objects that are targets."""
    return {target.key.name for claims in cluster.wanted().claims.values() for target in claims}


def is_settled(cluster: FollowedCluster) -> bool:
    """Tell whether every source is listed and followed."""
    return all(state.proves_absence for state in cluster.wanted().sources.values())


@pytest.mark.parametrize("can_stream_lists", [True, False])
@pytest.mark.parametrize("follow", [True, False])
async def test_a_cluster_is_followed(tmp_path: Path, can_stream_lists: bool, follow: bool) -> None:
    """Whatever the server offers and the operator chose: lists, changes, departures, identity."""
    async with Sandbox(can_stream_lists=can_stream_lists) as sandbox:
        kube = sandbox.kube
        kube.create(objects.node("node-a", addresses=(("InternalIP", "192.0.2.10"),)))
        kube.create(pod("a"))
        kube.create(pod("b"))
        async with followed(sandbox, tmp_path, follow=follow) as cluster:
            await until(lambda: is_settled(cluster) and names(cluster) == {"a", "b", "node-a"})
            kube.create(pod("c"))
            kube.delete("Pod", "a", "shop")
            kube.update(pod("b", ip="198.51.100.20"))
            await until(lambda: names(cluster) == {"b", "c", "node-a"})
            await until(lambda: cluster.wanted().claims["pod--shop--b"][0].address == "198.51.100.20")
            wanted = cluster.wanted()
            namespace = kube.store.get(NAMESPACES, "kube-system")
            assert namespace is not None
            assert wanted.cluster_uid == namespace.decode()["metadata"]["uid"]
            assert {key.name for key in wanted.departed} == ({"a"} if follow else set())
            activity = cluster.activity()[PODS]
            assert activity.lists == 1 if follow else activity.lists > 1


async def test_a_compacted_history_is_listed_again(tmp_path: Path) -> None:
    """A version that is gone when the watch resumes costs a list, and nothing is missed."""
    async with Sandbox() as sandbox:
        kube = sandbox.kube
        kube.create(pod("a"))
        timing = Timing(retry_first=0.02, retry_cap=0.1, watch_timeout=1.0, watch_settle=0.05)
        async with followed(sandbox, tmp_path, sources=(PODS,), timing=timing) as cluster:
            await until(lambda: is_settled(cluster))
            while not cluster.activity()[PODS].restarts.get("expired"):
                kube.create(pod("b"))
                kube.delete("Pod", "b", "shop")
                kube.store.compact()
                await asyncio.sleep(0)
            kube.create(pod("c"))
            await until(lambda: names(cluster) == {"a", "c"} and is_settled(cluster))


async def test_a_restored_history_is_noticed(tmp_path: Path) -> None:
    """Etcd went back to a backup: what was created since is gone, and absent, not departed."""
    async with Sandbox() as sandbox:
        kube = sandbox.kube
        kube.create(pod("a"))
        backup = kube.store.backup()
        for number in range(20):
            kube.create(pod(f"later-{number}"))
        async with followed(sandbox, tmp_path, sources=(PODS,)) as cluster:
            await until(lambda: len(names(cluster)) == 21 and is_settled(cluster))
            kube.store.restore(backup)
            await until(lambda: names(cluster) == {"a"} and is_settled(cluster))
            assert cluster.wanted().departed == frozenset()
            kube.create(pod("new"))
            await until(lambda: names(cluster) == {"a", "new"})
            assert cluster.activity()[PODS].restarts["ahead"] == 1


async def test_namespaces_are_sources_each_failing_alone(tmp_path: Path) -> None:
    """A Role in one namespace is enough for it; the denied one is named and blocks only itself."""
    async with Sandbox() as sandbox:
        sandbox.kube.create(pod("a", "shop"))
        sandbox.kube.create(pod("b", "bank"))
        token = sandbox.token("narrow", Rule("*", "pods", "shop"))
        shop, bank = Source(Kind.POD, "shop"), Source(Kind.POD, "bank")
        async with followed(sandbox, tmp_path, sources=(shop, bank), token=token) as cluster:
            await until(lambda: cluster.wanted().sources[shop].proves_absence)
            await until(lambda: "bank" in cluster.wanted().sources[bank].problem)
            wanted = cluster.wanted()
            assert names(cluster) == {"a"}
            assert wanted.cluster_uid == ""
            assert not wanted.sources[bank].is_followed
            assert wanted.sources[shop].problem == ""


class _HangsOnNodes(KubeClient):
    """Asks for Nodes and never hears of them."""

    async def watch(self, kind: Kind, **query: Any) -> AsyncGenerator[list[WatchEvent], None]:
        """Yield what the server sends, of Nodes nothing for ever."""
        if kind is Kind.NODE:
            await asyncio.Event().wait()
        async for batch in super().watch(kind, **query):
            yield batch


async def test_pods_wait_for_nodes_but_not_for_long(tmp_path: Path) -> None:
    """Pods are listed after the Nodes were, so that they begin with their zones, or after a while without."""
    async with Sandbox() as sandbox:
        labels = {"topology.kubernetes.io/zone": "eu-1a"}
        addresses = (("InternalIP", "192.0.2.10"),)
        sandbox.kube.create(objects.node("node-a", addresses=addresses, labels=labels))
        sandbox.kube.create({**pod("a"), "spec": {"nodeName": "node-a", "containers": [{"name": "c"}]}})
        zones: set[str | None] = set()

        def is_there(cluster: FollowedCluster) -> bool:
            found = cluster.mirror.claims.get("pod--shop--a", ())
            zones.update(dict(target.meta).get("zone") for target in found)
            return bool(found)

        async with followed(sandbox, tmp_path) as cluster:
            await until(lambda: is_there(cluster) and is_settled(cluster))
        assert zones == {"eu-1a"}
        async with followed(sandbox, tmp_path, client_type=_HangsOnNodes) as cluster:
            await until(lambda: is_there(cluster))
        assert zones == {"eu-1a", None}


async def test_selectors_choose_by_kind(tmp_path: Path) -> None:
    """A label that is taken away departs its Pod; Nodes have a selector of their own."""
    async with Sandbox() as sandbox:
        kube = sandbox.kube
        kube.create(objects.node("node-a", addresses=(("InternalIP", "192.0.2.10"),)))
        kube.create(pod("a"))
        kube.create(pod("b"))
        async with followed(sandbox, tmp_path, selectors={Kind.POD: "app in (a,c)"}) as cluster:
            await until(lambda: is_settled(cluster) and names(cluster) == {"a", "node-a"})
            kube.create(pod("c"))
            await until(lambda: names(cluster) == {"a", "c", "node-a"})
            changed = pod("c")
            changed["metadata"]["labels"] = {"app": "z"}
            kube.update(changed)
            await until(lambda: names(cluster) == {"a", "node-a"})


async def test_at_rest_nothing_is_listed_and_noise_wakes_nobody(tmp_path: Path) -> None:
    """A thousand status changes reach the registrar and end there."""
    async with Sandbox(bookmark_period=0.1) as sandbox:
        sandbox.kube.create(pod("a"))
        async with followed(sandbox, tmp_path, sources=(PODS,)) as cluster:
            await until(lambda: is_settled(cluster))
            for number in range(1000):
                noisy = pod("a")
                noisy["status"]["message"] = f"turn {number}"
                sandbox.kube.update(noisy)
            heard = cluster.activity()[PODS].heard_at
            await asyncio.sleep(0.5)
            assert cluster.activity()[PODS].heard_at != heard
            assert not cluster.needs_full_pass()
            assert cluster.changes().claims == {}
            assert cluster.activity()[PODS].lists == 1
