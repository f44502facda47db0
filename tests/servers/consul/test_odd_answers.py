"""Answers that no Consul gives, for everything we read: an error of Consul's, and never a traceback."""

import contextlib
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from k8s_consul_registrar.consul.acl import Right, read_leader, read_own_node, read_service_names, rights
from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import decode_agent_services, decode_service
from k8s_consul_registrar.consul.health import MOST_INDEX, index_of
from k8s_consul_registrar.consul.lost_agents import LostAgents
from k8s_consul_registrar.errors import ConsulError, ConsulRefused
from support.builders import our_pod_service
from support.real_servers import held
from support.scripted import client_of, serving

SERVICE = our_pod_service("a")


CALLS: dict[str, Callable[[ConsulClient], Awaitable[object]]] = {
    "agent services": lambda client: held(AgentRegistry(client)),
    "catalog services": lambda client: held(CatalogRegistry(client, "n")),
    "catalog register": lambda client: CatalogRegistry(client, "n").register([SERVICE]),
    "catalog deregister": lambda client: CatalogRegistry(client, "n").deregister([SERVICE]),
    "catalog lookup": lambda client: anext(CatalogRegistry(client, "n").lookup(["a"])),
    "name": lambda client: CatalogRegistry(client, "n").is_name_taken("a"),
    "failing agents": lambda client: LostAgents(client).failing(),
    "own node": read_own_node,
    "leader": read_leader,
    "names": read_service_names,
    "rights": lambda client: rights(client, [Right("node", "n", "read")]),
}
DEEP = b"[" * 100_000 + b"]" * 100_000
BODIES = {
    "empty": b"",
    "html": b"<html>",
    "number": b"5",
    "text in a list": b'["x"]',
    "deep": DEEP,
    "deep in an object": b'{"Config":' + DEEP + b',"Results":' + DEEP + b',"Services":[{"ID":"a","x":' + DEEP,
    "no utf-8": b'{"a":"\xff"}',
    "wrong types": b'{"Config":{"NodeName":5},"Services":{"a":5},"Results":[5],"Errors":"x","":{}}',
    "negative index": b'{"Results":[{"Service":{"ID":"a","ModifyIndex":-1}}],"Errors":null}',
    "huge index": b'{"Results":[{"Service":{"ID":"a","ModifyIndex":99999999999999999999}}]}',
    "operation of another": b'{"Results":null,"Errors":[{"OpIndex":-1,"What":"x"}]}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_odd_answer_raises_nothing_but_consuls_errors(
    call: Callable[[ConsulClient], Awaitable[object]], body: bytes
) -> None:
    """Deep JSON, absurd indexes and wrong types; some are readable as far as anything is read of them."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body, headers={"X-Consul-Index": "\u0663"})

    async with serving(answer) as url, client_of(url) as client:
        with contextlib.suppress(ConsulError, StopAsyncIteration):
            await call(client)


@pytest.mark.parametrize("body", [b"{}", b'{"a":1}', b"null", b"[]", DEEP])
@pytest.mark.parametrize("call", ["catalog register", "catalog deregister", "catalog lookup"])
async def test_odd_answer_to_a_transaction_is_no_success(call: str, body: bytes) -> None:
    """A 200 of something that is not Consul writes and removes nothing."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body)

    async with serving(answer) as url, client_of(url) as client:
        with pytest.raises(ConsulError):
            await CALLS[call](client)


@pytest.mark.parametrize("body", [b"{}", b'{"Config":{}}', b'{"Config":{"NodeName":""}}', b"null"])
@pytest.mark.parametrize(
    "call", ["agent services", "catalog services", "own node", "leader", "failing agents"]
)
async def test_server_that_answers_everything_alike_is_no_consul(call: str, body: bytes) -> None:
    """A 200 to whatever is asked is an error: it would pass for a Consul without services, to be filled."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body)

    async with serving(answer) as url, client_of(url) as client:
        problem = "no Consul|not what Consul sends|is not shown"
        with pytest.raises(ConsulError, match=problem):
            await CALLS[call](client)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("7", 7),
        ("-7", 0),
        ("\u0663", 0),
        ("\u00b2", 0),
        ("7.5", 0),
        ("0x7", 0),
        (" 7", 0),
        ("", 0),
        (str(MOST_INDEX), MOST_INDEX),
        (str(MOST_INDEX + 1), 0),
        ("9" * 5000, 0),
    ],
)
def test_absurd_index_is_none(text: str, index: int) -> None:
    """Only what Raft could count is an index."""
    assert index_of({"X-Consul-Index": text}) == index


@pytest.mark.parametrize("index", ["-1", "99999999999999999999", "1.5", '"7"'])
def test_record_with_an_absurd_index_is_not_ours(index: str) -> None:
    """-1 would otherwise mean that the catalog lacks it."""
    body = f'{{"ID":"a","Service":"a","Meta":{{"managed_by":"x"}},"ModifyIndex":{index}}}'
    service = decode_service("a", body.encode())
    assert (service.name, service.meta, service.index) == ("", (), 0)


def test_deep_record_is_not_ours() -> None:
    """It holds its ID, and nothing else is read of it."""
    assert decode_service("a", b'{"Meta":' + DEEP + b"}").name == ""
    with pytest.raises(ConsulRefused):
        list(decode_agent_services(b'{"":{}}'))
