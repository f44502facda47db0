"""What tests of the Consul registries on real servers share: clients, tokens, and ways to lose data."""

import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.model import Service
from support.real_servers import RealConsul

# A loaded machine answers late; what is to be quick is only what is tried again.
PATIENT = Timing(retry_first=0.05, retry_cap=0.2, connect_timeout=5, read_timeout=20)


class Readable(Protocol):
    """A registry, as far as these helpers care."""

    def services(self) -> AsyncIterator[Service]:
        """Yield every service."""
        ...


@asynccontextmanager
async def connected(
    consul: RealConsul, *, token: str | None = None, token_file: str = ""
) -> AsyncIterator[ConsulClient]:
    """Open a client of a real Consul, with its management token unless given another."""
    own = consul.token if token is None else token
    access = ConsulAccess(ConsulAddress(consul.url), token=own, token_file=token_file)
    async with ConsulClient(access, PATIENT) as client:
        yield client


async def held(registry: Readable) -> dict[str, Service]:
    """Return all services by ID."""
    return {service.id: service async for service in registry.services()}


class Token:
    """An ACL token with rules of its own."""

    def __init__(self, accessor: str, secret: str) -> None:
        self.accessor = accessor
        self.secret = secret


async def make_token(consul: RealConsul, name: str, rules: str) -> Token:
    """Create a token that may do what the rules say."""
    status, _ = await consul.request("PUT", "/v1/acl/policy", {"Name": name, "Rules": rules})
    assert status == 200
    status, token = await consul.request("PUT", "/v1/acl/token", {"Policies": [{"Name": name}]})
    assert status == 200
    return Token(token["AccessorID"], token["SecretID"])


async def revoke(consul: RealConsul, token: Token) -> None:
    """Make a token unknown."""
    status, _ = await consul.request("DELETE", f"/v1/acl/token/{token.accessor}")
    assert status == 200


def empty(consul: RealConsul) -> None:
    """Remove the data of a Consul that is not running."""
    (folder,) = [one.partition("=")[2] for one in consul.program.argv if one.startswith("-data-dir=")]
    shutil.rmtree(Path(folder))


async def restart_empty(consul: RealConsul) -> None:
    """Kill a Consul and start it on the same ports without its data."""
    await consul.program.stop(signal.SIGKILL)
    empty(consul)
    await consul.start()
