"""Servers whose TLS fails: each of our clients says the same of it, and `check` the same as the daemon."""

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator

import aiohttp
import pytest

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands.check.nodes import Kubelets, check_kubelets
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.errors import ClusterUnreachable, ConsulUnreachable
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.credentials import ClientIdentity, StoredCredentials
from k8s_consul_registrar.rotating import Derived, fixed
from k8s_consul_registrar.tls import (
    API_SERVER,
    CONSUL,
    KUBELET,
    POD,
    Cause,
    KeyPair,
    ServerCertificate,
    Trust,
)
from support.certificates import DAY, PlainCA
from support.proxy_lab import Kubelet, cadvisor, proxying
from support.scripted import QUICK
from support.waiting import PATIENCE

CA, OTHER = PlainCA(), PlainCA("another CA")
HOST = "127.0.0.1"
TRUST = Trust(CA.pem.decode(), ca_setting="the CA of this test")
WITHOUT_RETRIES = Timing(connect_timeout=20, read_timeout=20)


def showing(ca: PlainCA, name: str = HOST, **dates: object) -> ssl.SSLContext:
    """Return a server's context that shows a certificate."""
    issued = ca.issue(name, **dates)  # type: ignore[arg-type]
    return ServerCertificate(KeyPair(issued.certificate, issued.key)).context


def asking() -> ssl.SSLContext:
    """Return a server's context that wants a certificate of a client."""
    issued = CA.issue(HOST)
    return ServerCertificate(KeyPair(issued.certificate, issued.key), CA.pem.decode()).context


def unready() -> ssl.SSLContext:
    """Return a server's context without a certificate, as a kubelet whose request is not approved."""
    context = showing(CA)
    context.sni_callback = lambda *_: ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
    return context


FAULTS: dict[str, tuple[Callable[[], ssl.SSLContext | None], Cause, str]] = {
    "signed by another CA": (
        lambda: showing(OTHER),
        Cause.UNKNOWN_CA,
        "unable to get local issuer certificate",
    ),
    "for another name": (lambda: showing(CA, "192.0.2.1"), Cause.OTHER_NAME, "IP address mismatch"),
    "expired": (
        lambda: showing(CA, begins=-2 * DAY, ends=-DAY),
        Cause.OUT_OF_DATE,
        "its certificate cannot be verified: certificate has expired",
    ),
    "not yet valid": (lambda: showing(CA, begins=DAY, ends=2 * DAY), Cause.OUT_OF_DATE, "is not yet valid"),
    "wants a certificate": (
        asking,
        Cause.OUR_CERTIFICATE,
        "it does not accept our certificate, or lack of one",
    ),
    "has none yet": (unready, Cause.NOT_READY, "it cannot make a TLS connection: tlsv1 alert internal error"),
    "speaks no TLS": (lambda: None, Cause.NO_TLS, "it does not speak TLS"),
}


@contextlib.contextmanager
def serving(context: ssl.SSLContext | None) -> Iterator[int]:
    """Serve HTTP that no client should reach; yields the port.

    Threads, since asyncio's servers send no alert when a handshake fails.
    """

    def answer(accepted: socket.socket) -> None:
        with accepted, contextlib.suppress(OSError):
            accepted.settimeout(PATIENCE)
            if context is None:
                accepted.recv(1000)
                accepted.sendall(
                    b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            else:
                plain = socket.socket(fileno=os.dup(accepted.fileno()))
                plain.settimeout(PATIENCE)
                with contextlib.suppress(OSError):
                    context.wrap_socket(plain, server_side=True).close()
            # Closing with bytes unread would reset the connection, and the alert with it.
            accepted.shutdown(socket.SHUT_WR)
            while accepted.recv(1000):
                pass

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=listening.accept()[:1], daemon=True).start()

    with socket.create_server((HOST, 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)


async def consul(port: int) -> str:
    """Return what is said of Consul."""
    access = ConsulAccess(
        ConsulAddress(f"https://{HOST}:{port}"), tls=Derived(lambda trust: trust, fixed(TRUST))
    )
    async with ConsulClient(access, QUICK) as client:
        with pytest.raises(ConsulUnreachable) as caught:
            await client.request("GET", "/v1/status/leader")
    return str(caught.value)


async def api_server(port: int) -> str:
    """Return what is said of the API server."""
    credentials = StoredCredentials(ClientIdentity(token="t"))
    access = Access(f"https://{HOST}:{port}", credentials, trusted=fixed(TRUST))
    async with KubeClient(access, WITHOUT_RETRIES) as client:
        with pytest.raises(ClusterUnreachable) as caught:
            await client.server_version()
    return str(caught.value)


async def kubelet(port: int) -> str:
    """Return what is said to those who scrape a kubelet."""
    asked = Kubelet(port=port)
    async with proxying(asked.node(), context=TRUST.context) as proxy:
        got = await proxy.get(cadvisor(asked))
    assert got.status == 502
    return got.body.decode()


async def check(port: int) -> str:
    """Return what `check` says of a kubelet."""
    kubelets = Kubelets(TRUST, verifies_node_name=False, token="t", timeout=20)
    (found,) = await check_kubelets([Kubelet(port=port).node()], kubelets, allow_loopback=True)
    return f"{found.detail}; {found.hint}"


CLIENTS: dict[str, tuple[Callable[[int], Awaitable[str]], str]] = {
    "Consul": (consul, "CONSUL"),
    "API server": (api_server, "API_SERVER"),
    "kubelet": (kubelet, "KUBELET"),
    "check": (check, "KUBELET"),
}
PEERS = {"CONSUL": CONSUL, "API_SERVER": API_SERVER, "KUBELET": KUBELET, "POD": POD}


@pytest.mark.parametrize(("client", "peer"), CLIENTS.values(), ids=CLIENTS)
@pytest.mark.parametrize(("context", "cause", "words"), FAULTS.values(), ids=FAULTS)
async def test_failed_tls_is_explained_alike_by_every_client(
    context: Callable[[], ssl.SSLContext | None],
    cause: Cause,
    words: str,
    client: Callable[[int], Awaitable[str]],
    peer: str,
) -> None:
    """With the remedy in the words of the settings of that connection."""
    with serving(context()) as port:
        said = await client(port)
    assert words in said
    assert PEERS[peer].remedies.get(cause, "") in said
    assert "operation not permitted" not in said
    assert "_ssl.c" not in said


async def test_failed_tls_is_the_same_error_in_check_and_proxy() -> None:
    """Word for word, but for where it stands."""
    for context, _, _ in FAULTS.values():
        with serving(context()) as port:
            scraped, checked = await kubelet(port), await check(port)
        problem, _, remedy = scraped.strip().removeprefix("the kubelet cannot be scraped: ").partition("; ")
        assert problem in checked
        assert remedy in checked


def test_aiohttp_errors_hold_the_error_of_tls() -> None:
    """The attributes that an explanation looks into are there."""
    assert hasattr(aiohttp.ClientConnectorError, "os_error")
    assert hasattr(aiohttp.ClientConnectorCertificateError, "certificate_error")
