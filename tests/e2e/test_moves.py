"""Moving between an agent and the catalog, and between nodes, without a gap."""

from k8s_consul_registrar.sandbox.consul_release import ConsulOptions, ConsulRelease
from support.lab import SandboxLab, each_release, running_lab

WEB = "pod--shop--web-1"


def at_node(lab: SandboxLab, node: str) -> set[str]:
    """Return the IDs of the services at a node of the catalog."""
    return {service.id for service in lab.consul.catalog.services_of(node)}


@each_release()
async def test_from_the_agent_to_the_catalog_and_back(release: ConsulRelease) -> None:
    """At each move the old place is cleared only when everything is at the new one; others' stay."""
    async with running_lab(ConsulOptions(release)) as lab:
        await lab.cluster.add_pod()
        await lab.cluster.add_pod("web-2")
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has(WEB, "pod--shop--web-2"))
        await lab.seed("hand-made")
        await lab.seed_pod("elsewhere", cluster="other")
        others = {"hand-made", "pod--shop--elsewhere"}
        async with await lab.registrar(CONSUL_BACKEND="catalog") as daemon:
            await daemon.until(lambda: set(lab.services) == others)
            assert at_node(lab, "k8s-lab") == {WEB, "pod--shop--web-2"}
        first_removal = next(n for n, write in enumerate(lab.writes) if write.startswith("deregister"))
        assert any("txn" in write for write in lab.writes[:first_removal])
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: not at_node(lab, "k8s-lab"))
            assert set(lab.services) == others | {WEB, "pod--shop--web-2"}


@each_release()
async def test_auto_follows_the_services_and_moves_only_for_a_reason(release: ConsulRelease) -> None:
    """A client agent keeps them; once `catalog` has moved them they stay there, until `agent` takes them back."""
    web, auto = {WEB, "pod--shop--web-2"}, {"CONSUL_BACKEND": "auto"}
    async with running_lab(ConsulOptions(release, is_server=False)) as lab:
        await lab.cluster.add_pod()
        await lab.cluster.add_pod("web-2")
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has(*web))
        async with await lab.registrar(**auto) as daemon:
            await daemon.ready()
            assert (lab.has(*web), at_node(lab, "k8s-lab")) == (True, set())
        async with await lab.registrar(CONSUL_BACKEND="catalog") as daemon:
            await daemon.until(lambda: at_node(lab, "k8s-lab") == web and not lab.services)
        lab.consul.writes.clear()
        async with await lab.registrar(**auto) as daemon:
            await daemon.ready()
            await daemon.passes(2)
        assert lab.consul.writes == []
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has(*web) and not at_node(lab, "k8s-lab"))
        async with await lab.registrar(**auto) as daemon:
            await daemon.ready()
            assert (lab.has(*web), at_node(lab, "k8s-lab")) == (True, set())


async def test_auto_takes_services_from_an_agent_that_turned_out_to_be_a_server() -> None:
    """Services that the agent backend left at the server's own node go once everything is in the catalog."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has(WEB))
        async with await lab.registrar(CONSUL_BACKEND="auto") as daemon:
            await daemon.until(lambda: at_node(lab, "k8s-lab") == {WEB} and not lab.services)


@each_release()
async def test_to_another_node_of_the_catalog(release: ConsulRelease) -> None:
    """The default node of this cluster is cleared by itself, another where it is named."""
    async with running_lab(ConsulOptions(release)) as lab:
        await lab.cluster.add_pod()
        async with await lab.registrar(CONSUL_BACKEND="catalog", CONSUL_NODE_NAME="first") as daemon:
            await daemon.until(lambda: at_node(lab, "first") == {WEB})
        moved = {"CONSUL_BACKEND": "catalog", "CONSUL_NODE_NAME": "second"}
        async with await lab.registrar(**moved, PREVIOUS_CONSUL_NODE_NAMES="first") as daemon:
            await daemon.until(lambda: at_node(lab, "second") == {WEB} and not at_node(lab, "first"))


async def test_to_the_node_of_another_instance() -> None:
    """PREVIOUS_INSTANCES names the earlier one's default node as well; without it that one's services stay."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        async with await lab.registrar(CONSUL_BACKEND="catalog", INSTANCE="blue") as daemon:
            await daemon.until(lambda: at_node(lab, "k8s-lab-blue") == {WEB})
        moved = {"CONSUL_BACKEND": "catalog", "INSTANCE": "green"}
        async with await lab.registrar(**moved) as daemon:
            await daemon.until(lambda: at_node(lab, "k8s-lab-green") == {WEB})
            await daemon.passes(2)
        assert at_node(lab, "k8s-lab-blue") == {WEB}
        async with await lab.registrar(**moved, PREVIOUS_INSTANCES="blue") as daemon:
            await daemon.until(lambda: not at_node(lab, "k8s-lab-blue"))
        assert at_node(lab, "k8s-lab-green") == {WEB}


async def test_service_refused_at_the_new_place_stays_at_the_old_one() -> None:
    """A service that is not at the new place is not taken from the old one."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        await lab.cluster.add_pod("web-2")
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has(WEB, "pod--shop--web-2"))
        async with await lab.registrar(CONSUL_BACKEND="catalog", INSTANCE="other") as daemon:
            await daemon.until(lambda: len(at_node(lab, "k8s-lab-other")) == 2)
        holder = {"CONSUL_BACKEND": "catalog", "CONSUL_NODE_NAME": "k8s-lab-other"}
        async with await lab.registrar(**holder) as daemon:
            await daemon.until_said("conflict: the service ID is not ours to write")
            await daemon.passes(2)
        assert lab.has(WEB, "pod--shop--web-2")
