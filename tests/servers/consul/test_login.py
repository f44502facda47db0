"""Logins by an auth method: one token for all requests, replaced in time, and every way in which a login fails."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress
from k8s_consul_registrar.consul.client import ConsulClient, Fence
from k8s_consul_registrar.consul.login import LOGIN, LOGOUT, SETTLES, AuthMethod, Login
from k8s_consul_registrar.errors import (
    AccessError,
    ConsulBusy,
    ConsulError,
    ConsulFenced,
    ConsulTokenUnknown,
    ConsulUnreachable,
)
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_release import AuthMethod as SandboxMethod
from k8s_consul_registrar.sandbox.consul_release import (
    Bearer,
    ConsulOptions,
    ConsulRelease,
)
from support.lab import each_release
from support.scripted import IMPATIENT, QUICK, serving
from support.waiting import PATIENCE, Clock, until

BEARER = "eyJhbGciOiJSUzI1NiJ9.bearer-of-the-registrar.c2lnbmF0dXJl"
READ = "/v1/status/leader"
UNKNOWN = "rpc error making call: ACL not found"


def put(file: Path, content: str | None) -> None:
    """Write a file, or remove it for None."""
    if content is None:
        file.unlink()
    else:
        file.write_text(content)


class FakeConsul:
    """A Consul that gives tokens `token-1`, `token-2` and so on, and answers everything else to those it knows.

    `life` is that of its tokens in seconds, 0 without end. `refusals` are answers to the next logins. While `gate`
    is not set, logins and logouts hang, and without `is_quiet` so do blocking queries.
    """

    def __init__(self) -> None:
        self.life = 0.0
        self.refusals: deque[tuple[int, str]] = deque()
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_quiet = asyncio.Event()
        self.known: set[str] = set()
        self.logins: list[dict[str, Any]] = []
        self.logouts: list[str] = []
        self.shown: list[str] = []
        self.queries: list[dict[str, str]] = []

    async def answer(self, request: web.Request) -> web.Response:
        """Answer one request."""
        token = request.headers.get("X-Consul-Token", "")
        if request.path in (LOGIN, LOGOUT):
            self.queries.append(dict(request.query))
            if request.path == LOGIN:
                self.logins.append(await request.json())
            await self.gate.wait()
        if request.path == LOGIN:
            return self._login()
        if request.path == LOGOUT:
            self.logouts.append(token)
            self.known.discard(token)
            return web.json_response(True)
        self.shown.append(token)
        if token not in self.known:
            return web.Response(status=403, text=UNKNOWN)
        if "index" in request.query:
            await self.is_quiet.wait()
        return web.json_response("127.0.0.1:8300")

    def _login(self) -> web.Response:
        if self.refusals:
            status, text = self.refusals.popleft()
            return web.Response(status=status, text=text)
        secret = f"token-{len(self.logins)}"
        self.known.add(secret)
        created = datetime(2020, 1, 1, tzinfo=UTC)  # its clock is years behind ours
        body = {"AccessorID": "a", "SecretID": secret, "CreateTime": created.isoformat()}
        if self.life:
            body["ExpirationTime"] = (created + timedelta(seconds=self.life)).isoformat()
        return web.json_response(body)


class World:
    """A registrar's client that logs in at a fake Consul, with a clock that a test moves."""

    def __init__(self, consul: FakeConsul, client: ConsulClient, login: Login, clock: Clock) -> None:
        self.consul, self.client, self.login, self.clock = consul, client, login, clock

    async def read(self) -> None:
        """Send one request."""
        await self.client.request("GET", READ)


@pytest.fixture
def bearer(tmp_path: Path) -> Path:
    """Return a file with a bearer token."""
    file = tmp_path / "bearer"
    file.write_text(BEARER)
    return file


@asynccontextmanager
async def logging_in(
    bearer: Path,
    *,
    timing: Timing = QUICK,
    fence: Fence | None = None,
    prepare: Callable[[FakeConsul], None] = lambda _: None,
    **method: Any,
) -> AsyncIterator[World]:
    """Run a fake Consul and open a client that logs in there; it logs out at the end."""
    consul, clock = FakeConsul(), Clock()
    prepare(consul)
    async with serving(consul.answer) as url:
        access = ConsulAccess(ConsulAddress(url))
        login = Login(
            AuthMethod("kubernetes", str(bearer), **method),
            access,
            timing,
            clock=clock,
        )
        try:
            async with ConsulClient(access, timing, fence=fence, tokens=login) as client:
                yield World(consul, client, login, clock)
        finally:
            consul.gate.set()
            await login.close()


async def test_one_login_serves_every_request(bearer: Path) -> None:
    """Requests that arrive together wait for one login; its body and parameters are those of the settings."""
    async with logging_in(bearer, meta={"pod": "ns/name"}, datacenter="dc1", namespace="team") as world:
        await asyncio.gather(*(world.read() for _ in range(20)))
        await world.read()
        consul = world.consul
        assert consul.logins == [
            {"AuthMethod": "kubernetes", "BearerToken": BEARER, "Meta": {"pod": "ns/name"}}
        ]
        assert consul.queries == [{"dc": "dc1", "ns": "team"}]
        assert set(consul.shown) == {"token-1"}
        async with world.client.single() as single:
            await single.request("GET", READ)
        assert len(consul.logins) == 1
        await world.login.close()
        assert (consul.logouts, consul.queries[-1]) == (["token-1"], {"dc": "dc1", "ns": "team"})


async def test_token_is_replaced_before_it_expires(bearer: Path) -> None:
    """By Consul's own clock; the old one serves until the new one is there, and is left to expire."""

    def hour(consul: FakeConsul) -> None:
        consul.life = 3600.0

    async with logging_in(bearer, prepare=hour) as world:
        await world.read()
        world.clock.skip(2000)
        await world.read()
        assert len(world.consul.logins) == 1
        world.clock.skip(1000)
        world.consul.gate.clear()
        await world.read()
        await until(lambda: len(world.consul.logins) == 2)
        await world.read()
        assert set(world.consul.shown) == {"token-1"}
        world.consul.gate.set()

        async def is_new() -> bool:
            await world.read()
            return world.consul.shown[-1] == "token-2"

        await until(is_new)
        assert (len(world.consul.logins), world.consul.logouts) == (2, [])


async def test_request_in_flight_keeps_its_token(bearer: Path) -> None:
    """A blocking query that was sent with the token before ends as it would have."""

    def hour(consul: FakeConsul) -> None:
        consul.life = 3600.0

    async with logging_in(bearer, prepare=hour) as world:
        await world.read()
        query = asyncio.create_task(world.client.request("GET", READ, params={"index": "1"}, wait=1))
        await until(lambda: len(world.consul.shown) == 2)
        world.clock.skip(3000)
        await world.read()
        await until(lambda: len(world.consul.logins) == 2)
        world.consul.is_quiet.set()
        assert (await query).status == 200
        assert world.consul.logouts == []


async def test_failing_renewal_leaves_the_token_in_use_to_its_end(bearer: Path) -> None:
    """It is logged once and tried again; after the end of the token requests fail with the reason."""

    def hour(consul: FakeConsul) -> None:
        consul.life = 3600.0

    async with logging_in(bearer, prepare=hour) as world:
        await world.read()
        world.consul.refusals.extend([(403, "Permission denied")] * 100)
        world.clock.skip(3000)
        with capture_logs() as logs:
            for _ in range(3):
                tried = len(world.consul.logins)

                async def is_tried_again(tried: int = tried) -> bool:
                    world.clock.skip(1)
                    await world.read()
                    return len(world.consul.logins) > tried

                await until(is_tried_again)
            await until(lambda: bool(logs))
        assert [line["event"] for line in logs] == ["no new login; the token of the one before stays in use"]
        assert set(world.consul.shown) == {"token-1"}
        world.clock.skip(3600)
        with pytest.raises(ConsulTokenUnknown, match="no login by auth method kubernetes"):
            await world.read()
        world.consul.refusals.clear()
        await world.read()
        assert world.consul.shown[-1] not in ("", "token-1")


async def test_unknown_token_is_replaced_and_the_request_sent_again(bearer: Path) -> None:
    """As after a reset of the ACLs: whole answers and streamed ones alike, with one login."""
    async with logging_in(bearer) as world:
        await world.read()
        world.clock.skip(SETTLES)
        world.consul.known.clear()
        await asyncio.gather(*(world.read() for _ in range(5)))
        assert len(world.consul.logins) == 2
        world.clock.skip(SETTLES)
        world.consul.known.clear()
        async with world.client.stream(READ) as answer:
            assert b"".join([chunk async for chunk in answer.chunks]) == b'"127.0.0.1:8300"'
        assert len(world.consul.logins) == 3
        assert world.client.health.is_up


async def test_new_token_that_a_server_does_not_know_yet_is_shown_again(bearer: Path) -> None:
    """A follower learns of it a moment later; that takes no second login."""
    async with logging_in(bearer) as world:
        await world.read()
        world.consul.known.clear()
        reading = asyncio.create_task(world.read())
        await until(lambda: len(world.consul.shown) > 1)
        world.consul.known.add("token-1")
        await reading
        assert len(world.consul.logins) == 1


async def test_token_that_is_never_known_is_an_outage_without_a_storm_of_logins(bearer: Path) -> None:
    """Each request ends after a few attempts, and a token is shown for a while before the next login."""
    async with logging_in(bearer) as world:
        await world.read()
        world.clock.skip(SETTLES)
        for _ in range(5):
            world.consul.known.clear()
            world.consul.refusals.clear()
            with pytest.raises(ConsulTokenUnknown):
                await _forgetting(world)
        assert len(world.consul.logins) == 2
        assert not world.client.health.is_up


async def _forgetting(world: World) -> None:
    """Send a request while Consul forgets every token at once."""
    reading = asyncio.create_task(world.read())
    while not reading.done():
        world.consul.known.clear()
        await asyncio.sleep(0)
    await reading


@pytest.mark.parametrize("life", [-5.0, -0.001])
async def test_token_that_has_expired_already_is_none(bearer: Path, life: float) -> None:
    """It would be replaced at every request."""

    def gone(consul: FakeConsul) -> None:
        consul.life = life

    async with logging_in(bearer, prepare=gone) as world:
        with pytest.raises(ConsulTokenUnknown, match="gives a token that has expired already"):
            await world.read()
        assert world.consul.shown == []


async def test_token_that_expires_in_a_second_works_with_a_warning(bearer: Path) -> None:
    """There is a login each time it is about to end, and no more; the warning comes once."""

    def second(consul: FakeConsul) -> None:
        consul.life = 1.0

    async with logging_in(bearer, prepare=second) as world:
        with capture_logs() as logs:
            for _ in range(4):
                for _ in range(10):
                    await world.read()
                world.clock.skip(1.0)
        assert len(world.consul.logins) == 4
        said = [line["event"] for line in logs]
        assert said.count("the tokens of this auth method expire very soon") == 1


async def test_login_that_hangs_runs_out_of_time(bearer: Path) -> None:
    """All requests that wait for it fail with it; the end of the process does not wait."""
    async with logging_in(bearer, timing=IMPATIENT) as world:
        world.consul.gate.clear()
        outcomes = await asyncio.gather(*(world.read() for _ in range(3)), return_exceptions=True)
        assert [type(one) for one in outcomes] == [ConsulUnreachable] * 3
        assert len(world.consul.logins) == 1
        reading = asyncio.create_task(world.read())
        await until(lambda: len(world.consul.logins) == 2)
        reading.cancel()
        await asyncio.wait_for(world.login.close(), PATIENCE)


async def test_logout_that_hangs_is_given_up(bearer: Path) -> None:
    """It has a moment; then the token is left to expire, and that is said."""
    async with logging_in(bearer) as world:
        await world.read()
        world.consul.gate.clear()
        with capture_logs() as logs:
            await asyncio.wait_for(world.login.close(), PATIENCE)
        assert logs[-1]["event"] == "not logged out of Consul; the token is left to expire"


async def test_write_after_a_slow_login_is_fenced(bearer: Path) -> None:
    """The lead ended while the login was waited for: the clock is read after it, and nothing is sent."""
    left = [10.0]
    async with logging_in(bearer, fence=Fence(lambda: left[0], 1)) as world:
        world.consul.gate.clear()
        writing = asyncio.create_task(world.client.request("PUT", "/v1/txn", body=b"[]"))
        await until(lambda: len(world.consul.logins) == 1)
        left[0] = 0.0
        world.consul.gate.set()
        with pytest.raises(ConsulFenced):
            await writing
        assert world.consul.shown == []


REFUSALS = [
    ((403, "ACL not found"), ConsulTokenUnknown),
    ((403, 'ACL not found: auth method "kubernetes" not found'), ConsulTokenUnknown),
    ((403, "rpc error making call: Permission denied"), ConsulTokenUnknown),
    ((401, "ACL support disabled"), ConsulTokenUnknown),
    ((400, 'Invalid query parameter: "ns" - Namespaces are a Consul Enterprise feature'), ConsulTokenUnknown),
    ((404, "<html>not a Consul</html>"), ConsulTokenUnknown),
    ((200, "<html>not a Consul</html>"), ConsulTokenUnknown),
    ((200, '{"SecretID": ""}'), ConsulTokenUnknown),
    ((200, '{"SecretID": "s", "ExpirationTime": "soon"}'), ConsulTokenUnknown),
    (
        (500, "error validating claims: square/go-jose/jwt: validation failed, token is expired (exp)"),
        ConsulBusy,
    ),
    ((503, "rate limit exceeded"), ConsulBusy),
]


@pytest.mark.parametrize(("refusal", "kind"), REFUSALS)
async def test_refused_login_is_an_outage_that_names_the_settings(
    bearer: Path, refusal: tuple[int, str], kind: type[ConsulError]
) -> None:
    """Nothing can be done without a token; the request itself is never sent, and the next attempt logs in again."""
    async with logging_in(bearer, prepare=lambda consul: consul.refusals.append(refusal)) as world:
        with pytest.raises(kind, match="kubernetes"):
            await world.read()
        assert (world.consul.shown, world.client.health.is_up) == ([], False)
        await world.read()
        assert world.client.health.is_up


async def test_bearer_token_in_a_refusal_is_not_shown(bearer: Path) -> None:
    """A server may quote what it was sent, whole or cut off."""
    quoting = [(500, f"bad JWT {BEARER}"), (500, f"bad JWT {'x' * 150} {BEARER}"), (403, BEARER)]
    async with logging_in(bearer, prepare=lambda consul: consul.refusals.extend(quoting)) as world:
        for _ in quoting:
            with pytest.raises(ConsulError) as raised:
                await world.read()
            assert BEARER[:20] not in str(raised.value)
            assert BEARER not in repr(raised.value.__cause__)


@pytest.mark.parametrize("content", [None, b"", b" \n", b"two\nlines\n"])
async def test_bearer_file_that_cannot_be_used_ends_the_start(tmp_path: Path, content: bytes | None) -> None:
    """The error names the setting."""
    file = tmp_path / "bearer"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(AccessError, match="CONSUL_LOGIN_BEARER_TOKEN_FILE"):
        async with logging_in(file):
            pass


async def test_bearer_file_is_read_again_and_one_that_is_lost_leaves_the_last_token(bearer: Path) -> None:
    """Kubernetes replaces projected tokens while we run."""
    async with logging_in(bearer) as world:
        await world.read()
        for step in ("another", None, ""):
            put(bearer, step)
            world.clock.skip(SETTLES + 5)
            world.consul.known.clear()
            await world.read()
        assert [one["BearerToken"] for one in world.consul.logins] == [
            BEARER,
            "another",
            "another",
            "another",
        ]


@each_release()
async def test_login_at_each_release(release: ConsulRelease, bearer: Path) -> None:
    """The sandbox's texts of an unknown method, an unbound and an expired bearer token, then a login and logout."""
    method = SandboxMethod({BEARER: Bearer.BOUND, "stranger": Bearer.UNBOUND, "stale": Bearer.EXPIRED})
    options = ConsulOptions(release, token="root", auth_methods=(method,))
    async with Consul(options) as consul:
        access = ConsulAccess(ConsulAddress(consul.url))

        def login_as(name: str, shown: str) -> Login:
            bearer.write_text(shown)
            return Login(AuthMethod(name, str(bearer)), access, QUICK)

        for name, shown in (("nomad", BEARER), ("kubernetes", "stranger"), ("kubernetes", "stale")):
            with pytest.raises(ConsulError, match=f"no login by auth method {name}"):
                await login_as(name, shown).token()
        login = login_as("kubernetes", BEARER)
        secret = await login.token()
        assert consul.tokens.is_known(secret)
        await login.close()
        assert not consul.tokens.is_known(secret)
