"""The sandbox's Consul and a real one answer the same requests alike."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp

from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_release import AuthMethod, Bearer, ConsulOptions
from support.auth_method import Signer, set_up_method
from support.files import Exchange, SandboxAnswer, ask, differences, parsed
from support.real_servers import REAL, ROOT_TOKEN, RealConsul, real_consul
from support.waiting import PATIENCE, unless_late, until

pytestmark = REAL

SETTLING = 0.2  # seconds in which a real server holds a query, or answers one it must not hold
OWN_TO_A_RUN = (
    *("$.Node.ID:", "[0].Node.ID:", "[0].ID:", "$.Services[2].Port:", "$[0]: '127.0.0.1:"),
    *("$.AccessorID:", "$.SecretID:", "$.Roles[0].ID:", "$.ExpirationTime:", "$.CreateTime:", "$.Hash:"),
)


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
    yield "GET", "/v1/agent/version", None
    yield "PUT", "/v1/agent/service/deregister/none", None
    for path in ("/v1/acl/login", "/v1/acl/logout"):
        yield "POST", path, {"AuthMethod": "jwt", "BearerToken": "x"}


async def test_sandbox_answers_as_a_real_consul() -> None:
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
            if path == "/v1/agent/service/register" and expected.status == 200:
                await until(lambda body=body: _is_in_catalog(session, real, body.get("ID") or body["Name"]))  # type: ignore[misc]
    assert unlike == []


async def _is_in_catalog(session: aiohttp.ClientSession, real: RealConsul, service_id: str) -> bool:
    """Return whether the agent has carried a service, and its node with the node's meta, into the catalog."""
    request = Exchange("GET", f"/v1/catalog/node-services/{real.node}", None, 0, {}, "")
    text = (await ask(session, real.url, request)).text
    return f'"{service_id}"' in text and "consul-network-segment" in text


async def test_index_of_a_nodes_services_is_that_of_the_tables() -> None:
    """A change of another node moves it, and does not wake a query that is held on this node."""
    path = "/v1/catalog/node-services/n"

    async def attempt(stretch: int) -> None:
        async with (
            real_consul() as real,
            Consul(ConsulOptions(node_name=real.node)) as sandbox,
            aiohttp.ClientSession() as session,
        ):
            for url in (real.url, sandbox.url):
                for name in ("n", "other"):
                    body = {"Node": name, "Address": "192.0.2.1", "Service": {"Service": "x"}}
                    await ask(session, url, Exchange("PUT", "/v1/catalog/register", body, 0, {}, ""))
                index = await _index(session, url, path)
                held = asyncio.create_task(
                    ask(session, url, Exchange("GET", f"{path}?index={index}&wait=60s", None, 0, {}, ""))
                )
                await asyncio.sleep(SETTLING * stretch)
                for port, name in ((1, "other"), (2, "n")):
                    assert not held.done()
                    operation = service("set", "x", name, Port=port)
                    await ask(session, url, Exchange("PUT", "/v1/txn", [operation], 0, {}, ""))
                    await asyncio.sleep(SETTLING * stretch)
                    assert await _index(session, url, path) > index
                assert '"Port":2' in (await asyncio.wait_for(held, PATIENCE)).text

    await unless_late(attempt, by=SETTLING / 4)


async def _index(session: aiohttp.ClientSession, url: str, path: str) -> int:
    answer = await ask(session, url, Exchange("GET", path, None, 0, {}, ""))
    return int(answer.headers["X-Consul-Index"])


def logins(bearers: Mapping[Bearer, str]) -> Iterator[tuple[str, Any]]:
    """Yield the query and the body of logins, by the method `jwt` and otherwise."""
    for bearer in (*bearers.values(), "made up", ""):
        yield "", {"AuthMethod": "jwt", "BearerToken": bearer, "Meta": {"component": "registrar"}}
    good = {"AuthMethod": "jwt", "BearerToken": bearers[Bearer.BOUND]}
    yield "", good
    yield "", {**good, "AuthMethod": "other"}
    yield "", {**good, "Namespace": "team"}
    yield "?ns=team", good
    yield "?dc=elsewhere", good
    yield "", {"AuthMethod": 5}


async def test_sandbox_logs_in_and_out_as_a_real_consul() -> None:
    """Logins, their tokens, logouts and the reads afterwards agree with those of a real auth method."""
    unlike: list[str] = []
    signer = Signer()
    bearers = {
        Bearer.BOUND: signer.token(60, team="metrics"),
        Bearer.UNBOUND: signer.token(60, team="other"),
        Bearer.EXPIRED: signer.token(-600, team="metrics"),
    }
    known = {token: bearer for bearer, token in bearers.items()}
    method = AuthMethod(known, "jwt", max_token_ttl=60)
    async with (
        real_consul(acl=True) as real,
        Consul(ConsulOptions(node_name=real.node, token=ROOT_TOKEN, auth_methods=(method,))) as sandbox,
        aiohttp.ClientSession() as session,
    ):
        await set_up_method(real, signer)
        for query, body in logins(bearers):
            request = Exchange("POST", f"/v1/acl/login{query}", body, 0, {}, "")
            expected, actual = [await ask(session, url, request) for url in (real.url, sandbox.url)]
            unlike += [f"{query} {body}: {problem}" for problem in _unlike(expected, actual)]
            if expected.status != 200:
                continue
            tokens = [json.loads(answer.text)["SecretID"] for answer in (expected, actual)]
            for method_name, path in (
                ("GET", "/v1/catalog/service/consul"),
                ("POST", "/v1/acl/logout"),
                ("GET", "/v1/catalog/service/consul"),
                ("POST", "/v1/acl/logout"),
            ):
                last = Exchange(method_name, path, None, 0, {}, "")
                statuses = []
                for url, token in zip((real.url, sandbox.url), tokens, strict=True):
                    async with aiohttp.ClientSession(headers={"X-Consul-Token": token}) as own:
                        answer = await ask(own, url, last)
                    statuses.append((answer.status, answer.text[:3]))
                assert statuses[0] == statuses[1]
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
