"""purge: whose services it takes, which node goes with them, and what it says of the rest."""

import yaml

from e2e.test_once import WEB, run
from e2e.test_orphans import agent_at, at, put
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.sandbox.consul_release import NEWEST, ConsulOptions, ConsulRelease
from support.builders import our_pod_service
from support.files import DEPLOY
from support.lab import SandboxLab, each_release, running_lab

NOWHERE = {"KUBECONFIG": "/nonexistent/kubeconfig"}
HERE, THERE = "uid-of-here", "uid-of-there"


async def seed_two_clusters(lab: SandboxLab) -> None:
    """Leave services of two clusters of one name at the agent, and one that does not say which."""
    await lab.seed_pod("here", cluster_uid=HERE)
    await lab.seed_pod("there", cluster_uid=THERE)
    await lab.seed_pod("unsaid")


def left(lab: SandboxLab) -> set[str]:
    """Return the names of the services at the agent."""
    return {one.rpartition("--")[2] for one in lab.services}


async def test_two_clusters_of_one_name_are_told_apart_or_refused() -> None:
    """Without a cluster to ask it names the UIDs and removes nothing; told which, it takes that one's."""
    async with running_lab() as lab:
        await seed_two_clusters(lab)
        code, output = await run(lab, "purge", "--yes", **NOWHERE)
        assert code == 1
        assert all(text in output for text in (HERE, THERE, "--cluster-uid"))
        assert left(lab) == {"here", "there", "unsaid"}
        code, output = await run(lab, "purge", "--yes", "--cluster-uid", THERE, **NOWHERE)
        assert (code, left(lab)) == (0, {"here"}), output
        assert f"--cluster-uid {HERE}" in output
        assert "pod--shop--here" not in output


async def test_cluster_at_hand_says_which_is_meant() -> None:
    """With its API server in reach, what carries another cluster's UID is neither shown nor removed."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        assert (await run(lab, "sync"))[0] == 0
        await lab.seed_pod("there", cluster_uid=THERE)
        code, output = await run(lab, "purge", "--yes")
        assert (code, left(lab)) == (0, {"there"}), output
        assert "removed 1" in output
        assert "pod--shop--there" not in output


async def test_purge_job_takes_this_cluster_s_services_and_no_other_s() -> None:
    """The Job's own arguments and variables, on the lab's Consul: also what is left at a lost agent's node."""
    (job,) = yaml.safe_load_all((DEPLOY / "purge-job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    given = {one["name"]: one["value"] for one in container["env"]}
    assert given.keys() == {"CLUSTER_NAME", "CONSUL_ADDRESS"}  # the lab gives both
    async with running_lab() as lab:
        ours = our_pod_service("web-2", cluster_uid=await lab.cluster.uid())
        await agent_at(lab, "old", "critical", ours, our_pod_service("web-3", cluster_uid=THERE))
        await lab.cluster.add_pod()
        assert (await run(lab, "sync"))[0] == 0
        await lab.seed_pod("there", cluster_uid=THERE)
        code, output = await run(lab, *container["args"])
        assert (code, left(lab), at(lab)) == (0, {"there"}, {"web-3"}), output
        code, output = await run(lab, *container["args"])
        assert code == 0, "a second run finds nothing"


async def test_one_cluster_needs_no_telling() -> None:
    """Where all that say it say the same, the name is enough."""
    async with running_lab() as lab:
        await lab.seed_pod("here", cluster_uid=HERE)
        await lab.seed_pod("unsaid")
        code, output = await run(lab, "purge", "--yes", **NOWHERE)
        assert (code, left(lab)) == (0, set()), output


async def test_what_the_agent_left_in_the_catalog_goes_too() -> None:
    """It removes what earlier runs and this one left; another registrar's services stay."""
    async with running_lab(ConsulOptions(NEWEST, is_server=False)) as lab:
        lab.consul.agent.has_node_write = False
        for name in ("before", "now", "theirs"):
            await lab.seed_pod(name, cluster_uid=THERE if name == "theirs" else HERE)
        for name in ("before", "theirs"):
            await lab.unseed(f"pod--shop--{name}")
        arguments = ("purge", "--yes", "--cluster-uid", HERE)
        code, output = await run(lab, *arguments, **NOWHERE)
        assert (code, left(lab), at(lab, "agent-1")) == (0, set(), {"theirs"}), output
        assert "which the agent does not hold" in output
        assert "the agent left 1 of them in the catalog" in output
        assert "removed 2, refused 0" in output


async def test_nodes_of_lost_agents_are_cleared_too() -> None:
    """Our services there are shown and removed, wherever else they are; those of live agents stay."""
    async with running_lab() as lab:
        ours = our_pod_service("web-1")
        hand_made = Service("hand-made", "hand-made", "192.0.2.8", 1)
        await agent_at(lab, "old", "critical", ours, our_pod_service("theirs", cluster="other"), hand_made)
        await agent_at(lab, "live", "passing", ours)
        code, output = await run(lab, "purge")
        assert (code, WEB in output, "node old, whose agent is gone" in output) == (1, True, True)
        code, output = await run(lab, "purge", "--yes")
        assert (code, "removed 1" in output) == (0, True), output
        assert at(lab) == {"theirs", "hand-made"}
        assert at(lab, "live") == {"web-1"}


@each_release()
async def test_catalogs_node_goes_once_it_is_empty(release: ConsulRelease) -> None:
    """A node of our making goes with the last service; it is shown before, and goes alone too."""
    async with running_lab(ConsulOptions(release)) as lab:
        await lab.cluster.add_pod()
        assert (await run(lab, "sync", CONSUL_BACKEND="catalog"))[0] == 0
        code, output = await run(lab, "purge", CONSUL_BACKEND="catalog")
        assert (code, "node k8s-lab goes too" in output) == (1, True)
        assert lab.consul.catalog.node("k8s-lab") is not None
        code, output = await run(lab, "purge", "--yes", CONSUL_BACKEND="catalog")
        assert (code, "node k8s-lab is removed" in output) == (0, True), output
        assert lab.consul.catalog.node("k8s-lab") is None
        code, output = await run(lab, "purge", "--yes", CONSUL_BACKEND="catalog")
        assert (code, "k8s-lab" in output.replace("cluster lab", "")) == (0, False), output
        former = {"Node": "k8s-lab", "Address": "127.0.0.1", "NodeMeta": {"external-node": "true"}}
        await put(lab, "/v1/catalog/register", former)
        code, output = await run(lab, "purge", "--yes", CONSUL_BACKEND="catalog")
        assert (code, lab.consul.catalog.node("k8s-lab")) == (0, None), output


async def test_node_with_anything_of_others_stays() -> None:
    """Others' services and other nodes than ours are left as they are."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        assert (await run(lab, "sync", CONSUL_BACKEND="catalog"))[0] == 0
        theirs = {"Node": "k8s-lab", "SkipNodeUpdate": True, "Service": {"ID": "db", "Service": "db"}}
        await put(lab, "/v1/catalog/register", theirs)
        code, output = await run(lab, "purge", "--yes", CONSUL_BACKEND="catalog")
        assert (code, "node k8s-lab stays: there are services" in output) == (0, True), output
        assert at(lab, "k8s-lab") == {"db"}
        code, output = await run(lab, "purge", "--yes", CONSUL_BACKEND="catalog")
        assert (code, "node k8s-lab" in output) == (0, False), output
        made_by_hand = {"Node": "shared", "Address": "127.0.0.1", "NodeMeta": {"external-node": "true"}}
        await put(lab, "/v1/catalog/register", made_by_hand)
        settings = {"CONSUL_BACKEND": "catalog", "CONSUL_NODE_NAME": "shared"}
        assert (await run(lab, "sync", **settings))[0] == 0
        code, output = await run(lab, "purge", "--yes", **settings)
        assert (code, "removed 1" in output) == (0, True), output
        assert lab.consul.catalog.node("shared") is not None
