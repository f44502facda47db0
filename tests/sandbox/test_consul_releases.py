"""The sandbox's Consul answers as the release that it names: for each release and request an answer.

1.8 is held against a real 1.8.7 in `test_real_consul.py`; the later releases are simulated from Consul's
sources and change log, which each test names.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp
import pytest
from yarl import URL

from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_release import NEWEST, RELEASES, ConsulOptions, ConsulRelease
from support.waiting import PATIENCE, until

ALL = tuple(RELEASES)
TOKEN = "root"
FILTERED = "X-Consul-Results-Filtered-By-ACLs"


class Request(NamedTuple):
    """A request to Consul."""

    method: str
    path: str
    body: Any = None
    token: str = ""


class Answer(NamedTuple):
    """Consul's answer; `status` is 0 where it closed the connection instead."""

    status: int
    text: str
    headers: Mapping[str, str]


@asynccontextmanager
async def running(options: ConsulOptions) -> AsyncIterator[Consul]:
    """Run a Consul whose node `n` has the service `a`."""
    async with Consul(options) as consul:
        body = {"Node": "n", "Address": "192.0.2.1", "Service": {"ID": "a", "Service": "a", "Port": 1}}
        assert (await ask(consul, Request("PUT", "/v1/catalog/register", body, options.token))).status == 200
        yield consul


async def ask(consul: Consul, request: Request, session: aiohttp.ClientSession | None = None) -> Answer:
    """Send a request, over a connection of its own unless there is a session."""
    if session is None:
        async with aiohttp.ClientSession() as own:
            return await ask(consul, request, own)
    headers = {"X-Consul-Token": request.token} if request.token else {}
    url = URL(consul.url + request.path, encoded=True)
    try:
        async with session.request(request.method, url, json=request.body, headers=headers) as response:
            return Answer(response.status, await response.text(), dict(response.headers))
    except aiohttp.ClientConnectionError:
        return Answer(0, "", {})


def txn(*operations: dict[str, Any], token: str = "") -> Request:
    """Return a transaction."""
    return Request("PUT", "/v1/txn", list(operations), token)


def service(verb: str, name: str, service_id: str = "a", **fields: Any) -> dict[str, Any]:
    """Return an operation on a service of node `n`."""
    record = {"ID": service_id, "Service": name, **fields}
    return {"Service": {"Verb": verb, "Node": "n", "Service": record}}


def check(service_id: str, **fields: Any) -> dict[str, Any]:
    """Return an operation that writes a check of a service of node `n`."""
    record = {"Node": "n", "CheckID": f"{service_id}/ready", "ServiceID": service_id, **fields}
    return {"Check": {"Verb": "set", "Check": record}}


def answers(old: tuple[int, str], new: tuple[int, str], *, since: str) -> dict[str, tuple[int, str]]:
    """Return the answers of all releases: `new` from one release on, `old` before."""
    first = ALL.index(since)
    return {release: new if index >= first else old for index, release in enumerate(ALL)}


class Row(NamedTuple):
    """A request, and by release the status and a part of the answer's text; `source` is where it says so."""

    name: str
    source: str
    request: Request
    expected: dict[str, tuple[int, str]]


RENAMED = 'service name does not match existing service name for service ID \\"a\\" on node \\"n\\"'
ROWS = (
    Row(
        "a transaction that renames a service",
        "hashicorp/consul#23560: agent/consul/txn_endpoint.go, vetServiceTxnOp",
        txn(service("set", "b")),
        answers((200, '"Service":"b"'), (409, RENAMED), since="2.1"),
    ),
    Row(
        "a removal under another name",
        "the same: it looks at every operation but get",
        txn(service("delete", "b")),
        answers((200, '"Errors":null'), (409, RENAMED), since="2.1"),
    ),
    Row(
        "a removal and a new name in one transaction",
        "the same: before anything is applied",
        txn(service("delete", "a"), service("set", "b")),
        answers((200, '"Service":"b"'), (409, RENAMED), since="2.1"),
    ),
    Row(
        "a write under the same name",
        "the same",
        txn(service("set", "a", Port=2)),
        answers((200, '"Port":2'), (200, '"Port":2'), since="2.1"),
    ),
    Row(
        "a check before its service, without the service's name",
        "agent/consul/txn_endpoint.go, vetCheckWrite",
        txn(service("set", "b", "b"), check("b")),
        answers((200, '"b/ready"'), (409, 'unknown service ID \\"b\\" for check ID'), since="2.1"),
    ),
    Row(
        "a check before its service, with the service's name",
        "the same",
        txn(service("set", "b", "b"), check("b", ServiceName="b")),
        answers((200, '"b/ready"'), (200, '"b/ready"'), since="2.1"),
    ),
    Row(
        "128 operations",
        "CHANGELOG of 1.14.0, GH-14599: agent/txn_endpoint.go, maxTxnOps",
        txn(*[service("set", "s", f"s{number}") for number in range(128)]),
        answers((413, "too many operations (128 > 64)"), (200, '"s127"'), since="1.15"),
    ),
    Row(
        "129 operations",
        "the same",
        txn(*[service("set", "s", f"s{number}") for number in range(129)]),
        answers((413, "(129 > 64)"), (413, "(129 > 128)"), since="1.15"),
    ),
    Row(
        "the version, without a token",
        "CHANGELOG of 1.14.0; seen as a 404 on 1.8.7",
        Request("GET", "/v1/agent/version"),
        answers((404, ""), (200, '"HumanVersion"'), since="1.15"),
    ),
    Row(
        "the agent's deregistration of an unknown service",
        "agent/acl.go, vetServiceUpdateWithAuthorizer, since 1.12",
        Request("PUT", "/v1/agent/service/deregister/none"),
        answers(
            (200, ""),
            (
                404,
                'Unknown service ID "none". Ensure that the service ID is passed, not the service name.',
            ),
            since="1.15",
        ),
    ),
    Row(
        "an agent registration of more than 512 KiB",
        "CHANGELOG of 2.0 and of Enterprise 2.1",
        Request("PUT", "/v1/agent/service/register", {"Name": "big", "Tags": ["x" * 512 * 1024]}),
        answers((200, ""), (413, "too large"), since="2.1"),
    ),
    Row(
        "a catalog registration of more than 512 KiB",
        "the same",
        Request("PUT", "/v1/catalog/register", {"Node": "n", "Address": "192.0.2.1", "X": "x" * 512 * 1024}),
        answers((200, "true"), (413, "too large"), since="2.1"),
    ),
    Row(
        "a transaction that reads",
        "agent/structs/structs.go, QueryMeta, since 1.11",
        txn(service("get", "a")),
        answers((200, '"ConsistencyLevel":""}'), (200, '"ResultsFilteredByACLs":false}'), since="1.15"),
    ),
)


@pytest.mark.parametrize("release", ALL)
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
async def test_requests_that_releases_answer_differently(row: Row, release: str) -> None:
    """Each row of the table holds; its `source` names the place in Consul's sources or change log."""
    async with running(ConsulOptions(RELEASES[release])) as consul:
        answer = await ask(consul, row.request)
        status, text = row.expected[release]
        assert (answer.status, text in answer.text) == (status, True), answer.text[:500]


async def test_rename_in_two_transactions_is_done_by_every_release() -> None:
    """`delete-cas` of the record that was read, then a create at index 0 (the other half of #23560)."""
    for release in RELEASES.values():
        async with running(ConsulOptions(release)) as consul:
            record = consul.catalog.service("n", "a")
            assert record is not None
            removal = txn(service("delete-cas", "a", ModifyIndex=record.modify_index))
            assert (await ask(consul, removal)).status == 200
            assert (await ask(consul, txn(service("cas", "b", ModifyIndex=0)))).status == 200
            renamed = consul.catalog.service("n", "a")
            assert renamed is not None
            assert renamed.name == "b"


async def test_several_ports_are_answered_since_1_22() -> None:
    """`Ports` with `Port` 0 beside it (CHANGELOG of 1.22.0); earlier releases drop the field."""
    for name, release in RELEASES.items():
        async with running(ConsulOptions(release)) as consul:
            ports = [{"Name": "http", "Port": 8080, "Default": True}, {"Name": "metrics", "Port": 9102}]
            body = {"Name": "multi", "Port": 0, "Ports": ports}
            assert (await ask(consul, Request("PUT", "/v1/agent/service/register", body))).status == 200
            for path in ("/v1/agent/service/multi", "/v1/catalog/service/multi", "/v1/health/service/multi"):
                answer = await ask(consul, Request("GET", path))
                assert ('"Port":9102' in answer.text) is (name in ("1.22", "2.1")), path
                assert re.search(r'"(Service)?Port":0\b', answer.text), path


# ACLs


WITH_ACLS = ConsulOptions(token=TOKEN, blind_tokens=frozenset(("blind",)))


@pytest.mark.parametrize(
    ("token", "marked_by"),
    [("blind", ("1.15", "1.22", "2.1")), ("anonymous", ("1.15",)), ("", ())],
)
@pytest.mark.parametrize("release", ALL)
async def test_filtered_read_is_marked(release: str, token: str, marked_by: tuple[str, ...]) -> None:
    """The header since 1.11, for a token only; from 1.21.5 on not for the anonymous one.

    Sources: CHANGELOG of 1.11.0, agent/http.go, setResultsFilteredByACLs; CHANGELOG of 1.21.5.
    """
    async with running(replace(WITH_ACLS, release=RELEASES[release])) as consul:
        answer = await ask(consul, Request("GET", "/v1/catalog/node-services/n", token=token))
        assert '"Services":null' in answer.text
        assert (FILTERED in answer.headers) is (release in marked_by)


@pytest.mark.parametrize("release", ALL)
async def test_transaction_hides_records_from_a_token_without_rights(release: str) -> None:
    """Reads leave them out; of a mixed transaction only the writes are named as denied.

    Sources: agent/consul/txn_endpoint.go, Read and preCheck, seen on 1.8.7; `ResultsFilteredByACLs` since 1.11.
    """
    async with running(replace(WITH_ACLS, release=RELEASES[release])) as consul:
        answer = await ask(consul, txn(service("get", "a"), token="blind"))
        assert (answer.status, '"Results":[]' in answer.text) == (200, True)
        assert ('"ResultsFilteredByACLs":true' in answer.text) is (release != "1.8")
        answer = await ask(consul, txn(service("get", "a"), service("set", "a"), token="blind"))
        assert (answer.status, '"OpIndex":1' in answer.text) == (409, True)
        assert '"OpIndex":0' not in answer.text
        assert (await ask(consul, txn(service("get", "a"), token="unknown"))).status == 403


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("", "anonymous token lacks permission 'agent:read' on \"agent-1\". The anonymous token is used "),
        ("blind", "' lacks permission 'agent:read' on \"agent-1\""),
    ],
)
@pytest.mark.parametrize("release", ALL)
async def test_denial_names_the_missing_right_since_1_12(release: str, token: str, told: str) -> None:
    """Source: acl/errors.go, PermissionDeniedError; 1.8.7 says "Permission denied" only."""
    async with running(replace(WITH_ACLS, release=RELEASES[release])) as consul:
        answer = await ask(consul, Request("GET", "/v1/agent/self", token=token))
        assert answer.status == 403
        assert answer.text.startswith("Permission denied")
        assert (told in answer.text) is (release != "1.8")


# Blocking queries


async def _touch_other_node(consul: Consul) -> None:
    body = {"Node": "other", "Address": "192.0.2.2", "Service": {"Service": "other"}}
    assert (await ask(consul, Request("PUT", "/v1/catalog/register", body))).status == 200


async def _until_held(consul: Consul) -> None:
    """Wait until Consul holds a query."""
    await until(lambda: bool(consul.catalog._listeners))


@pytest.mark.parametrize("release", ALL)
async def test_index_of_a_nodes_services(release: str) -> None:
    """Before 1.13 it is the tables' index, but a held query wakes for its own node only; then the node's own.

    Sources: agent/consul/state/catalog.go, NodeServices, and hashicorp/consul#12399; 1.8.7 as seen.
    """
    path = "/v1/catalog/node-services/n"
    async with running(ConsulOptions(RELEASES[release])) as consul:
        index = int((await ask(consul, Request("GET", path))).headers["X-Consul-Index"])
        held = asyncio.create_task(ask(consul, Request("GET", f"{path}?index={index}&wait=60s")))
        await _until_held(consul)
        await _touch_other_node(consul)
        later = int((await ask(consul, Request("GET", path))).headers["X-Consul-Index"])
        assert (later > index) is (release == "1.8")
        assert not held.done()
        assert (await ask(consul, txn(service("set", "a", Port=3)))).status == 200
        answer = await asyncio.wait_for(held, PATIENCE)
        assert '"Port":3' in answer.text


@pytest.mark.parametrize("release", ALL)
async def test_index_of_a_node_that_does_not_exist(release: str) -> None:
    """It moves when any node goes, not when one comes, since 1.13 (#12399); before it is the tables' index."""
    request = Request("GET", "/v1/catalog/node-services/none")
    async with running(ConsulOptions(RELEASES[release])) as consul:
        first = int((await ask(consul, request)).headers["X-Consul-Index"])
        await _touch_other_node(consul)
        second = int((await ask(consul, request)).headers["X-Consul-Index"])
        assert (second > first) is (release == "1.8")
        assert (await ask(consul, Request("PUT", "/v1/catalog/deregister", {"Node": "other"}))).status == 200
        third = int((await ask(consul, request)).headers["X-Consul-Index"])
        assert third == consul.catalog.index > second


async def test_answer_after_the_write_timeout_is_lost() -> None:
    """1.22 drops answers after 30 s (#22739), 2.1 after 15 minutes (#23267), the others never."""
    expected = {"1.8": 0.0, "1.15": 0.0, "1.22": 30.0, "2.1": 900.0}
    assert {name: release.longest_answer for name, release in RELEASES.items()} == expected
    hasty = replace(RELEASES["1.22"], longest_answer=0.2)
    async with running(ConsulOptions(hasty)) as consul:
        index = consul.catalog.index_of(("service", "a"))
        path = f"/v1/health/service/a?index={index}"
        assert (await ask(consul, Request("GET", f"{path}&wait=1ms"))).status == 200
        assert (await ask(consul, Request("GET", f"{path}&wait=1s"))).status == 0


# Limits


@pytest.mark.parametrize("release", ALL)
async def test_connection_too_many(release: str) -> None:
    """1.8 closes it, later releases answer 429 first (#8221: agent/http.go since 1.9), without Retry-After."""
    limited = ConsulOptions(RELEASES[release], most_connections=2)
    connector = aiohttp.TCPConnector(limit=2)
    request = Request("GET", "/v1/status/leader")
    async with Consul(limited) as consul, aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(_hold(consul, session) for _ in range(2)))
        answer = await ask(consul, request)
        assert answer.status == (0 if release == "1.8" else 429)
        assert "Retry-After" not in answer.headers
        await connector.close()

        async def is_admitted() -> bool:
            return (await ask(consul, request)).status == 200

        await until(is_admitted)


async def _hold(consul: Consul, session: aiohttp.ClientSession) -> None:
    """Occupy a connection of the session for a moment, and leave it open."""
    path = f"/v1/catalog/services?index={consul.catalog.index}&wait=200ms"
    assert (await ask(consul, Request("GET", path), session)).status == 200


@pytest.mark.parametrize("release", ALL)
async def test_request_limits(release: str) -> None:
    """Since 1.15 reads beyond the rate are 429 and writes 503, both without Retry-After.

    Source: agent/consul/rate/handler.go and the integration test test/…/ratelimit.
    """
    limited = ConsulOptions(RELEASES[release], read_rate=1, write_rate=1)
    has_limits = release != "1.8"
    async with Consul(limited) as consul:
        for request, status in (
            (Request("GET", "/v1/catalog/nodes"), 429),
            (txn(service("get", "a")), 429),
            (txn({"Node": {"Verb": "set", "Node": {"Node": "n", "Address": "192.0.2.1"}}}), 503),
        ):
            found = [await ask(consul, request) for _ in range(4)]
            assert (status in {one.status for one in found}) is has_limits
            assert not any("Retry-After" in one.headers for one in found)


# Set-ups


@pytest.mark.parametrize("release", ALL)
async def test_body_is_taken_without_a_content_type(release: str) -> None:
    """No release refuses a request for its Content-Type; read for 2025-11 in agent/http.go."""
    async with Consul(ConsulOptions(RELEASES[release])) as consul, aiohttp.ClientSession() as session:
        url = f"{consul.url}/v1/agent/service/register"
        async with session.put(url, data=b'{"Name":"x"}', skip_auto_headers=("Content-Type",)) as response:
            assert response.status == 200


@pytest.mark.parametrize("release", ALL)
async def test_service_that_an_agent_may_not_remove_stays_in_the_catalog(release: str) -> None:
    """The agent answers 200 and forgets the service; its record stays until a token may remove it.

    The token that counts is the service's before 1.15 and the agent's since (#16097: agent/local/state.go,
    deleteService); a rotated service token was seen on 1.8.7.
    """
    async with running(replace(WITH_ACLS, release=RELEASES[release])) as consul:
        consul.tokens.create("rotated")
        for name, token in (("one", "rotated"), ("two", TOKEN)):
            body = {"Name": name}
            assert (
                await ask(consul, Request("PUT", "/v1/agent/service/register", body, token))
            ).status == 200
        consul.tokens.revoke("rotated")
        consul.agent.has_node_write = False
        for name in ("one", "two"):
            path = f"/v1/agent/service/deregister/{name}"
            assert (await ask(consul, Request("PUT", path, token=TOKEN))).status == 200
        assert consul.agent.services == {}
        assert _ghosts(consul) == ({"one"} if release == "1.8" else {"one", "two"})
        consul.agent.run_anti_entropy()
        assert "one" in _ghosts(consul)
        consul.agent.has_node_write = True
        consul.agent.restart()
        assert _ghosts(consul) == set()


def _ghosts(consul: Consul) -> set[str]:
    return {one.id for one in consul.catalog.services_of("agent-1")} - {"consul", *consul.agent.services}


@pytest.mark.parametrize("release", ALL)
async def test_wiped_agent_leaves_its_services_in_the_catalog(release: str) -> None:
    """Without `services/` and without rights on its node it can neither know nor remove them."""
    async with Consul(ConsulOptions(RELEASES[release])) as consul:
        assert (await ask(consul, Request("PUT", "/v1/agent/service/register", {"Name": "x"}))).status == 200
        consul.agent.has_node_write = False
        consul.agent.restart(is_wiped=True)
        assert (consul.agent.services, _ghosts(consul)) == ({}, {"x"})


async def test_servers_share_the_catalog_and_not_their_services() -> None:
    """Each server answers `/v1/agent/*` for its own node, and `Config.Server` is true (consul-k8s ≥ 1.0)."""
    async with (
        Consul(ConsulOptions(NEWEST, node_name="server-0")) as first,
        first.peer("server-1") as second,
        first.peer("worker", is_server=False) as agent,
    ):
        assert (await ask(second, Request("PUT", "/v1/agent/service/register", {"Name": "x"}))).status == 200
        assert [set(one.agent.services) for one in (first, second, agent)] == [set(), {"x"}, set()]
        for one, node, is_server in (
            (first, "server-0", "true"),
            (second, "server-1", "true"),
            (agent, "worker", "false"),
        ):
            told = await ask(one, Request("GET", "/v1/agent/self"))
            assert f'"NodeName":"{node}"' in told.text
            assert f'"Server":{is_server}' in told.text
            assert (await ask(one, Request("GET", "/v1/agent/members"))).text.count('"Name"') == 3
            found = await ask(one, Request("GET", "/v1/catalog/service/x"))
            assert found.text.count('"Node":"server-1"') == 1
        path = "/v1/agent/service/deregister/x"
        assert (await ask(first, Request("PUT", path))).status == 404
        assert set(first.catalog.service_tags()) == {"consul", "x"}


@pytest.mark.parametrize("release", RELEASES.values(), ids=ALL)
async def test_held_query_of_one_server_wakes_for_a_write_at_another(release: ConsulRelease) -> None:
    """The catalog is the same wherever it is read or written."""
    async with Consul(ConsulOptions(release)) as first, first.peer("server-1") as second:
        await _touch_other_node(first)
        path = f"/v1/catalog/node-services/other?index={first.catalog.index}&wait=60s"
        held = asyncio.create_task(ask(first, Request("GET", path)))
        await _until_held(first)
        assert not held.done()
        body = {"Node": "other", "Address": "192.0.2.2", "Service": {"Service": "other", "Port": 5}}
        assert (await ask(second, Request("PUT", "/v1/catalog/register", body))).status == 200
        assert '"Port":5' in (await asyncio.wait_for(held, PATIENCE)).text
