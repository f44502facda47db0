"""The sandbox's Consul and a real one answer the same requests alike."""

import asyncio
from collections.abc import Iterator
from typing import Any

import aiohttp

from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_http import ConsulOptions
from support.files import Exchange, SandboxAnswer, ask, differences, parsed
from support.real_servers import REAL, real_consul

pytestmark = REAL

SETTLING = 0.2  # seconds a real agent is given to carry a service into the catalog
OWN_TO_A_RUN = ("$.Node.ID:", "[0].Node.ID:", "[0].ID:", "$.Services[2].Port:", "$[0]: '127.0.0.1:")


def service(verb: str, name: str, node: str = "n", **fields: Any) -> dict[str, Any]:
    """Return a transaction's operation on a service."""
    return {"Service": {"Verb": verb, "Node": node, "Service": {"ID": name, "Service": name, **fields}}}


def check(verb: str, check_id: str, **fields: Any) -> dict[str, Any]:
    """Return a transaction's operation on a check of node `m`."""
    return {"Check": {"Verb": verb, "Check": {"Node": "m", "CheckID": check_id, **fields}}}


def node(verb: str, name: str, **fields: Any) -> dict[str, Any]:
    """Return a transaction's operation on a node."""
    return {"Node": {"Verb": verb, "Node": {"Node": name, **fields}}}


REGISTRATIONS: tuple[Any, ...] = (
    {"Name": "a", "Tags": ["y", "x"], "Address": "host.example", "Port": 1},
    {"Name": "b", "ID": "b1"},
    {"Name": "c", "Meta": {"consul-x": "1"}},
    {"Name": "c", "Meta": {"": "1"}},
    {"Name": "c", "Meta": {"x" * 129: "1"}},
    {"Name": "c", "Address": "::"},
    {"Name": "c", "Tags": "x"},
    {"Name": 5},
)
AGENT_READS = (
    "/v1/agent/services",
    "/v1/agent/services?filter=Service+%21%3D+%22a%22",
    "/v1/agent/services?filter=Meta.zz+%21%3D+%22a%22",
    "/v1/agent/services?filter=Meta.zz+%3D%3D+%22a%22",
    "/v1/agent/services?filter=%22x%22+in+Tags",
    "/v1/agent/services?filter=Nope+%3D%3D+%22a%22",
    "/v1/agent/service/b1",
    "/v1/catalog/service/a",
    "/v1/catalog/service/zz",
    "/v1/health/service/b",
    "/v1/health/service/zz",
    "/v1/catalog/node/zz",
    "/v1/catalog/node-services/test-node",
    "/v1/health/state/critical?filter=CheckID+%3D%3D+%22serfHealth%22",
    "/v1/health/state/passing?filter=CheckID+%3D%3D+%22serfHealth%22",
    "/v1/health/state/any?filter=Nope+%3D%3D+%22a%22",
)
CATALOG_REGISTRATIONS: tuple[Any, ...] = (
    {"Node": "n"},
    {"Address": "1.1.1.1"},
    {"Node": "n", "Address": "1.1.1.1", "NodeMeta": {"a/b": "1"}},
    {"Node": "n", "Address": "1.1.1.1", "Service": {"ID": "s"}},
    {"Node": "n", "Address": "1.1.1.1", "Service": {"Service": "s", "Address": "::"}},
    {"Node": "n", "Address": "1.1.1.1", "Service": {"Service": "s", "Meta": {"a.b": "1"}}},
    {"Node": "n", "SkipNodeUpdate": True, "Service": {"Service": "s", "ID": "s1", "Tags": ["t"]}},
    {"Node": "n", "SkipNodeUpdate": True, "Check": {"CheckID": "c", "Name": "cc", "ServiceID": "s1"}},
    {"Node": "n", "Address": "1.1.1.1", "Check": {"CheckID": "c2", "Name": "cc", "ServiceID": "nope"}},
    {"Node": "empty", "Address": "1.1.1.2"},
)
# Not /v1/catalog/services: the real one lists the tags of a service in no order.
CATALOG_READS = (
    "/v1/catalog/node/N",
    "/v1/catalog/node-services/N",
    "/v1/catalog/node-services/empty",
    "/v1/catalog/node-services/n?filter=Meta.zz+%3D%3D+%22a%22",
    "/v1/health/node/n",
    "/v1/health/service/s",
    "/v1/health/service/s?passing",
    "/v1/catalog/service/s?tag=t",
    "/v1/catalog/service/s?filter=ServiceMeta.k+%3D%3D+%22v%22",
)
TRANSACTIONS: tuple[Any, ...] = (
    [service("set", "x"), service("get", "x")],
    [service("get", "x")],
    [service("get", "zz")],
    [{"Service": {"Verb": "get", "Node": "n", "Service": {"ID": "x"}}}],
    [{"Service": {"Verb": "get", "Node": "n", "Service": {"ID": "zz"}}}],
    [{"Service": {"Verb": "set", "Node": "n", "Service": {"ID": "x"}}}],
    [service("cas", "x", ModifyIndex=0)],
    [service("cas", "new", ModifyIndex=7)],
    [service("cas", "new", ModifyIndex=0)],
    [service("delete-cas", "zz", ModifyIndex=7)],
    [service("set", "q"), service("delete-cas", "x", ModifyIndex=1), service("cas", "x", ModifyIndex=1)],
    [service("lock", "x")],
    [service("set", "x", Address="0.0.0.0")],
    [service("set", "x", Meta={"a.b": "1"})],
    [service("set", "x", Weights={"Passing": 0, "Warning": 0})],
    [node("set", "m", Address="1.2.3.4", Meta={"a": "b"}), service("set", "z", "m")],
    [node("cas", "m", Address="1.2.3.5", ModifyIndex=1)],
    [node("get", "mm")],
    [check("set", "k", ServiceID="nope")],
    [check("get", "k")],
    [check("set", "k", Name="k")],
    [{}],
    [],
    [service("delete", "z", "m"), node("delete", "m")],
)
DEREGISTRATIONS: tuple[Any, ...] = ({"Node": "n", "ServiceID": "zz"}, {"ServiceID": "zz"}, {"Node": "n"})


def conversation() -> Iterator[tuple[str, str, Any]]:
    """Yield the requests in order: each part reads what the one before has written."""
    for body in REGISTRATIONS:
        yield "PUT", "/v1/agent/service/register", body
    for path in AGENT_READS:
        yield "GET", path, None
    for body in CATALOG_REGISTRATIONS:
        yield "PUT", "/v1/catalog/register", body
    for path in CATALOG_READS:
        yield "GET", path, None
    for body in TRANSACTIONS:
        yield "PUT", "/v1/txn", body
    for body in DEREGISTRATIONS:
        yield "PUT", "/v1/catalog/deregister", body
    for path in ("/v1/catalog/node/n", "/v1/status/peers", "/v1/catalog/services?index=x"):
        yield "GET", path, None
    yield "DELETE", "/v1/agent/services", None


async def test_the_sandbox_answers_as_a_real_consul() -> None:
    """Status, type and every JSON value agree over the whole conversation; indexes agree in type."""
    unlike: list[str] = []
    async with (
        real_consul() as real,
        Consul(ConsulOptions(node_name=real.node)) as sandbox,
        aiohttp.ClientSession() as session,
    ):
        for method, path, body in conversation():
            request = Exchange(method, path, body, 0, {}, "")
            expected = await ask(session, real.url, request)
            actual = await ask(session, sandbox.url, request)
            unlike += [f"{method} {path} {body}: {problem}" for problem in _unlike(expected, actual)]
            if path == "/v1/agent/service/register":
                await asyncio.sleep(SETTLING)
    assert unlike == []


def _unlike(expected: SandboxAnswer, actual: SandboxAnswer) -> Iterator[str]:
    if expected.status != actual.status:
        yield f"status {expected.status} became {actual.status}: {actual.text}"
    kinds = [answer.headers.get("Content-Type") for answer in (expected, actual)]
    if kinds[0] != kinds[1] and expected.text:
        yield f"type {kinds[0]} became {kinds[1]}"
    for problem in differences(parsed(expected), parsed(actual)):
        if not any(own in problem for own in OWN_TO_A_RUN):
            yield problem
