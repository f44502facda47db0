"""The registrar's view of sources that were not listed, and of services that are kept."""

from collections.abc import Callable

import pytest

from k8s_consul_registrar.admin.target_groups import parse_sd_query
from k8s_consul_registrar.admin.view import Census, TargetState
from k8s_consul_registrar.model import Kind, Source
from support.builders import make_pod, our_pod_service
from support.controller_lab import Seen
from support.memory import NAMESPACES, NODES, PODS

A, B = Source(Kind.POD, "a"), Source(Kind.POD, "b")


@pytest.mark.parametrize(
    ("query", "missing"),
    [
        ("", {NODES, B}),
        ("kind=pod", {B}),
        ("kind=node", {NODES}),
        ("kind=pod&kind=node", {NODES, B}),
        ("namespace=a", set()),
        ("namespace=b", {B}),
        ("namespace=a&namespace=b", {B}),
        ("namespace=elsewhere", set()),
        ("kind=node&namespace=b", set()),
        ("namespace=", {NODES}),
        ("shard_path=s1", {NODES, B}),
        ("kind=pod&namespace=a&shard_path=s1", set()),
    ],
)
def test_request_concerns_the_sources_that_can_show_what_it_asks_for(
    query: str, missing: set[Source]
) -> None:
    """Sources that were never listed are named where the request includes them, and nowhere else."""
    seen = Seen(sources=(NODES, A, B))
    seen.lab.cluster.put_list([make_pod("web-1", "a")], A)
    seen.lab.cluster.store.fail(B, "may not list pods of b: 403", "forbidden")
    pairs = [(name, value) for name, _, value in (part.partition("=") for part in query.split("&") if part)]
    text = seen.view.unlisted(parse_sd_query(pairs).scope)
    assert {source for source in (NODES, A, B) if str(source) in text} == missing
    assert ("403" in text) is (B in missing)


def test_source_that_shows_every_namespace_concerns_each() -> None:
    """With Pods of all namespaces in one source, any namespace needs it, and Nodes do not."""
    seen = Seen(sources=(NODES, Source(Kind.POD)))
    seen.lab.cluster.put_list([], NODES)
    assert seen.view.unlisted(parse_sd_query([("namespace", "shop")]).scope)
    assert seen.view.unlisted(parse_sd_query([("kind", "node")]).scope) == ""


@pytest.mark.parametrize(
    ("query", "is_missing"),
    [
        ([], True),
        ([("kind", "pod")], True),
        ([("kind", "node")], False),
        ([("namespace", "shop")], True),
        ([("namespace", "")], False),
    ],
)
def test_namespaces_concern_every_target_in_one(query: list[tuple[str, str]], is_missing: bool) -> None:
    """Without their labels a target would be incomplete; a Node is in none."""
    seen = Seen(sources=(NAMESPACES, NODES, PODS))
    for source in (NODES, PODS):
        seen.lab.cluster.put_list([], source)
    assert ("namespaces are not listed yet" in seen.view.unlisted(parse_sd_query(query).scope)) is is_missing


def test_source_that_was_listed_once_stays_known() -> None:
    """Neither a failure, nor catching up, nor another list that has begun makes it unlisted again."""
    seen = Seen()
    store = seen.lab.cluster.store
    seen.lab.cluster.put_list([make_pod("web-1")])
    disturbances: tuple[Callable[[], None], ...] = (
        lambda: store.fail(Source(Kind.POD), "no connection", "unreachable"),
        lambda: store.resume(Source(Kind.POD), "7"),
        lambda: store.start_listing(Source(Kind.POD), 1.0),
    )
    for disturb in disturbances:
        disturb()
        assert seen.view.unlisted() == ""
        assert list(seen.targets()) == ["web-1"]


async def test_services_held_by_the_brake_after_a_restart_are_kept_targets() -> None:
    """Services of an earlier run that a mass removal would take are kept targets, as Consul holds them."""
    seen = Seen()
    for number in range(10):
        seen.lab.consul.put_by_hand(our_pod_service(f"p{number}", zone="z1", shard_path="s2"))
    census = Census(seen.view, dict)
    async with seen.lab.running():
        seen.lab.cluster.put_list([make_pod(f"p{number}") for number in range(4)])
        await seen.lab.until_so(lambda: bool(seen.view.status.held))
        await seen.lab.until_so(lambda: seen.lab.queue.is_drained)
        kept = [one for one in seen.view.targets() if one.state is TargetState.KEPT]
        assert {one.key.name for one in kept} == {f"p{number}" for number in range(4, 10)}
        assert {one.service.value("zone") for one in kept} == {"z1"}
        assert {one.service.value("shard_path") for one in kept} == {"s2"}
        assert {(one.service.address, one.service.port) for one in kept} == {("198.51.100.10", 9102)}
        await census.refresh()
        assert census.figures().targets["pod", "kept"] == 6
