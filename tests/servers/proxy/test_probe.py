"""Questions that are put to the proxy from outside: what proves that it serves Pods."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from k8s_consul_registrar.proxy.probe import CONNECTIONS, pods_problem, proxy_problem
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.proxy.routes import Pods
from k8s_consul_registrar.rotating import bearer_tokens
from support.processes import reserve_ports
from support.proxy_lab import Files, Kubelet, always, known, proxying
from support.proxy_lab import access as pod_access
from support.waiting import PATIENCE

pytestmark = pytest.mark.both_loops

HOST = "127.0.0.1"
STRANGER = b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot found"


@contextlib.asynccontextmanager
async def stranger() -> AsyncIterator[int]:
    """Serve something other than our proxy."""
    async with Kubelet(always(STRANGER), is_secure=False).serving() as server:
        yield server.port


@pytest.mark.parametrize("wants_token", [False, True])
@pytest.mark.parametrize(
    ("pods", "problem"),
    [(None, "relays no Pods"), (Pods(), "does not know the Pods yet"), (known(), "")],
    ids=["no Pods", "not listed", "served"],
)
async def test_pods_are_served_only_by_a_proxy_that_knows_them(
    tmp_path: Path, pods: Pods | None, problem: str, *, wants_token: bool
) -> None:
    """Without a token too: its refusal says that Pods are relayed. Before they are listed it is not ready anyway."""
    token = tmp_path / "token"
    token.write_text("what-prometheus-shows\n")
    inbound = bearer_tokens(token, "PROXY_BEARER_TOKEN_FILE") if wants_token else None
    async with proxying(pods=None if pods is None else pod_access(pods), inbound=inbound) as proxy:
        found = await pods_problem([(HOST, proxy.port)], PATIENCE)
        assert await proxy_problem(HOST, proxy.port, PATIENCE) == ""
    if wants_token and pods is not None:
        assert found == ""
    else:
        assert problem in found
        assert bool(found) is bool(problem)


async def test_one_proxy_without_pods_is_enough_to_wait_and_one_dead_node_is_not() -> None:
    """Replicas of before may still be behind the port; a Node that is down says nothing about them."""
    (closed,) = reserve_ports(1)
    async with proxying(pods=pod_access(known())) as new, proxying() as old, stranger() as other:
        assert await pods_problem([(HOST, new.port), (HOST, closed)], PATIENCE) == ""
        assert "relays no Pods" in await pods_problem([(HOST, new.port), (HOST, old.port)], PATIENCE)
        assert "not as the proxy does" in await pods_problem([(HOST, new.port), (HOST, other)], PATIENCE)
        assert "not as the proxy does" in await proxy_problem(HOST, other, PATIENCE)
        assert "not as the proxy does" in await pods_problem([(HOST, other)], PATIENCE)
    assert "cannot be reached" in await pods_problem([(HOST, closed)], PATIENCE)
    assert "cannot be reached" in await proxy_problem(HOST, closed, PATIENCE)


async def test_each_question_asks_over_several_connections() -> None:
    """A NodePort leads each to any replica of the proxy."""
    async with proxying(pods=pod_access(known())) as proxy:
        assert await pods_problem([(HOST, proxy.port)], PATIENCE) == ""
        assert proxy.server.stats().outcomes[Outcome.UNKNOWN_POD] == CONNECTIONS


async def test_proxy_over_tls_is_asked_without_a_certificate_of_ours(tmp_path: Path) -> None:
    """Its certificate need not be verified, as nothing secret is sent; wanting ours proves that it is a proxy."""
    authority, clients = trustme.CA(), trustme.CA()
    plain, mutual = tmp_path / "plain", tmp_path / "mutual"
    plain.mkdir()
    mutual.mkdir()
    async with proxying(tls=Files(plain, authority).tls(), pods=pod_access(known())) as proxy:
        assert await pods_problem([(HOST, proxy.port)], PATIENCE, "https") == ""
        assert await proxy_problem(HOST, proxy.port, PATIENCE, "https") == ""
        assert await pods_problem([(HOST, proxy.port)], PATIENCE, "http") != ""
    async with proxying(tls=Files(mutual, authority, clients).tls(), pods=pod_access(known())) as proxy:
        assert await pods_problem([(HOST, proxy.port)], PATIENCE, "https") == ""
        assert await proxy_problem(HOST, proxy.port, PATIENCE, "https") == ""
    async with proxying(pods=pod_access(known())) as proxy:
        assert "does not speak TLS" in await pods_problem([(HOST, proxy.port)], PATIENCE, "https")
