"""Logins at Consul by an auth method: a token for as long as we run, which is kept in memory only."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.asyncio_tools import end_tasks
from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.consul.access import ConsulAccess
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import decode
from k8s_consul_registrar.errors import (
    AccessError,
    ConsulBusy,
    ConsulError,
    ConsulTokenUnknown,
    ConsulUnreachable,
)
from k8s_consul_registrar.rotating import LoadStatus, token_file
from k8s_consul_registrar.telemetry import get_logger

METHOD = "CONSUL_LOGIN_AUTH_METHOD"
BEARER_FILE = "CONSUL_LOGIN_BEARER_TOKEN_FILE"
LOGIN, LOGOUT = "/v1/acl/login", "/v1/acl/logout"
# A token is replaced after this share of its life.
RENEW_AFTER = 0.8
# Seconds in which a server may not know a new token yet: only one of them has answered the login.
SETTLES = 5.0
# Seconds of life below which tokens are hardly meant so: Consul itself allows no less than a minute.
SHORT_LIFE = 30.0
# Seconds that the logout may take.
LOGOUT_WITHIN = 2.0
# The beginning of a bearer token, in characters, by which a copy of it is recognised in a text.
TELLING = 16

log = get_logger("login")


@dataclass(frozen=True, slots=True)
class AuthMethod:
    """An auth method and what to show it; `datacenter` and `namespace` are the auth method's, empty for our own."""

    name: str
    bearer_file: str
    meta: Mapping[str, str] = field(default_factory=dict)
    datacenter: str = ""
    namespace: str = ""

    @property
    def params(self) -> dict[str, str]:
        """The parameters of a login and of its logout."""
        params = {"dc": self.datacenter, "ns": self.namespace}
        return {key: value for key, value in params.items() if value}


class _Answer(msgspec.Struct):
    secret: str = msgspec.field(name="SecretID")
    created: datetime | None = msgspec.field(name="CreateTime", default=None)
    expires: datetime | None = msgspec.field(name="ExpirationTime", default=None)

    @property
    def life(self) -> float:
        """The seconds that the token lives, infinite where it does not expire; by Consul's clock alone if it can be."""
        if self.expires is None:
            return math.inf
        return (self.expires - (self.created or datetime.now(UTC))).total_seconds()


_answers = msgspec.json.Decoder(_Answer)


class _Held(NamedTuple):
    """A token, and the moments of its life in monotonic seconds."""

    secret: str
    began: float
    renew_at: float
    ends_at: float


class Login:
    """The token of an auth method: of the first login, and of a new one before it expires or if it is unknown.

    There is one login at a time. While a token lives, requests do not wait for the next one, and where that
    login fails it is used to its end. Requests that show the token before the present one are not disturbed: it
    is left to expire.
    """

    version = 0  # tokens that follow each other have the same rights

    def __init__(
        self,
        method: AuthMethod,
        access: ConsulAccess,
        timing: Timing,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it, without a login yet; the token of `access` is not shown. Raises an `AccessError` if the bearer token cannot be read."""
        self._method = method
        self._access = access
        self._timing = timing
        self._clock = clock
        self._bearer = token_file(Path(method.bearer_file), BEARER_FILE, clock=clock)
        self._status = LoadStatus(
            METHOD,
            failing="no new login; the token of the one before stays in use",
            working="logged in to Consul",
        )
        self._held: _Held | None = None
        self._login: asyncio.Task[_Held | ConsulError] | None = None
        self._retry_at = -math.inf
        self._delays = delays(timing.retry_first, timing.retry_cap)
        self._has_warned = False

    async def token(self) -> str:
        """Return the token, after a login if there is none; raises a `ConsulError` of that login."""
        held, now = self._held, self._clock()
        if held is not None and now < held.ends_at:
            if now >= max(held.renew_at, self._retry_at):
                self._begin()
            return held.secret
        outcome = await asyncio.shield(self._begin())
        if isinstance(outcome, ConsulError):
            raise outcome
        return outcome.secret

    def is_unknown(self, token: str) -> bool:
        """Note that Consul does not know a token; return True if another attempt is worth while.

        A new token is shown again: the server that was asked may learn of it in a moment.
        """
        held = self._held
        if held is not None and held.secret == token and self._clock() - held.began >= SETTLES:
            self._held = None
        return bool(token)

    async def close(self) -> None:
        """Log out, if that takes no more than a moment; then the token is left to expire."""
        await end_tasks([self._login] if self._login is not None else [])
        held, self._held = self._held, None
        if held is None or self._clock() >= held.ends_at:
            return
        try:
            async with (
                asyncio.timeout(LOGOUT_WITHIN),
                self._client(held.secret) as client,
            ):
                await client.request("POST", LOGOUT, params=self._method.params)
        except (ConsulError, TimeoutError) as error:
            problem = str(error) or f"no answer within {LOGOUT_WITHIN:g} s"
            log.info("not logged out of Consul; the token is left to expire", problem=problem)
        else:
            log.info("logged out of Consul")

    def _client(self, token: str) -> ConsulClient:
        """Return a client that shows a token, empty for none; it is not open yet."""
        access = replace(self._access, token=token, token_file="")
        return ConsulClient(access, self._timing, connections=1)

    def _begin(self) -> "asyncio.Task[_Held | ConsulError]":
        """Return the login that is under way, or begin one."""
        if self._login is None or self._login.done():
            self._login = asyncio.create_task(self._log_in())
        return self._login

    async def _log_in(self) -> _Held | ConsulError:
        """Log in; an error is returned, since there may be nothing that waits for it."""
        began = self._clock()
        try:
            answer = await self._ask()
        except ConsulError as error:
            held = self._held
            self._retry_at = self._clock() + next(self._delays)
            self._status.failed(str(error), has_value=held is not None and self._clock() < held.ends_at)
            return error
        self._retry_at = -math.inf
        self._delays = delays(self._timing.retry_first, self._timing.retry_cap)
        self._status.succeeded(is_new=self._held is None)
        self._warn_of(answer.life)
        self._held = _Held(answer.secret, began, began + RENEW_AFTER * answer.life, began + answer.life)
        return self._held

    async def _ask(self) -> _Answer:
        """Send one login; raises a `ConsulError` that is an outage, since nothing can be done without a token."""
        try:
            bearer = self._bearer.current()
        except AccessError as error:
            raise ConsulTokenUnknown(str(error)) from None
        asked = {"AuthMethod": self._method.name, "BearerToken": bearer, "Meta": self._method.meta}
        try:
            async with self._client("") as client:
                body = msgspec.json.encode(asked)
                answer = await client.request(
                    "POST", LOGIN, params=self._method.params, body=body, is_read=True
                )
            issued = decode(_answers, answer.body, LOGIN)
        except ConsulUnreachable:
            raise
        except ConsulBusy as error:
            raise ConsulBusy(self._refusal(error, bearer), error.retry_after, error.status) from None
        except ConsulError as error:
            raise ConsulTokenUnknown(self._refusal(error, bearer)) from None
        if not issued.secret or issued.life <= 0:
            raise ConsulTokenUnknown(
                f"auth method {self._method.name} gives a token that has expired already"
            )
        return issued

    def _refusal(self, error: ConsulError, bearer: str) -> str:
        """Return why there was no login; a text of Consul's may quote the bearer token."""
        text, copy, _ = str(error).partition(bearer[:TELLING])
        return f"no login by auth method {self._method.name} ({METHOD}, {BEARER_FILE}): {text}{'…' if copy else ''}"

    def _warn_of(self, life: float) -> None:
        if life < SHORT_LIFE and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the tokens of this auth method expire very soon", method=self._method.name, seconds=life
            )
