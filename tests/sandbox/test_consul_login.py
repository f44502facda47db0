"""Logins at the sandbox's Consul by an auth method, and the tokens they give."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

import aiohttp
import pytest

from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_acl import Tokens
from k8s_consul_registrar.sandbox.consul_release import (
    CONSUL_1_8,
    NEWEST,
    RELEASES,
    AuthMethod,
    Bearer,
    ConsulOptions,
)
from k8s_consul_registrar.sandbox.consul_rules import HttpError
from support.waiting import until

METHOD = AuthMethod({"good": Bearer.BOUND, "stranger": Bearer.UNBOUND, "stale": Bearer.EXPIRED})
OPTIONS = ConsulOptions(NEWEST, token="root", auth_methods=(METHOD,))
GOOD = {"AuthMethod": "kubernetes", "BearerToken": "good", "Meta": {"component": "registrar"}}
READ = "/v1/catalog/node-services/agent-1"


class Client:
    """A client of one Consul."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def __call__(self, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
        """Send a request and return the status and the JSON, or the text."""
        headers = {"X-Consul-Token": token} if token else {}
        async with self._session.request(method, path, json=body, headers=headers) as response:
            is_json = response.content_type == "application/json"
            return response.status, await (response.json() if is_json else response.text())

    async def login(self) -> dict[str, Any]:
        """Log in, and return the token."""
        status, token = await self("POST", "/v1/acl/login", GOOD)
        assert status == 200
        assert isinstance(token, dict)
        return token


@asynccontextmanager
async def consul_with(options: ConsulOptions) -> AsyncIterator[Client]:
    """Run a Consul, and open a client without a token."""
    async with Consul(options) as consul, aiohttp.ClientSession(consul.url) as session:
        yield Client(session)


@pytest.mark.parametrize("release", RELEASES.values(), ids=list(RELEASES))
async def test_login_gives_a_token_until_the_logout(release: Any) -> None:
    """The token has the rights of its role; after the logout Consul does not know it, nor a second logout."""
    async with consul_with(replace(OPTIONS, release=release)) as client:
        token = await client.login()
        assert token["AuthMethod"] == "kubernetes"
        assert token["Local"] is True
        assert token["Description"] == 'token created via login: {"component":"registrar"}'
        assert "ExpirationTime" not in token
        secret = token["SecretID"]
        assert (await client("GET", READ, token=secret))[1]["Services"]
        assert await client("POST", "/v1/acl/logout", token=secret) == (200, True)
        assert await client("GET", READ, token=secret) == (403, "ACL not found")
        assert (await client("PUT", "/v1/txn", [], secret))[0] == 403
        assert await client("POST", "/v1/acl/logout", token=secret) == (403, "ACL not found")


async def test_each_login_gives_another_token() -> None:
    """A logout of one leaves the other."""
    async with consul_with(OPTIONS) as client:
        first, second = [(await client.login())["SecretID"] for _ in range(2)]
        assert (await client("POST", "/v1/acl/logout", token=first))[0] == 200
        assert (await client("GET", READ, token=second))[0] == 200


async def test_token_expires_at_the_time_that_the_login_names() -> None:
    """`MaxTokenTTL` after the login Consul answers 403 "ACL not found"; a new login helps."""
    method = replace(METHOD, max_token_ttl=0.3)
    async with consul_with(replace(OPTIONS, auth_methods=(method,))) as client:
        token = await client.login()
        named = [datetime.fromisoformat(token[field]) for field in ("CreateTime", "ExpirationTime")]
        assert 0.29 < (named[1] - named[0]).total_seconds() < 0.31

        async def is_expired() -> bool:
            return await client("GET", READ, token=token["SecretID"]) == (403, "ACL not found")

        await until(is_expired)
        assert (await client("POST", "/v1/acl/logout", token=token["SecretID"]))[0] == 403
        assert (await client.login())["SecretID"] != token["SecretID"]


def test_expiry_is_judged_by_the_clock() -> None:
    """One moment before its expiry the token works, at its expiry it does not."""
    now = 1000.0
    options = replace(OPTIONS, auth_methods=(replace(METHOD, max_token_ttl=60),))
    tokens = Tokens(options, clock=lambda: now)
    secret = tokens.login(b'{"AuthMethod":"kubernetes","BearerToken":"good"}')["SecretID"]
    now = 1059.9
    assert tokens.has_all(secret)
    now = 1060.0
    assert not tokens.is_known(secret)
    with pytest.raises(HttpError, match="ACL not found"):
        tokens.has_all(secret)


REFUSALS = [
    ({"AuthMethod": "other", "BearerToken": "good"}, "", 403, 'ACL not found: auth method "other" not found'),
    ({"BearerToken": "good"}, "", 403, 'ACL not found: auth method "" not found'),
    ({"AuthMethod": "kubernetes", "BearerToken": "stranger"}, "", 403, "Permission denied"),
    ({"AuthMethod": "kubernetes", "BearerToken": "stale"}, "", 500, "token is expired (exp)"),
    ({"AuthMethod": "kubernetes", "BearerToken": "made up"}, "", 500, "error parsing token: "),
    ({"AuthMethod": "kubernetes", "BearerToken": ""}, "", 500, "missing jwt"),
    ({"AuthMethod": "kubernetes"}, "", 500, "missing jwt"),
    (GOOD, "?dc=elsewhere", 500, "No path to datacenter"),
    (GOOD, "?ns=team", 400, 'Invalid query parameter: "ns" - Namespaces are a Consul Enterprise feature'),
    ({**GOOD, "Namespace": "team"}, "", 400, 'json: unknown field "Namespace"'),
    (
        {"AuthMethod": 5},
        "",
        400,
        "json: cannot unmarshal number into Go struct field ACLLoginParams.AuthMethod",
    ),
    ([], "", 400, "Failed to decode request body: json: cannot unmarshal array"),
]


@pytest.mark.parametrize(("body", "query", "status", "text"), REFUSALS)
async def test_logins_that_are_refused(body: Any, query: str, status: int, text: str) -> None:
    """Each refusal has the status and the text that a real Consul gives; nothing is logged in.

    Source: the statuses and texts of 1.8.7 as compared in `test_real_consul.py`; the name of an unknown
    method is said since 1.11 (agent/consul/auth/login.go, `%w: auth method %q not found`).
    """
    async with consul_with(OPTIONS) as client:
        told = await client("POST", f"/v1/acl/login{query}", body)
        assert told[0] == status
        assert text in told[1]
        assert "good" not in told[1]


async def test_texts_of_1_8() -> None:
    """It names neither the auth method nor the reason of a logout's refusal, and says "Bad request"."""
    async with consul_with(replace(OPTIONS, release=CONSUL_1_8)) as client:
        unknown = {"AuthMethod": "other", "BearerToken": "good"}
        assert await client("POST", "/v1/acl/login", unknown) == (403, "ACL not found")
        assert await client("POST", "/v1/acl/logout", token="root") == (403, "Permission denied")
        assert (await client("POST", "/v1/acl/login?ns=x", GOOD))[1].startswith("Bad request: Invalid query")


async def test_logout_needs_a_token_of_a_login() -> None:
    """Without a token, with an unknown one and with one made otherwise it is refused."""
    async with consul_with(OPTIONS) as client:
        assert await client("POST", "/v1/acl/logout") == (403, "ACL not found")
        assert await client("POST", "/v1/acl/logout", token="unknown") == (403, "ACL not found")
        told = await client("POST", "/v1/acl/logout", token="root")
        assert told == (403, "Permission denied: token wasn't created via login")
        assert (await client("GET", READ, token="root"))[0] == 200


async def test_without_acls_there_is_no_login() -> None:
    """Both endpoints answer 401 "ACL support disabled"."""
    async with consul_with(ConsulOptions(NEWEST, auth_methods=(METHOD,))) as client:
        for path in ("/v1/acl/login", "/v1/acl/logout"):
            assert await client("POST", path, GOOD) == (401, "ACL support disabled")


async def test_login_at_one_server_is_known_at_all() -> None:
    """The tokens are the cluster's."""
    async with (
        Consul(OPTIONS) as first,
        first.peer("server-1") as second,
        aiohttp.ClientSession(first.url) as one,
        aiohttp.ClientSession(second.url) as other,
    ):
        secret = (await Client(one).login())["SecretID"]
        assert (await Client(other)("GET", READ, token=secret))[0] == 200
        assert (await Client(other)("POST", "/v1/acl/logout", token=secret))[0] == 200
        assert (await Client(one)("GET", READ, token=secret))[0] == 403
