"""Reflectors into one Store, against the sandbox's API: many sources, lost history, and the requests at rest."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.kube.access import load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster import ClusterUid
from k8s_consul_registrar.kube.lists import Page
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.reflector import Following, Reflectors
from k8s_consul_registrar.kube.source_state import Failed, SourceStatus
from k8s_consul_registrar.kube.store import Evidence, Store
from k8s_consul_registrar.model import Kind, Node, ObjectKey, Pod, Selector, Source
from k8s_consul_registrar.sandbox import objects
from k8s_consul_registrar.sandbox.access import Rule
from k8s_consul_registrar.sandbox.resources import NAMESPACES
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from support.waiting import until

PODS, NODES = Source(Kind.POD), Source(Kind.NODE)
TIMING = Timing(retry_first=0.02, retry_cap=0.1, watch_settle=0.05)
SCRAPED = {"prometheus.io/scrape": "true", "prometheus.io/port": "9102"}


def pod(name: str, namespace: str = "shop", ip: str = "198.51.100.10", **changes: str) -> dict[str, Any]:
    """Return a Pod that is scraped."""
    return objects.pod(
        name, namespace=namespace, ip=ip, annotations={**SCRAPED, **changes}, labels={"app": name}
    )


class Cluster:
    """A cluster that is followed, and what its Store reported."""

    def __init__(
        self,
        client: KubeClient,
        sources: Sequence[Source],
        timing: Timing,
        *,
        watches: bool,
        selectors: Mapping[Kind, Selector],
    ) -> None:
        self.reported: list[tuple[ObjectKey, Evidence]] = []
        self.failures = 0
        self.store: Store[str] = Store(sources, _address, self)
        self.uid = ClusterUid(client)
        self.reflectors = Reflectors(
            sources,
            self.store,
            Following(
                client,
                timing,
                600.0 if watches else 0.1,
                watches=watches,
                selectors=selectors,
                cluster_uid=self.uid,
            ),
        )

    def on_object(
        self,
        key: ObjectKey,
        before: str | None,
        after: str | None,
        evidence: Evidence,
        heard_at: float | None,
    ) -> None:
        """Record it."""
        self.reported.append((key, evidence))

    def on_source(self, source: Source, status: SourceStatus) -> None:
        """Count failures."""
        self.failures += isinstance(status.state, Failed)

    def names(self) -> set[str]:
        """Return the names of the objects that are there."""
        return {key.name for key, _ in self.store.items()}

    def gone(self) -> set[str]:
        """Return the names of the objects that an inference took away."""
        return {key.name for key, evidence in self.reported if evidence is Evidence.ABSENT}

    def is_settled(self) -> bool:
        """Return whether every source is synced."""
        return all(status.proves_absence for status in self.store.statuses().values())


def _address(item: Item) -> str | None:
    match item:
        case Pod():
            return item.ip
        case Node():
            return item.addresses[0].address
    return None


@asynccontextmanager
async def followed(
    sandbox: Sandbox,
    folder: Path,
    *,
    sources: Sequence[Source] = (PODS, NODES),
    token: str = "",
    timing: Timing = TIMING,
    watches: bool = True,
    selectors: Mapping[Kind, Selector] | None = None,
    client_type: type[KubeClient] = KubeClient,
) -> AsyncIterator[Cluster]:
    """Follow a sandbox with a kubeconfig of its own."""
    config = sandbox.write_kubeconfig(folder / "kubeconfig", token)
    async with client_type(load_access({"KUBECONFIG": str(config)}), timing) as client:
        cluster = Cluster(client, sources, timing, watches=watches, selectors=selectors or {})
        task = asyncio.create_task(cluster.reflectors.run())
        try:
            yield cluster
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


@pytest.mark.parametrize("watches", [True, False])
async def test_cluster_is_followed(tmp_path: Path, watches: bool) -> None:
    """Whatever the operator chose: lists, changes, departures, identity."""
    async with Sandbox() as sandbox:
        kube = sandbox.kube
        kube.create(objects.node("node-a", addresses=(("InternalIP", "192.0.2.10"),)))
        kube.create(pod("a"))
        kube.create(pod("b"))
        async with followed(sandbox, tmp_path, watches=watches) as cluster:
            await until(lambda: cluster.is_settled() and cluster.names() == {"a", "b", "node-a"})
            kube.create(pod("c"))
            kube.delete("Pod", "a", "shop")
            kube.update(pod("b", ip="198.51.100.20"))
            await until(lambda: cluster.names() == {"b", "c", "node-a"})
            await until(lambda: cluster.store.get(ObjectKey(Kind.POD, "shop", "b")) == "198.51.100.20")
            namespace = kube.store.get(NAMESPACES, "kube-system")
            assert namespace is not None
            assert cluster.uid.uid == namespace.decode()["metadata"]["uid"]
            assert cluster.gone() == (set() if watches else {"a"})
            stats = cluster.reflectors.stats()[PODS]
            assert stats.lists == 1 if watches else stats.lists > 1
            assert stats.internal_errors == 0


async def test_compacted_history_is_listed_again(tmp_path: Path) -> None:
    """A version that is gone when the watch resumes costs a list, and nothing is missed."""
    async with Sandbox() as sandbox:
        kube = sandbox.kube
        kube.create(pod("a"))
        timing = Timing(retry_first=0.02, retry_cap=0.1, watch_timeout=1.0, watch_settle=0.05)
        async with followed(sandbox, tmp_path, sources=(PODS,), timing=timing) as cluster:
            await until(cluster.is_settled)
            while not cluster.reflectors.stats()[PODS].restarts.get("expired"):
                kube.create(pod("b"))
                kube.delete("Pod", "b", "shop")
                kube.store.compact()
                await asyncio.sleep(0)
            kube.create(pod("c"))
            await until(lambda: cluster.names() == {"a", "c"} and cluster.is_settled())


async def test_restored_history_is_noticed(tmp_path: Path) -> None:
    """Etcd went back to a backup: what was created since is absent from a list, not deleted by an event."""
    async with Sandbox() as sandbox:
        kube = sandbox.kube
        kube.create(pod("a"))
        backup = kube.store.backup()
        for number in range(20):
            kube.create(pod(f"later-{number}"))
        async with followed(sandbox, tmp_path, sources=(PODS,)) as cluster:
            await until(lambda: len(cluster.names()) == 21 and cluster.is_settled())
            kube.create(pod("later-20"))
            await until(lambda: "later-20" in cluster.names())  # by an event: the watch is open
            kube.store.restore(backup)
            await until(lambda: cluster.names() == {"a"} and cluster.is_settled())
            assert cluster.gone() == {f"later-{number}" for number in range(21)}
            kube.create(pod("new"))
            await until(lambda: cluster.names() == {"a", "new"})
            assert cluster.reflectors.stats()[PODS].restarts["ahead"] == 1


async def test_namespace_that_fails_leaves_the_others_working(tmp_path: Path) -> None:
    """A Role in one namespace is enough for it; the denied one is named and blocks only itself."""
    async with Sandbox() as sandbox:
        sandbox.kube.create(pod("a", "shop"))
        sandbox.kube.create(pod("b", "bank"))
        token = sandbox.token("narrow", Rule("*", "pods", "shop"))
        shop, bank = Source(Kind.POD, "shop"), Source(Kind.POD, "bank")
        async with followed(sandbox, tmp_path, sources=(shop, bank), token=token) as cluster:
            await until(lambda: cluster.store.status(shop).proves_absence)
            await until(lambda: "bank" in cluster.store.status(bank).problem)
            assert cluster.names() == {"a"}
            assert cluster.uid.uid == ""
            assert not cluster.store.status(bank).is_followed
            assert cluster.store.status(shop).problem == ""


class _HangsOnNodes(KubeClient):
    """Asks for Nodes and never hears of them."""

    async def pages(self, kind: Kind, **query: Any) -> AsyncGenerator[Page, None]:
        """Yield what the server sends, but never of Nodes."""
        if kind is Kind.NODE:
            await asyncio.Event().wait()
        async for page in super().pages(kind, **query):
            yield page


async def test_pods_wait_for_nodes_but_not_for_long(tmp_path: Path) -> None:
    """Pods are listed after the Nodes were, so that they begin with their zones, or after a while without."""
    async with Sandbox() as sandbox:
        for number in range(3):
            name = f"node-{number}"
            sandbox.kube.create(objects.node(name, addresses=(("InternalIP", f"192.0.2.{number}"),)))
        sandbox.kube.create(pod("a"))
        async with followed(sandbox, tmp_path) as cluster:
            await until(cluster.is_settled)
        assert [key.kind for key, _ in cluster.reported] == [Kind.NODE] * 3 + [Kind.POD]
        async with followed(sandbox, tmp_path, client_type=_HangsOnNodes) as cluster:
            await until(lambda: cluster.names() == {"a"})
        assert not cluster.store.status(NODES).is_followed


async def test_pods_do_not_wait_for_nodes_that_fail(tmp_path: Path) -> None:
    """A denied kind holds up no other."""
    async with Sandbox() as sandbox:
        sandbox.kube.create(pod("a"))
        token = sandbox.token("narrow", Rule("*", "pods"))
        loop = asyncio.get_running_loop()
        async with followed(sandbox, tmp_path, token=token) as cluster:
            await until(lambda: bool(cluster.store.status(NODES).problem))
            failed_at = loop.time()
            await until(lambda: cluster.names() == {"a"})
            assert loop.time() - failed_at < 10.0


async def test_selectors_choose_by_kind(tmp_path: Path) -> None:
    """A label that is taken away departs its Pod; Nodes have a selector of their own."""
    async with Sandbox() as sandbox:
        kube = sandbox.kube
        kube.create(objects.node("node-a", addresses=(("InternalIP", "192.0.2.10"),)))
        kube.create(pod("a"))
        kube.create(pod("b"))
        async with followed(sandbox, tmp_path, selectors={Kind.POD: Selector("app in (a,c)")}) as cluster:
            await until(lambda: cluster.is_settled() and cluster.names() == {"a", "node-a"})
            kube.create(pod("c"))
            await until(lambda: cluster.names() == {"a", "c", "node-a"})
            changed = pod("c")
            changed["metadata"]["labels"] = {"app": "z"}
            kube.update(changed)
            await until(lambda: cluster.names() == {"a", "node-a"})


async def test_excluded_namespaces_are_left_out_by_the_server(tmp_path: Path) -> None:
    """Of lists and of watches, by a field selector."""
    async with Sandbox() as sandbox:
        kube = sandbox.kube
        kube.create(pod("a"))
        kube.create(objects.pod("b", namespace="kube-system", ip="198.51.100.9"))
        selector = Selector(fields="metadata.namespace!=ci,metadata.namespace!=kube-system")
        async with followed(sandbox, tmp_path, sources=(PODS,), selectors={Kind.POD: selector}) as cluster:
            await until(lambda: cluster.is_settled() and cluster.names() == {"a"})
            kube.create(objects.pod("c", namespace="ci", ip="198.51.100.10"))
            kube.create(pod("d"))
            await until(lambda: cluster.names() == {"a", "d"})


async def test_at_rest_nothing_is_listed_and_noise_changes_nothing(tmp_path: Path) -> None:
    """A thousand status changes reach the registrar and end there."""
    async with Sandbox(bookmark_period=0.1) as sandbox:
        sandbox.kube.create(pod("a"))
        async with followed(sandbox, tmp_path, sources=(PODS,)) as cluster:
            await until(cluster.is_settled)
            for number in range(1000):
                noisy = pod("a")
                noisy["status"]["message"] = f"turn {number}"
                sandbox.kube.update(noisy)
            heard = cluster.reflectors.stats()[PODS].heard_at
            await asyncio.sleep(0.5)
            assert cluster.reflectors.stats()[PODS].heard_at != heard
            assert (len(cluster.reported), cluster.failures) == (1, 0)
            assert cluster.reflectors.stats()[PODS].lists == 1
