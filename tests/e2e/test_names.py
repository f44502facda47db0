"""Names, shards and selection, by registrars that run as processes."""

from support.cluster import SCRAPED, rule
from support.lab import running_lab

POD_RULES = (rule("list watch", "pods"),)


async def test_grouped_names_tags_meta_and_ports() -> None:
    """One name for all Pods, tags with the shard, renamed keys and a further port; then nothing is written."""
    async with (
        running_lab() as lab,
        await lab.registrar(
            POD_SERVICE_NAME="{cluster}-pods",
            SERVICE_TAGS="shard={shard_path},kind={kind}",
            SERVICE_ID_PREFIX="blue-",
            META_KEYS="cluster=cluster_name,metrics_path=path",
            SHARD_PATHS="s1,s2",
            SHARD_STRATEGY="hash",
            ANNOTATION_PREFIX="scrape.example/",
        ) as daemon,
    ):
        annotations = {"scrape.example/scrape": "true", "scrape.example/port": "9102,9103"}
        await lab.cluster.add_pod(annotations=annotations)
        await lab.cluster.add_pod("other", annotations=SCRAPED)
        await daemon.until(lambda: len(lab.services) == 2)
        await daemon.passes(2)
        first, second = (lab.services[f"blue-pod--shop--web-1{suffix}"] for suffix in ("", "--9103"))
        assert {first.name, second.name} == {"lab-pods"}
        assert (first.port, second.port) == (9102, 9103)
        meta = lab.meta("blue-pod--shop--web-1")
        assert (meta["cluster_name"], meta["path"]) == ("lab", "/metrics")
        assert not {"cluster", "metrics_path"} & meta.keys()
        assert sorted(first.tags or ()) == ["kind=pod", f"shard={meta['shard_path']}"]
        assert len(lab.consul.writes) == 2


async def test_changed_meta_keys_rewrite_what_is_there() -> None:
    """A service written under other keys is recognised, rewritten once, and still removed with its object."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        async with await lab.registrar(META_KEYS="cluster=one", SHARD_PATHS="s1,s2") as before:
            await before.until(lambda: "one" in lab.meta("pod--shop--web-1") if lab.services else False)
        shard = lab.meta("pod--shop--web-1")["shard_path"]
        async with await lab.registrar(META_KEYS="cluster=two", SHARD_PATHS="s1,s2") as after:
            await after.until(lambda: "two" in lab.meta("pod--shop--web-1"))
            assert "one" not in lab.meta("pod--shop--web-1")
            assert lab.meta("pod--shop--web-1")["shard_path"] == shard
            await after.passes(2)
            assert len(lab.consul.writes) == 2
            await lab.cluster.delete_pod()
            await after.until(lambda: not lab.services)


async def test_two_instances_with_their_own_namespaces() -> None:
    """Each keeps to its namespace under one name for both, needs nothing but its Pods, and writes once."""
    async with running_lab() as lab:
        await lab.cluster.add_namespace("a")
        await lab.cluster.add_namespace("b")
        for name in ("a", "b"):
            await lab.cluster.add_pod(namespace=name)
        lab.token_file.write_text(await lab.cluster.token(POD_RULES))
        name = "{cluster}-pods"
        async with (
            await lab.registrar(INSTANCE="one", NAMESPACES="a", POD_SERVICE_NAME=name) as one,
            await lab.registrar(INSTANCE="two", NAMESPACES="b", POD_SERVICE_NAME=name) as two,
        ):
            await one.until(lambda: lab.services.keys() == {"pod--a--web-1", "pod--b--web-1"})
            await one.passes(3)
            await two.passes(3)
            assert len(lab.consul.writes) == 2
            assert {service.name for service in lab.services.values()} == {"lab-pods"}
            assert lab.meta("pod--b--web-1")["instance"] == "two"


async def test_name_of_others_and_an_id_of_others_are_reported() -> None:
    """Neither is taken: the name is a counted rejection, the ID a conflict, each by name."""
    async with running_lab() as lab:
        await lab.seed("hand-made", {"team": "x"}, Name="taken")
        await lab.seed("b-node--192.0.2.7", {"team": "x"}, Name="other")
        await lab.cluster.add_pod()
        await lab.cluster.add_node("n", ("InternalIP", "192.0.2.7"))
        async with await lab.registrar(POD_SERVICE_NAME="taken", SERVICE_ID_PREFIX="b-") as daemon:
            assert "used by a service" in str(await daemon.until_said("rejected", "name_taken"))
            await daemon.until_said("conflict: the service ID is not ours to write", "b-node--192.0.2.7")
            await daemon.measures('rejections{reason="name_taken"}', 1)
            assert not lab.consul.writes
