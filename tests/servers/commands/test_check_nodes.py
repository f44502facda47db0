"""The checks of kubelets: each failure of TLS has its own words, and none is blamed on a firewall."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import trustme

from k8s_consul_registrar.commands.check.nodes import Kubelets, check_kubelets
from k8s_consul_registrar.commands.check.report import Result
from k8s_consul_registrar.model import Node, NodeAddress
from k8s_consul_registrar.tls import trust_in
from support.waiting import PATIENCE

pytestmark = pytest.mark.both_loops

HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def alert(description: int) -> bytes:
    """Return a TLS record with a fatal alert (RFC 8446, 6.2)."""
    return bytes((21, 3, 3, 0, 2, 2, description))


@contextlib.asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[Node]:
    """Serve a port that gives one answer to whatever arrives, as the kubelet of a Node."""

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Node(
            "node-a",
            uid="u",
            created="2026-01-01T00:00:00Z",
            addresses=(NodeAddress("InternalIP", "127.0.0.1"),),
            kubelet_port=port,
        )


async def finding_of(node: Node) -> tuple[str, str]:
    """Check the kubelet of a Node and return what is wrong with it and its remedy."""
    authority = trustme.CA().cert_pem.bytes()
    kubelets = Kubelets(trust_in(authority, "KUBELET_CA_FILE"), False, "token", PATIENCE)
    (finding,) = await check_kubelets([node], kubelets, allow_loopback=True)
    assert finding.outcome is Result.FAIL
    assert "not permitted" not in finding.detail
    return finding.detail, finding.hint


@pytest.mark.parametrize(
    ("answer", "problem", "remedy"),
    [
        (alert(80), "internal error", "kubectl get csr"),
        (alert(70), "protocol version", "tlsMinVersion"),
        (alert(40), "handshake failure", "tlsCipherSuites"),
        (alert(42), "certificate", "KUBELET_CLIENT_CERT_FILE"),
        (HTTP, "does not speak TLS", "https port (10250)"),
    ],
    ids=["internal_error", "protocol_version", "handshake_failure", "bad_certificate", "plain HTTP"],
)
async def test_tls_failures_of_kubelets_are_told_apart(answer: bytes, problem: str, remedy: str) -> None:
    """A kubelet that ends the handshake was reached: the text says why it did, and not to open a port."""
    async with answering(answer) as node:
        detail, hint = await finding_of(node)
    assert problem in detail
    assert remedy in hint
    assert "firewall" not in hint


async def test_a_port_that_nothing_listens_on_is_not_reached() -> None:
    """Only a connection that does not come about may be a matter of the network."""
    async with answering(b"") as node:
        pass
    detail, hint = await finding_of(node)
    assert "cannot be reached" in detail
    assert "firewall" in hint
