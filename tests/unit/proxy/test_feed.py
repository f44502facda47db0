"""The proxy's feed on a Store: which values it serves, since when it is behind, and what it logs."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.credentials import ClientIdentity, StoredCredentials
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import Kind, Node, NodeAddress, ObjectKey, Source, Undecodable
from k8s_consul_registrar.proxy.feed import FeedRules, NodeFeed, PodFeed
from k8s_consul_registrar.proxy.nodes import Nodes
from k8s_consul_registrar.proxy.routes import Pods
from support.builders import make_node, make_pod
from support.waiting import Clock

pytestmark = pytest.mark.both_loops

ONE, TWO = Source(Kind.POD, "one"), Source(Kind.POD, "two")
ANNOTATED = {"prometheus.io/scrape": "true", "prometheus.io/port": "9102"}


@pytest.fixture
def clock() -> Clock:
    """Return a clock."""
    return Clock(100.0)


def rules(clock: Callable[[], float]) -> FeedRules:
    """Return rules under which values are stale after a minute."""
    return FeedRules(Timing(gather=0.0), stale_after=60.0, allow_loopback=True, clock=clock)


def client() -> KubeClient:
    """Return a client that is never used."""
    return KubeClient(Access("http://127.0.0.1:1", StoredCredentials(ClientIdentity())), Timing())


@pytest.fixture
def feed(clock: Clock) -> Iterator[PodFeed]:
    """Return a feed of two namespaces' Pods."""
    with capture_logs():
        yield PodFeed(client(), Pods(), rules(clock), sources=(ONE, TWO), annotation_prefix="prometheus.io")


def lists(feed: PodFeed, source: Source, *items: Item) -> None:
    """Write one complete list to the feed's Store."""
    feed.store.start_listing(source, 0.0)
    for item in items:
        feed.store.put(source, item)
    feed.store.finish_listing(source, 1.0)


def pod(name: str, namespace: str) -> Item:
    """Return a Pod that is scraped."""
    return make_pod(name, namespace, annotations=ANNOTATED)


def test_feed_serves_once_every_source_was_listed(feed: PodFeed, clock: Clock) -> None:
    """One namespace of two is not enough; until then it is behind since its beginning."""
    lists(feed, ONE, pod("a", "one"))
    clock.now = 107.0
    assert (feed.has_known, feed.is_serving, feed.behind_seconds) == (False, False, 7.0)
    lists(feed, TWO)
    assert (feed.has_known, feed.is_serving, feed.behind_seconds) == (True, True, 0.0)


def test_feed_keeps_what_it_knew_until_it_is_stale(feed: PodFeed, clock: Clock) -> None:
    """A failure alone changes nothing that is served; a resumed watch makes it level again."""
    lists(feed, ONE, pod("a", "one"))
    lists(feed, TWO)
    clock.now = 200.0
    with capture_logs() as logs:
        feed.store.fail(ONE, "cut off", "unreachable")
        clock.now = 250.0
        feed.store.fail(ONE, "still cut off", "busy")
        assert (feed.problem, feed.behind_seconds, feed.is_serving) == ("still cut off", 50.0, True)
        clock.now = 261.0
        feed.on_trust()
        assert (feed.is_trusted, feed.is_serving, feed.has_known) == (False, False, True)
        feed.store.resume(ONE, "9")
    assert (feed.problem, feed.behind_seconds, feed.is_trusted) == ("", 0.0, True)
    assert feed.is_serving
    assert [entry["event"] for entry in logs] == ["cannot follow", "cannot follow", "followed again"]


def test_feed_object_that_cannot_be_read_keeps_its_value(feed: PodFeed) -> None:
    """One that changed into something odd is served as it was."""
    lists(feed, ONE, pod("a", "one"), pod("b", "one"))
    before = list(feed.store.values())
    feed.store.put(ONE, Undecodable(Kind.POD, ObjectKey(Kind.POD, "one", "a"), "odd"))
    feed.store.put(ONE, Undecodable(Kind.POD, ObjectKey(Kind.POD, "one", "c"), "odd"))
    assert list(feed.store.values()) == before


async def test_node_feed_keeps_a_node_that_cannot_be_read(clock: Clock) -> None:
    """Its kubelet is reached as before."""
    nodes, told = Nodes(), []
    feed = NodeFeed(client(), nodes, rules(clock), changed=lambda: told.append(1), verify_node_name=False)
    source = Source(Kind.NODE)
    feed.store.start_listing(source, 0.0)
    feed.store.put(source, make_node("node-a"))
    assert not nodes.known
    feed.store.finish_listing(source, 1.0)
    assert set(nodes.current.by_name) == {"node-a"}
    feed.store.start_listing(source, 2.0)
    feed.store.put(source, Undecodable(Kind.NODE, ObjectKey(Kind.NODE, "", "node-a"), "odd"))
    feed.store.finish_listing(source, 3.0)
    assert set(nodes.current.by_name) == {"node-a"}
    assert told == [1]


def listed_nodes(feed: NodeFeed, *nodes: Node) -> None:
    """Write one complete list of Nodes to the feed's Store."""
    feed.store.start_listing(Source(Kind.NODE), 0.0)
    for node in nodes:
        feed.store.put(Source(Kind.NODE), node)
    feed.store.finish_listing(Source(Kind.NODE), 1.0)


async def test_node_feed_contested_address_is_logged_once_and_again_when_the_nodes_change(
    clock: Clock,
) -> None:
    """A claim on another Node's address is a fault of one of the two, and no line at each new table."""
    nodes = Nodes()
    feed = NodeFeed(client(), nodes, rules(clock), changed=lambda: None, verify_node_name=False)
    victim, evil, worse = (
        replace(make_node(name), addresses=tuple(NodeAddress("InternalIP", one) for one in addresses))
        for name, addresses in (
            ("victim", ["192.0.2.1"]),
            ("evil", ["192.0.2.2", "192.0.2.1"]),
            ("worse", ["192.0.2.3", "192.0.2.1"]),
        )
    )
    with capture_logs() as logs:
        for found in ([victim, evil], [victim, evil, make_node("other")], [victim, evil, worse]):
            listed_nodes(feed, *found)
    problems = [one["problem"] for one in logs if one["event"] == "several Nodes claim one address"]
    assert problems == ["victim has it, not evil", "victim has it, not evil, worse"]
    assert len(nodes.current.contests) == 1


@pytest.mark.parametrize(
    "url", ["https://localhost:{port}", "https://127.0.0.1:{port}", "http://[::1]:{port}"]
)
async def test_node_feed_api_server_is_resolved_and_never_dialled(url: str, clock: Clock) -> None:
    """Its URL may name it; a kubelet at the same address and another port is reached."""
    nodes = Nodes()
    feed = NodeFeed(
        client(),
        nodes,
        replace(rules(clock), allow_loopback=True),
        changed=lambda: None,
        verify_node_name=False,
        api_server=url.format(port=6443),
    )
    await feed._resolve_api_server()
    address = "::1" if "[" in url else "127.0.0.1"
    at_port = [
        replace(make_node(f"port-{port}"), addresses=(NodeAddress("InternalIP", address),), kubelet_port=port)
        for port in (6443, 10250)
    ]
    listed_nodes(feed, *at_port)
    assert set(nodes.current.by_name) == {"port-10250"}
