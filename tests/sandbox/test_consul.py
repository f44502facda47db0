"""The sandbox's Consul: its catalog, transactions, blocking queries and tokens."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_model import Check, Node, Service
from k8s_consul_registrar.sandbox.consul_release import CONSUL_1_15, SERVICES, ConsulOptions
from k8s_consul_registrar.sandbox.consul_rules import RefusedError
from k8s_consul_registrar.sandbox.consul_state import Catalog
from k8s_consul_registrar.sandbox.consul_txn import run
from support.waiting import PATIENCE, SLACK


class Client:
    """A client of one Consul."""

    def __init__(self, session: aiohttp.ClientSession, root: str) -> None:
        self.session = session
        self.root = root

    async def __call__(
        self, method: str, path: str, body: Any = None, token: str = ""
    ) -> tuple[int, Any, dict[str, str]]:
        """Send a request and return its status, its decoded body and its headers."""
        headers = {"X-Consul-Token": token} if token else {}
        url = URL(self.root + path, encoded=True)
        async with self.session.request(method, url, json=body, headers=headers) as response:
            is_json = response.content_type == "application/json"
            value = await (response.json() if is_json else response.text())
            return response.status, value, dict(response.headers)


@pytest.fixture
def options() -> ConsulOptions:
    """Set Consul up as it comes."""
    return ConsulOptions()


@pytest.fixture
async def consul(options: ConsulOptions) -> AsyncIterator[Consul]:
    """Run a Consul."""
    async with Consul(options) as running:
        yield running


@pytest.fixture
async def client(consul: Consul) -> AsyncIterator[Client]:
    """Open a client."""
    async with aiohttp.ClientSession() as session:
        yield Client(session, consul.url)


def catalog_of(*services: Service) -> Catalog:
    """Return a catalog with a node `n` that has these services."""
    catalog = Catalog()
    with catalog.apply():
        catalog.put_node(Node("n", "127.0.0.1"))
        for service in services:
            catalog.put_service("n", service)
    return catalog


def operation(verb: str, name: str, **fields: Any) -> dict[str, Any]:
    """Return a transaction's operation on the service `name` of node `n`."""
    return {"Service": {"Verb": verb, "Node": "n", "Service": {"ID": name, "Service": name, **fields}}}


def contents(catalog: Catalog) -> list[Any]:
    """Return everything a catalog tells."""
    nodes = catalog.nodes()
    everything: list[Any] = [node.json() for node in nodes]
    everything += [service.json() for node in nodes for service in catalog.services_of(node.name)]
    everything += [check.json() for node in nodes for check in catalog.checks_of(node.name)]
    return [*everything, catalog.index, catalog.service_tags(), catalog.index_of(SERVICES)]


def test_write_that_changes_nothing_moves_no_index() -> None:
    """Writing an equal record leaves its ModifyIndex and the readers' indexes alone."""
    catalog = catalog_of(Service("a", "a", "10.0.0.1"))
    before, index = catalog.service("n", "a"), catalog.index_of(("service", "a"))
    with catalog.apply():
        catalog.put_service("n", Service("a", "a", "10.0.0.1"))
    assert (catalog.service("n", "a"), catalog.index_of(("service", "a"))) == (before, index)
    with catalog.apply():
        catalog.put_service("n", Service("a", "a", "10.0.0.2"))
    changed = catalog.service("n", "a")
    assert before is not None
    assert changed is not None
    assert (changed.create_index, changed.modify_index) == (before.create_index, catalog.index)


def test_changes_touch_their_own_readers() -> None:
    """A service's change is seen by its own readers; the node's or a node check's by all on that node."""
    catalog = catalog_of(Service("a", "a"), Service("b", "b"))
    b = catalog.index_of(("service", "b"))
    with catalog.apply():
        catalog.put_service("n", Service("a", "a", port=1))
    assert catalog.index_of(("service", "a")) == catalog.index
    assert catalog.index_of(("service", "b")) == b
    with catalog.apply():
        catalog.put_check(Check("n", "ready", service_id="a"))
    assert catalog.index_of(("service", "b")) == b
    with catalog.apply():
        catalog.put_check(Check("n", "alive"))
    assert catalog.index_of(("service", "b")) == catalog.index
    with catalog.apply():
        catalog.put_node(Node("N", "127.0.0.2"))
    assert catalog.index_of(("service", "b")) == catalog.index
    assert len(catalog.nodes()) == 1


def test_removals_are_seen_and_take_what_hangs_on_them() -> None:
    """A service goes with its checks, a node with all; readers of what went see their index move."""
    catalog = catalog_of(Service("a", "a"), Service("b", "b"))
    with catalog.apply():
        catalog.put_check(Check("n", "ready", service_id="a"))
        catalog.put_check(Check("n", "alive"))
    with catalog.apply():
        catalog.drop_service("n", "a")
    assert catalog.index_of(("service", "a")) == catalog.index
    assert [check.id for check in catalog.checks_of("n")] == ["alive"]
    assert catalog.service_tags() == {"b": []}
    with catalog.apply():
        catalog.drop_node("n")
    assert (catalog.nodes(), catalog.services_of("n"), catalog.checks_of("n")) == ([], [], [])
    assert catalog.index_of(("node", "n")) == catalog.index


def test_catalog_is_written_only_inside_apply() -> None:
    """A write outside an entry, which could not be undone, is a mistake of the caller."""
    with pytest.raises(RuntimeError):
        Catalog().put_node(Node("n", "127.0.0.1"))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cas", "delete", "delete-cas", "get"]),
        st.sampled_from("abc"),
        st.integers(0, 13),
    ),
    min_size=1,
    max_size=8,
)


@given(STEPS)
def test_failed_transaction_leaves_no_trace(steps: list[tuple[str, str, int]]) -> None:
    """Whatever the operations, a transaction with one that fails changes nothing at all."""
    catalog = catalog_of(Service("a", "a"), Service("b", "b"))
    before = contents(catalog)
    operations = [operation(verb, name, Port=port, ModifyIndex=port) for verb, name, port in steps]
    doomed = [*operations, operation("cas", "z", ModifyIndex=99)]
    result = run(catalog, doomed, "dc1")
    assert result.errors[-1]["OpIndex"] == len(steps)
    assert result.results == []
    assert contents(catalog) == before
    result = run(catalog, operations, "dc1")
    if result.errors:
        assert contents(catalog) == before


@pytest.mark.parametrize(
    ("operations", "problem"),
    [
        ([operation("get", "z")], 'service "z" on node "n" doesn\'t exist'),
        ([operation("cas", "a", ModifyIndex=0)], 'failed to set service "a" on node "n", index is stale'),
        ([operation("delete-cas", "z")], 'failed to delete service "z" on node "n", index is stale'),
        (
            [operation("delete-cas", "a", ModifyIndex=1)],
            'failed to delete service "a" on node "n", index is stale',
        ),
        ([operation("lock", "a")], 'unknown Service verb "lock"'),
        ([operation("set", "a", Address="0.0.0.0")], "Invalid service address"),
        (
            [operation("set", "a", Meta={"a.b": "x"})],
            (
                "Invalid Service Meta for node n and serviceID a: "
                "Couldn't load metadata pair ('a.b', 'x'): Key contains invalid characters"
            ),
        ),
        (
            [{"Check": {"Verb": "set", "Check": {"Node": "n", "CheckID": "c", "ServiceID": "z"}}}],
            "Missing service registration",
        ),
        (
            [{"Node": {"Verb": "cas", "Node": {"Node": "n", "Address": "1.1.1.1", "ModifyIndex": 3}}}],
            'failed to set node "n", index is stale',
        ),
    ],
)
def test_operations_that_fail(operations: list[dict[str, Any]], problem: str) -> None:
    """Each failing operation is named with its place and Consul's words."""
    result = run(catalog_of(Service("a", "a")), [operation("get", "a"), *operations], "dc1")
    assert result.errors == [{"OpIndex": 1, "What": problem}]


def test_cas_with_the_right_index() -> None:
    """`cas` creates with 0 and replaces with the index read; `delete-cas` removes with it."""
    catalog = catalog_of()
    created = run(catalog, [operation("cas", "a", Port=1, ModifyIndex=0)], "dc1")
    index = created.results[0]["Service"]["ModifyIndex"]
    assert index == catalog.index
    replaced = run(catalog, [operation("cas", "a", Port=2, ModifyIndex=index)], "dc1")
    index = replaced.results[0]["Service"]["ModifyIndex"]
    assert run(catalog, [operation("delete-cas", "a", ModifyIndex=index)], "dc1").errors == []
    assert catalog.services_of("n") == []


def test_operations_of_other_kinds_are_refused() -> None:
    """A transaction on the key-value store is not what this catalog has."""
    with pytest.raises(RefusedError):
        run(Catalog(), [{"KV": {"Verb": "set", "Key": "a"}}], "dc1")


async def test_transaction_limits(client: Client) -> None:
    """64 operations are taken and 65 are not, nor is a body over 512 KiB, nor one that is no list."""
    await client("PUT", "/v1/catalog/register", {"Node": "n", "Address": "127.0.0.1"})
    assert (await client("PUT", "/v1/txn", [operation("set", f"s{i}") for i in range(64)]))[0] == 200
    assert (await client("PUT", "/v1/txn", [operation("set", f"s{i}") for i in range(65)]))[0] == 413
    assert (await client("PUT", "/v1/txn", [operation("set", "a", Notes="x" * 512 * 1024)]))[0] == 413
    assert (await client("PUT", "/v1/txn", {"no": "list"}))[0] == 400


@pytest.mark.parametrize("options", [ConsulOptions(CONSUL_1_15)])
async def test_newer_versions_take_larger_transactions(client: Client) -> None:
    """From 1.14 on a transaction may hold 128 operations."""
    await client("PUT", "/v1/catalog/register", {"Node": "n", "Address": "127.0.0.1"})
    assert (await client("PUT", "/v1/txn", [operation("set", f"s{i}") for i in range(128)]))[0] == 200
    assert (await client("PUT", "/v1/txn", [operation("set", f"s{i}") for i in range(129)]))[0] == 413


async def test_blocking_query_waits_for_its_own_service(client: Client) -> None:
    """A query with the last index returns when that service changes, and not for another."""
    await client("PUT", "/v1/agent/service/register", {"Name": "a"})
    _, _, headers = await client("GET", "/v1/health/service/a")
    index = headers["X-Consul-Index"]
    waiting = asyncio.create_task(client("GET", f"/v1/health/service/a?index={index}&wait=600s"))
    await client("PUT", "/v1/agent/service/register", {"Name": "b"})
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await client("PUT", "/v1/agent/service/register", {"Name": "a", "Port": 7})
    _, records, headers = await asyncio.wait_for(waiting, PATIENCE)
    assert records[0]["Service"]["Port"] == 7
    assert int(headers["X-Consul-Index"]) > int(index)


async def test_blocking_query_ends_at_its_time(client: Client) -> None:
    """A query nothing happens for answers the same index after its wait."""
    _, _, headers = await client("GET", "/v1/catalog/services")
    began = time.monotonic()
    _, _, again = await client("GET", f"/v1/catalog/services?index={headers['X-Consul-Index']}&wait=200ms")
    assert 0.2 <= time.monotonic() - began < SLACK
    assert again["X-Consul-Index"] == headers["X-Consul-Index"]
    assert (await client("GET", "/v1/catalog/services?index=x"))[0] == 400
    assert (await client("GET", "/v1/catalog/services?index=1&wait=soon"))[0] == 400


async def test_agents_service_is_awaited_by_hash(client: Client) -> None:
    """A read with the known hash returns when the service changes, or as 404 when it goes."""
    await client("PUT", "/v1/agent/service/register", {"Name": "a"})
    _, record, headers = await client("GET", "/v1/agent/service/a")
    assert record["ContentHash"] == headers["X-Consul-ContentHash"]
    path = f"/v1/agent/service/a?wait=600s&hash={record['ContentHash']}"
    waiting = asyncio.create_task(client("GET", path))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await client("PUT", "/v1/agent/service/deregister/a")
    assert (await asyncio.wait_for(waiting, PATIENCE))[0] == 404


async def test_ids_are_percent_decoded(client: Client, consul: Consul) -> None:
    """An ID with a slash or a percent sign is found in its escaped form."""
    await client("PUT", "/v1/agent/service/register", {"ID": "a/b%41 c", "Name": "x"})
    assert (await client("GET", "/v1/agent/service/a%2Fb%2541%20c"))[0] == 200
    await client("PUT", "/v1/agent/service/deregister/a%2Fb%2541%20c")
    assert consul.agent.services == {}
    assert consul.catalog.service_tags() == {"consul": []}


async def test_agent_wipes_what_others_wrote_on_its_node(client: Client, consul: Consul) -> None:
    """Anti-entropy removes foreign services from the agent's node and restores its own."""
    await client("PUT", "/v1/agent/service/register", {"Name": "own", "Port": 1})
    foreign = {"ID": "foreign", "Service": "foreign"}
    body = {"Node": "agent-1", "Address": "127.0.0.1", "SkipNodeUpdate": True, "Service": foreign}
    assert (await client("PUT", "/v1/catalog/register", body))[0] == 200
    await client("PUT", "/v1/catalog/deregister", {"Node": "agent-1", "ServiceID": "own"})
    assert set(consul.catalog.service_tags()) == {"consul", "foreign"}
    consul.agent.run_anti_entropy()
    assert set(consul.catalog.service_tags()) == {"consul", "own"}


async def test_deregister_without_an_id_removes_the_node(client: Client) -> None:
    """A catalog deregister that names neither service nor check takes the whole node."""
    service = {"ID": "a", "Service": "a", "Meta": {"k": "v"}, "Tags": ["t"]}
    check = {"CheckID": "c", "Name": "c", "Status": "passing", "ServiceID": "a"}
    body = {"Node": "N1", "Address": "10.0.0.1", "Service": service, "Check": check}
    assert (await client("PUT", "/v1/catalog/register", body))[1] is True
    _, instances, _ = await client("GET", "/v1/catalog/service/a?filter=ServiceMeta.k+%3D%3D+%22v%22&tag=T")
    assert [(item["Node"], item["ServiceID"]) for item in instances] == [("N1", "a")]
    assert (await client("GET", "/v1/catalog/service/a?tag=other"))[1] == []
    assert [item["CheckID"] for item in (await client("GET", "/v1/health/node/n1"))[1]] == ["c"]
    assert list((await client("GET", "/v1/catalog/node/n1"))[1]["Services"]) == ["a"]
    assert len((await client("GET", "/v1/health/service/a?passing"))[1]) == 1
    await client("PUT", "/v1/catalog/deregister", {"Node": "n1", "CheckID": "c"})
    assert (await client("GET", "/v1/health/node/n1"))[1] == []
    await client("PUT", "/v1/catalog/deregister", {"Node": "n1"})
    assert (await client("GET", "/v1/catalog/node/n1"))[1] is None
    assert [node["Node"] for node in (await client("GET", "/v1/catalog/nodes"))[1]] == ["agent-1"]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"Address": "1.1.1.1"}, "Must provide node"),
        ({"Node": "n"}, "Must provide address if SkipNodeUpdate is not set"),
        ({"Node": "n", "Address": "1.1.1.1", "Service": {"ID": "a"}}, "Must provide service name with ID"),
        (
            {"Node": "n", "Address": "1.1.1.1", "Service": {"Service": "a", "Address": "::"}},
            "Invalid service address",
        ),
        (
            {"Node": "n", "Address": "1.1.1.1", "Check": {"Name": "c", "ServiceID": "z"}},
            'failed inserting check: Missing service registration on node "n"',
        ),
    ],
)
async def test_catalog_registrations_that_are_refused(
    client: Client, body: dict[str, Any], problem: str
) -> None:
    """A refused registration is a 500 with Consul's words and leaves nothing behind."""
    status, text, _ = await client("PUT", "/v1/catalog/register", body)
    assert (status, text) == (500, problem)
    assert len((await client("GET", "/v1/catalog/nodes"))[1]) == 1


async def test_node_without_services_has_null_for_a_list(client: Client) -> None:
    """As Consul 1.8.7 encodes it: null without services, an empty list where a filter leaves none."""
    await client("PUT", "/v1/catalog/register", {"Node": "n", "Address": "127.0.0.1"})
    assert (await client("GET", "/v1/catalog/node-services/n"))[1]["Services"] is None
    await client("PUT", "/v1/txn", [operation("set", "a")])
    path = "/v1/catalog/node-services/n?filter=Meta.k+%3D%3D+%22v%22"
    assert (await client("GET", path))[1]["Services"] == []


async def test_transactions_that_only_read(client: Client) -> None:
    """They answer with a query's words as well, and an empty one is one of them."""
    empty: list[list[dict[str, Any]]] = [[], [{}]]
    for operations in empty:
        status, answer, headers = await client("PUT", "/v1/txn", operations)
        assert (status, answer["Results"], answer["KnownLeader"]) == (200, [], True)
        assert headers["X-Consul-KnownLeader"] == "true"


async def test_writes_are_recorded_and_reads_are_not(client: Client, consul: Consul) -> None:
    """Tests can see what was asked to change, refused or not, in order."""
    await client("GET", "/v1/agent/services")
    await client("PUT", "/v1/agent/service/register?replace-existing-checks=true", {"Name": "a"})
    await client("PUT", "/v1/txn", [{"Service": {"Verb": "get", "Node": "n", "Service": {"Service": "a"}}}])
    await client("PUT", "/v1/agent/service/deregister/a")
    assert [(write.method, write.path) for write in consul.writes] == [
        ("PUT", "/v1/agent/service/register?replace-existing-checks=true"),
        ("PUT", "/v1/agent/service/deregister/a"),
    ]
    assert consul.writes[0].json() == {"Name": "a"}


async def test_server_describes_itself(client: Client) -> None:
    """Version, members, leader and peers are there; other methods and paths are refused."""
    _, itself, _ = await client("GET", "/v1/agent/self")
    assert (itself["Config"]["Version"], itself["Config"]["NodeName"]) == ("1.8.7", "agent-1")
    assert (await client("GET", "/v1/agent/members"))[1][0]["Name"] == "agent-1"
    assert (await client("GET", "/v1/status/peers"))[1] == [(await client("GET", "/v1/status/leader"))[1]]
    assert (await client("DELETE", "/v1/agent/services"))[0] == 405
    assert (await client("GET", "/v1/agent/services?filter=Nope+%3D%3D+1"))[0] == 500


WITH_ACLS = ConsulOptions(CONSUL_1_15, token="root", blind_tokens=frozenset(("blind",)))


@pytest.mark.parametrize("options", [WITH_ACLS])
async def test_tokens(client: Client, consul: Consul) -> None:
    """The token does all; without it reads are empty, marked for who shows a token, and writes refused."""
    body = {"Name": "a"}
    assert (await client("PUT", "/v1/agent/service/register", body, "root"))[0] == 200
    for path, empty in (
        ("/v1/agent/services", {}),
        ("/v1/catalog/services", {}),
        ("/v1/catalog/node-services/agent-1", {"Node": None, "Services": None}),
        ("/v1/health/service/a", []),
    ):
        assert (await client("GET", path, token="root"))[1] != empty
        for token, mark in (("", None), ("blind", "true")):
            _, value, headers = await client("GET", path, token=token)
            assert value == empty
            assert headers.get("X-Consul-Results-Filtered-By-ACLs") == mark
    for token, text in (("", "Permission denied"), ("blind", "Permission denied"), ("who", "ACL not found")):
        status, told, _ = await client("PUT", "/v1/agent/service/register", body, token)
        assert (status, told.partition(":")[0]) == (403, text)
    status, refusal, _ = await client("PUT", "/v1/txn", [operation("set", "b")], "blind")
    assert (status, refusal["Errors"][0]["OpIndex"]) == (409, 0)
    assert refusal["Errors"][0]["What"].startswith("Permission denied")
    assert set(consul.catalog.service_tags()) == {"a", "consul"}
    assert len(consul.writes) == 1
