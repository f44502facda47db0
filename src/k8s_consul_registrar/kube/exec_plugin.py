"""Credentials from an exec plugin: a program that prints a token or a certificate.

The exchange is Kubernetes' "client-go credential plugins", versions v1 and v1beta1 of
client.authentication.k8s.io.
"""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.credentials import Identity, clean_token
from k8s_consul_registrar.kube.status import clipped
from k8s_consul_registrar.kube.tls import KeyPair

API_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
TIME_LIMIT = 30.0
# What is about to expire is not used for a request that may take a while to arrive.
LEEWAY = 10.0
OUTPUT_LIMIT = 1 << 20
KILL_LIMIT = 1.0


@dataclass(frozen=True, slots=True)
class ExecPlugin:
    """How a plugin is run: `command` with a slash is a path, else looked up in `env`'s PATH.

    `env` is the plugin's whole environment, `cluster` what it is told of the cluster (None unless it asks),
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
    expiration_timestamp: datetime | None = None
    token: str | None = None
    client_certificate_data: str | None = None
    client_key_data: str | None = None


class _ExecCredential(msgspec.Struct, rename="camel"):
    api_version: str
    kind: str
    status: _Status | None = None


class ExecCredentials:
    """The identity a plugin gives, kept until it expires or is rejected.

    `now` returns Unix time, since the plugin names the expiry in wall-clock time.
    """

    def __init__(
        self, plugin: ExecPlugin, *, time_limit: float = TIME_LIMIT, now: Callable[[], float] = time.time
    ) -> None:
        self._plugin = plugin
        self._time_limit = time_limit
        self._now = now
        self._lock = asyncio.Lock()
        self._identity: Identity | None = None
        self._expires: float | None = None

    async def identity(self) -> Identity:
        """Return the identity; raises AccessError, with the plugin's stderr, where it gives none."""
        async with self._lock:
            is_expired = self._expires is not None and self._now() >= self._expires - LEEWAY
            if self._identity is None or is_expired:
                output = await run_plugin(self._plugin, self._time_limit)
                self._identity, self._expires = decode_credential(output, self._plugin)
            return self._identity

    def rejected(self, identity: Identity) -> None:
        """Forget the identity, unless a newer one has taken its place."""
        if identity is self._identity:
            self._identity = None


async def run_plugin(plugin: ExecPlugin, time_limit: float) -> bytes:
    """Run the plugin and return what it printed; raises AccessError where it fails or takes too long."""
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
    if process.returncode != 0:
        said = clipped(errors.decode(errors="replace")) or "nothing on stderr"
        raise AccessError(f"{plugin.origin}: {program} ended with code {process.returncode}: {said}")
    if len(output) >= OUTPUT_LIMIT:
        raise AccessError(f"{plugin.origin}: {program} printed more than {OUTPUT_LIMIT} bytes")
    return output


def decode_credential(output: bytes, plugin: ExecPlugin) -> tuple[Identity, float | None]:
    """Return the identity a plugin printed, and when it expires (Unix time).

    Raises AccessError, never with any of the output in it, where that is no credential.
    """
    origin = plugin.origin
    try:
        credential = msgspec.json.decode(output, type=_ExecCredential)
    except (ValueError, RecursionError) as error:
        # A decoding error may quote nothing; one of bad UTF-8 holds the bytes, so only its kind is told.
        problem = str(error) if isinstance(error, msgspec.DecodeError) else type(error).__name__
        raise AccessError(f"{origin}: the plugin printed no ExecCredential: {problem}") from None
    if credential.kind != "ExecCredential" or credential.api_version != plugin.api_version:
        raise AccessError(f"{origin}: the plugin printed no ExecCredential of {plugin.api_version}")
    status = credential.status or _Status()
    certificate, key = status.client_certificate_data, status.client_key_data
    if bool(certificate) != bool(key):
        raise AccessError(f"{origin}: the plugin gave a client certificate without its key, or the reverse")
    pair = KeyPair(certificate.encode(), key.encode(), origin) if certificate and key else None
    if not status.token and pair is None:
        raise AccessError(f"{origin}: the plugin gave neither a token nor a client certificate")
    token = clean_token(status.token, origin) if status.token else ""
    expires = status.expiration_timestamp
    return Identity(token=token, pair=pair), expires.timestamp() if expires else None


async def _communicate(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    """Read both streams to their ends, keeping the beginning of each, and wait for the process."""
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors = await asyncio.gather(_head(process.stdout), _head(process.stderr))
    await process.wait()
    return output, errors


async def _head(stream: asyncio.StreamReader) -> bytes:
    kept = bytearray()
    while chunk := await stream.read(1 << 16):
        kept += chunk[: OUTPUT_LIMIT - len(kept)]
    return bytes(kept)


def _has_ended(process: asyncio.subprocess.Process) -> bool:
    """Tell whether the plugin is gone and nothing it started holds our pipes."""
    assert process.stdout is not None
    assert process.stderr is not None
    return process.stdout.at_eof() and process.stderr.at_eof()


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill the plugin with what it started, and read on to the end so that the pipes are closed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(KILL_LIMIT):
            await _communicate(process)
