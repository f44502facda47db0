"""Credentials for the API server: fixed, in files read again as they rotate, or printed by an exec plugin.

Exec plugins are Kubernetes' "client-go credential plugins", versions v1 and v1beta1 of
client.authentication.k8s.io: programs that print a token or a certificate.
"""

import asyncio
import base64
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.responses import clipped
from k8s_consul_registrar.rotating import LoadStatus, Rotating, clean_token, contained, token_file
from k8s_consul_registrar.tls import KeyPair, checked

# client-go re-reads token files once a minute (transport/token_source.go).
REREAD_SECONDS = 60.0

API_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
TIME_LIMIT = 30.0  # seconds
# Seconds between two runs of a plugin that does not give what is needed.
FLOOR = 5.0
# An identity that is about to expire is not used: the request may take a while to arrive.
LEEWAY = 10.0
OUTPUT_LIMIT = 1 << 20
KILL_LIMIT = 1.0


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """Proof of our identity in one request; any part may be absent."""

    token: str = field(default="", repr=False)
    basic: str = field(default="", repr=False)
    pair: KeyPair | None = field(default=None, repr=False)

    def headers(self) -> Mapping[str, str]:
        """Return the headers to send."""
        if self.token:
            return {"Authorization": f"Bearer {self.token}"}
        return {"Authorization": f"Basic {self.basic}"} if self.basic else {}


class Credentials(Protocol):
    """Source of the identity of the next request."""

    async def identity(self) -> ClientIdentity:
        """Return the current identity; raises AccessError if there is none."""

    def rejected(self, identity: ClientIdentity) -> None:
        """Note that the server answered 401 to this identity: the next one should be fresh."""

    async def aclose(self) -> None:
        """End the processes that get an identity; a later `identity` begins again."""


class StoredCredentials:
    """An identity that is given, with a token or a certificate in files, each read again as it rotates."""

    def __init__(
        self,
        identity: ClientIdentity | None = None,
        *,
        token: Rotating[str] | None = None,
        pair: Rotating[KeyPair] | None = None,
    ) -> None:
        self._identity = identity or ClientIdentity()
        self._token = token
        self._pair = pair

    async def identity(self) -> ClientIdentity:
        """Return the identity; it is the same object while nothing of it changed."""
        now = self._identity
        token = now.token if self._token is None else self._token.current()
        pair = now.pair if self._pair is None else self._pair.current()
        if token != now.token or pair is not now.pair:
            self._identity = replace(now, token=token, pair=pair)
        return self._identity

    def rejected(self, identity: ClientIdentity) -> None:
        """Have the token's file read again by the next call."""
        if self._token is not None and identity is self._identity:
            self._token.expire()

    async def aclose(self) -> None:
        """Do nothing: nothing runs."""


def rotating_token(
    path: Path, setting: str, *, of: str = "kubeconfig tokenFile", clock: Callable[[], float] = time.monotonic
) -> Rotating[str]:
    """Return the token in a file, read again when it changes, and every minute.

    `of` names the setting in metrics, `setting` the file's origin in error texts; `clock` returns seconds.
    Raises AccessError if the file holds no token.
    """
    return token_file(path, setting, of=of, max_age=REREAD_SECONDS, clock=clock)


def basic_credentials(username: str, password: str) -> str:
    """Return the value of a Basic Authorization header (RFC 7617, UTF-8)."""
    return base64.b64encode(f"{username}:{password}".encode()).decode()


@dataclass(frozen=True, slots=True)
class ExecPlugin:
    """The command of a plugin: `command` with a slash is a path, else looked up in `env`'s PATH.

    `env` is the plugin's whole environment, `cluster` the cluster as it receives it (None unless it asks),
    `origin` names its place in the kubeconfig.
    """

    api_version: str
    command: str
    origin: str
    args: tuple[str, ...] = field(default=(), repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cluster: Mapping[str, object] | None = field(default=None, repr=False)
    install_hint: str = ""

    def environment(self) -> dict[str, str]:
        """Return the variables of the child, KUBERNETES_EXEC_INFO among them."""
        spec: dict[str, object] = {"interactive": False}
        if self.cluster is not None:
            spec["cluster"] = self.cluster
        info = {"apiVersion": self.api_version, "kind": "ExecCredential", "spec": spec}
        return {**self.env, "KUBERNETES_EXEC_INFO": msgspec.json.encode(info).decode()}


class _Status(msgspec.Struct, rename="camel"):
    # RFC 3339, as client-go reads it: a time without a zone is refused.
    expiration_timestamp: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    token: str | None = None
    client_certificate_data: str | None = None
    client_key_data: str | None = None


class _ExecCredential(msgspec.Struct, rename="camel"):
    api_version: str
    kind: str
    status: _Status | None = None


class _Credential(msgspec.Struct, frozen=True):
    """An identity that a plugin gave, and when it expires (Unix time; None for never)."""

    identity: ClientIdentity
    expires: float | None


class ExecCredentials:
    """The identity a plugin gives, kept until it expires or is rejected.

    All callers share one run of the plugin, which none of them ends by leaving. If a run fails, the last
    identity is used until it really expires. After a run that failed, was caused by a 401, or gave what had
    expired already, `floor` seconds pass before the next, so that a broken plugin is not run in a loop.

    `now` returns Unix time, since the plugin names the expiry in wall-clock time, `clock` monotonic seconds.
    """

    def __init__(
        self,
        plugin: ExecPlugin,
        *,
        time_limit: float = TIME_LIMIT,
        floor: float = FLOOR,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plugin = plugin
        self._time_limit = time_limit
        self._floor = floor
        self._now = now
        self._clock = clock
        self._status = LoadStatus(
            "kubeconfig exec",
            failing="the exec plugin gives no credential; the last one stays in use",
            working="the exec plugin gives credentials again",
        )
        self._credential: _Credential | None = None
        self._is_rejected = False
        self._not_before = -math.inf
        self._running: asyncio.Task[None] | None = None

    async def identity(self) -> ClientIdentity:
        """Return the identity; raises AccessError, with the plugin's stderr, if there is none."""
        if self._is_due():
            if self._running is None or self._running.done():
                # Owned by this object: callers come and go.
                self._running = asyncio.create_task(self._refresh())
            # Unlike `await`, this neither cancels the run with the caller nor the caller with the run.
            await asyncio.wait({self._running})
        credential = self._credential
        if credential is None or (self._has_expired(credential) and self._status.problem):
            raise AccessError(self._status.problem or f"{self._plugin.origin}: the plugin was ended")
        return credential.identity

    def rejected(self, identity: ClientIdentity) -> None:
        """Have the plugin run again, unless a newer identity has taken the place of this one."""
        if self._credential is not None and identity is self._credential.identity:
            self._is_rejected = True

    async def aclose(self) -> None:
        """End the plugin if it runs, and wait until it is gone."""
        running = self._running
        if running is not None and not running.done():
            running.cancel()
            await asyncio.wait({running})

    def _is_due(self) -> bool:
        credential = self._credential
        is_wanted = credential is None or self._is_rejected or self._has_expired(credential, LEEWAY)
        return is_wanted and (self._is_running() or self._clock() >= self._not_before)

    def _is_running(self) -> bool:
        return self._running is not None and not self._running.done()

    def _has_expired(self, credential: _Credential, leeway: float = 0.0) -> bool:
        return credential.expires is not None and self._now() >= credential.expires - leeway

    async def _refresh(self) -> None:
        """Run the plugin once and keep its identity or its error; raises nothing but a cancellation."""
        was_rejected, before = self._is_rejected, self._credential
        try:
            with contained(self._plugin.origin):
                output = await run_plugin(self._plugin, self._time_limit)
                credential = _Credential(*decode_credential(output, self._plugin))
        except AccessError as error:
            self._not_before = self._clock() + self._floor
            self._status.failed(str(error), has_value=before is not None)
            return
        self._credential, self._is_rejected = credential, False
        self._status.succeeded(is_new=False)
        if was_rejected or self._has_expired(credential, LEEWAY):
            self._not_before = self._clock() + self._floor


async def run_plugin(plugin: ExecPlugin, time_limit: float) -> bytes:
    """Run the plugin and return its output; raises AccessError if it fails, floods or takes too long."""
    program = shutil.which(plugin.command, path=plugin.env.get("PATH", os.defpath))
    if program is None:
        hint = f"; {clipped(plugin.install_hint)}" if plugin.install_hint else ""
        raise AccessError(f"{plugin.origin}: there is no program {plugin.command!r}{hint}")
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            *plugin.args,
            env=plugin.environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        why = (error.strerror or type(error).__name__) if isinstance(error, OSError) else "unfit arguments"
        raise AccessError(f"{plugin.origin}: cannot run {program}: {why}") from None
    try:
        async with asyncio.timeout(time_limit):
            output, errors = await _communicate(process)
    except TimeoutError:
        raise AccessError(f"{plugin.origin}: {program} took longer than {time_limit:g} s") from None
    finally:
        if process.returncode is None or not _has_ended(process):
            await _kill(process)
    if len(output) > OUTPUT_LIMIT or len(errors) > OUTPUT_LIMIT:
        raise AccessError(f"{plugin.origin}: {program} printed more than {OUTPUT_LIMIT} bytes")
    if process.returncode != 0:
        said = clipped(errors.decode(errors="replace")) or "nothing on stderr"
        raise AccessError(f"{plugin.origin}: {program} ended with code {process.returncode}: {said}")
    if not output.strip():
        raise AccessError(f"{plugin.origin}: {program} printed nothing")
    return output


def decode_credential(output: bytes, plugin: ExecPlugin) -> tuple[ClientIdentity, float | None]:
    """Return the identity a plugin printed, and when it expires (Unix time).

    Raises AccessError, never with any of the output in it, if that is no credential.
    """
    origin = plugin.origin
    try:
        credential = msgspec.json.decode(output, type=_ExecCredential)
    except (ValueError, RecursionError) as error:
        # A decoding error quotes nothing; one of bad UTF-8 holds the bytes, so only its kind is shown.
        problem = str(error) if isinstance(error, msgspec.DecodeError) else type(error).__name__
        raise AccessError(f"{origin}: the plugin printed no ExecCredential: {problem}") from None
    if credential.kind != "ExecCredential" or credential.api_version != plugin.api_version:
        raise AccessError(f"{origin}: the plugin printed no ExecCredential of {plugin.api_version}")
    status = credential.status or _Status()
    certificate, key = status.client_certificate_data, status.client_key_data
    if bool(certificate) != bool(key):
        raise AccessError(f"{origin}: the plugin gave a client certificate without its key, or the reverse")
    pair = checked(KeyPair(certificate.encode(), key.encode(), origin)) if certificate and key else None
    if not status.token and pair is None:
        raise AccessError(f"{origin}: the plugin gave neither a token nor a client certificate")
    token = clean_token(status.token, origin) if status.token else ""
    expires = status.expiration_timestamp
    return ClientIdentity(token=token, pair=pair), expires.timestamp() if expires else None


async def _communicate(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    """Read both streams to their ends, keeping the beginning of each, and wait for the process."""
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors = await asyncio.gather(_head(process.stdout, process), _head(process.stderr, process))
    await process.wait()
    return output, errors


async def _head(stream: asyncio.StreamReader, process: asyncio.subprocess.Process) -> bytes:
    """Return one byte more than a stream may have at most; a plugin that floods it is killed."""
    kept = bytearray()
    while chunk := await stream.read(1 << 16):
        kept += chunk[: OUTPUT_LIMIT + 1 - len(kept)]
        if len(kept) > OUTPUT_LIMIT:
            _kill_group(process)
    return bytes(kept)


def _has_ended(process: asyncio.subprocess.Process) -> bool:
    """Return whether the plugin is gone and no child of it holds our pipes."""
    assert process.stdout is not None
    assert process.stderr is not None
    return process.stdout.at_eof() and process.stderr.at_eof()


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill the plugin with its children, and read on to the end so that the pipes are closed."""
    _kill_group(process)
    with suppress(TimeoutError):
        async with asyncio.timeout(KILL_LIMIT):
            await _communicate(process)


def _kill_group(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
