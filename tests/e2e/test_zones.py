"""The registrar as a process: the zones of Pods, written once, kept through a loss of sight of Nodes."""

from support.cluster import MERGE_PATCH, rule
from support.lab import SandboxLab, running_lab

LABEL = "topology.kubernetes.io/zone"
WEB, OTHER = "pod--shop--web-1", "pod--shop--web-2"


async def _label(lab: SandboxLab, node: str, zone: str) -> None:
    patch = {"metadata": {"labels": {LABEL: zone}}}
    await lab.cluster.request("PATCH", f"/api/v1/nodes/{node}", patch, content_type=MERGE_PATCH)


async def _populate(lab: SandboxLab) -> None:
    """Add a Pod on a Node that is in a zone."""
    await lab.cluster.add_node("node-a", ("InternalIP", "192.0.2.10"))
    await _label(lab, "node-a", "eu-1a")
    await lab.cluster.add_pod()


async def test_pod_is_written_once_with_its_zone_and_follows_its_node() -> None:
    """The first write has the zone; another zone of the Node is an update, under the key it was given."""
    async with running_lab() as lab:
        await _populate(lab)
        async with await lab.registrar(SYNC_PERIOD="600", META_KEYS="zone=az") as daemon:
            await daemon.ready()
            assert sorted(lab.writes) == ["register node--192.0.2.10", f"register {WEB}"]
            assert lab.meta(WEB)["az"] == lab.meta("node--192.0.2.10")["az"] == "eu-1a"
            await _label(lab, "node-a", "eu-1b")
            await daemon.until(lambda: lab.meta(WEB)["az"] == "eu-1b")
            assert lab.writes.count(f"register {WEB}") == 2


async def _label_namespace(lab: SandboxLab, team: str) -> None:
    patch = {"metadata": {"labels": {"team": team}}}
    await lab.cluster.request("PATCH", "/api/v1/namespaces/shop", patch, content_type=MERGE_PATCH)


async def test_labels_of_the_namespace_are_written_at_once_and_kept_while_it_is_denied() -> None:
    """A changed label is an update; without the right to Namespaces nothing is rewritten, and Pods go on."""
    settings = {"NAMESPACE_LABELS_AS_META": "team", "NODE_LABELS_AS_META": LABEL}
    of_node = "node_label_topology_kubernetes_io_zone"
    async with running_lab() as lab:
        await _populate(lab)
        await _label_namespace(lab, "web")
        rights = [rule("list watch", "pods nodes namespaces"), rule("get", "namespaces")]
        lab.token_file.write_text(await lab.cluster.token(rights))
        async with await lab.registrar(SYNC_PERIOD="600", **settings) as daemon:
            await daemon.ready()
            assert sorted(lab.writes) == ["register node--192.0.2.10", f"register {WEB}"]
            assert (lab.meta(WEB)["namespace_label_team"], lab.meta(WEB)[of_node]) == ("web", "eu-1a")
            await _label_namespace(lab, "search")
            await daemon.until(lambda: lab.meta(WEB)["namespace_label_team"] == "search")
        before = dict(lab.meta(WEB))
        lab.consul.writes.clear()
        lab.token_file.write_text(
            await lab.cluster.token([rule("list watch", "pods"), rule("get", "namespaces")])
        )
        async with await lab.registrar(**settings) as daemon:
            await daemon.until_said("resync")
            await lab.cluster.add_pod("web-2", ips=["198.51.100.11"])
            await daemon.until(lambda: OTHER in lab.services)
            assert lab.writes == [f"register {OTHER}"]
            assert lab.meta(WEB) == before


async def test_zone_is_kept_while_nodes_are_denied() -> None:
    """A restart without the right to Nodes writes nothing; what a hand changes is repaired, zone and all."""
    async with running_lab() as lab:
        await _populate(lab)
        async with await lab.registrar() as daemon:
            await daemon.ready()
        before = dict(lab.meta(WEB))
        lab.consul.writes.clear()
        blind = [rule("list watch", "pods"), rule("get", "namespaces")]
        lab.token_file.write_text(await lab.cluster.token(blind))
        async with await lab.registrar() as daemon:
            await daemon.until_said("resync")
            await lab.cluster.add_pod("web-2", ips=["198.51.100.11"])
            await daemon.until(lambda: OTHER in lab.services)
            assert lab.writes == [f"register {OTHER}"]
            assert "zone" not in lab.meta(OTHER)
            await lab.seed(WEB, {**before, "zone": "by-hand"})
            await daemon.until(lambda: lab.meta(WEB) == before)
