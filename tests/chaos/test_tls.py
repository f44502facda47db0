"""Servers that cannot show who they are: nothing is sent to them, it is said why, and all is right once they can."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import trustme
from aiohttp import web

from k8s_consul_registrar.sandbox.certificates import Authority
from support.cluster import kubeconfig
from support.daemon import Daemon
from support.doors import HttpDoor, TcpProxy
from support.lab import ChaosLab, chaos, chaos_lab, created_of
from support.processes import LOOPBACK
from support.real_servers import RealConsul

pytestmark = chaos("chaos-replicas")

SECRET = "2c1d8c0a-0b64-4d2e-9a55-6f1f6f0b7c11"
LAST_YEAR = datetime.now(UTC) - timedelta(days=365)
CANNOT_LIST = "cannot list; nothing of it is deregistered meanwhile"
CANNOT_USE = "Consul cannot be used; trying again"
# What is wrong with a certificate, and what is said of it: about the API server's, about Consul's.
WRONG = {
    "signed by another": ("certificate-authority must hold the CA", "CONSUL_CACERT must name a file"),
    "for another name": ("tls-server-name of the kubeconfig can", "CONSUL_TLS_SERVER_NAME can give a name"),
    "expired": ("certificate has expired; it or its authority's is to be renewed",) * 2,
}


class Shown(HttpDoor):
    """A server of TLS with whatever certificate a test has it show; it counts what it is asked."""

    def __init__(self, upstream: str, client_tls: ssl.SSLContext | None = None) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority = Authority()
        self.requests = 0
        self.show("right")
        super().__init__(upstream, server_tls=self._context, client_tls=client_tls)

    def show(self, what: str) -> None:
        """Show another certificate to each client that connects from now on."""
        own = self.authority._ca
        match what:
            case "signed by another":
                leaf = trustme.CA().issue_cert(LOOPBACK)
            case "for another name":
                leaf = own.issue_cert("192.0.2.1", "elsewhere.example")
            case "expired":
                until = LAST_YEAR + timedelta(days=1)
                leaf = own.issue_cert(LOOPBACK, not_before=LAST_YEAR, not_after=until)
            case _:
                leaf = own.issue_cert(LOOPBACK)
        leaf.configure_cert(self._context)

    def saw(self, request: web.Request, body: bytes) -> None:
        """Count a request."""
        self.requests += 1


class Servers(NamedTuple):
    """Both servers, each with the wire before it."""

    api: Shown
    api_wire: TcpProxy
    consul: Shown
    consul_wire: TcpProxy

    def show(self, what: str) -> None:
        """Have both show such a certificate; connections that stand are cut."""
        for server, wire in ((self.api, self.api_wire), (self.consul, self.consul_wire)):
            server.show(what)
            wire.cut()

    @property
    def requests(self) -> tuple[int, int]:
        """The number of requests to the API server and to Consul."""
        return self.api.requests, self.consul.requests


@contextlib.asynccontextmanager
async def servers(lab: ChaosLab) -> AsyncIterator[Servers]:
    """Put servers of TLS before both sides of a lab."""
    trust = ssl.create_default_context(cadata=lab.sandbox.authority.pem.decode())
    async with (
        Shown(lab.sandbox.kube.url, trust) as api,
        TcpProxy(LOOPBACK, api.port) as api_wire,
        Shown(lab.real.url) as consul,
        TcpProxy(LOOPBACK, consul.port) as consul_wire,
    ):
        yield Servers(api, api_wire, consul, consul_wire)


def _settings(lab: ChaosLab, both: Servers) -> dict[str, str]:
    """Return the settings that lead a registrar to these servers, and trust their authorities alone."""
    access, trusted = lab.folder / "over-tls", lab.folder / "consul-ca.pem"
    user = {"tokenFile": str(lab.token_file)}
    access.write_text(kubeconfig(both.api_wire.address, both.api.authority, user))
    trusted.write_bytes(both.consul.authority.pem)
    return {
        "KUBECONFIG": str(access),
        "CONSUL_ADDRESS": f"https://{both.consul_wire.address}",
        "CONSUL_CACERT": str(trusted),
        "CONSUL_HTTP_TOKEN": SECRET,
    }


async def _has_complained(daemon: Daemon, what: str, lines: int) -> None:
    """Wait until the log names the fault of both servers, and fail if it repeats it again and again."""
    of_api, of_consul = WRONG[what]
    await daemon.until(lambda: len(daemon.said(CANNOT_USE, of_consul)) >= lines, f"{what}: Consul")
    await daemon.until(lambda: len(daemon.said(CANNOT_LIST, of_api)) >= 2 * lines, f"{what}: pods and nodes")
    assert len(daemon.said(CANNOT_USE, of_consul)) == lines
    assert len(daemon.said(CANNOT_LIST, of_api)) == 2 * lines


async def test_server_with_a_wrong_certificate_gets_no_request(consul: RealConsul) -> None:
    """Not one request, and so no token, reaches a server with a wrong certificate, at the start or later."""
    async with chaos_lab(consul, name="over-tls") as lab, servers(lab) as both:
        lab.put_pods(20)
        both.show("signed by another")
        async with await lab.chaotic(**_settings(lab, both)) as daemon:
            for what in WRONG:
                both.show(what)
                await _has_complained(daemon, what, 1)
            assert both.requests == (0, 0)
            assert [(await daemon.admin(path))[0] for path in ("/healthz", "/readyz")] == [200, 503]
            both.show("right")
            await lab.equal(daemon)
            await daemon.ready()
            before = created_of(await lab.records())
            both.show("signed by another")
            await asyncio.sleep(0.3)  # what was under way is counted
            asked = both.requests
            lab.drop_pod("web-7")
            lab.put_pod("new")
            await _has_complained(daemon, "signed by another", 2)
            assert both.requests == asked
            assert created_of(await lab.records()) == before
            assert await daemon.is_ready()
            both.show("right")
            await lab.equal(daemon)
            kept = [key for key in before if key in lab.wanted]
            assert created_of(await lab.records(), kept) == {key: before[key] for key in kept}
            assert SECRET not in daemon.output
