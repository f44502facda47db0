"""The proxy as a process, before kubelets with TLS and token checks: scrapes and refusals."""

import gzip
import time

import aiohttp
import pytest

from k8s_consul_registrar.sandbox.certificates import KubeletCertificate
from k8s_consul_registrar.sandbox.kubelet import recorded_metrics
from support.cluster import rule
from support.lab import LIMIT, kubelet_door, kubelet_path, running_lab, scrape
from support.processes import LOOPBACK, has_ipv6
from support.waiting import SLACK


async def test_scrape_is_the_kubelets_own_answer() -> None:
    """The text arrives byte for byte with its type; the kubelet sees the proxy's token, never the caller's."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        async with await lab.proxy() as daemon:
            await daemon.ready()
            accept = "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
            asked = {"Accept": accept, "Authorization": "Bearer the-callers-own", "Cookie": "a=b"}
            answer = await scrape(daemon, kubelet_path(kubelet.port), asked)
            assert (answer.status, answer.body) == (200, recorded_metrics())
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            seen = kubelet.requests[-1].headers
            assert (seen["Accept"], "Accept-Encoding" in seen, "Cookie" in seen) == (accept, False, False)
            assert seen["Authorization"] == f"Bearer {lab.token_file.read_text()}"
            by_name = await scrape(daemon, "/api/v1/nodes/node-a/proxy/metrics/cadvisor")
            assert (by_name.status, by_name.body) == (200, recorded_metrics())


async def test_gzip_is_passed_through_untouched() -> None:
    """A compressed answer of the kubelet reaches the client as it is, header and bytes."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        async with await lab.proxy() as daemon:
            await daemon.ready()
            answer = await scrape(daemon, kubelet_path(kubelet.port), {"Accept-Encoding": "gzip"})
            assert (answer.status, answer.headers["Content-Encoding"]) == (200, "gzip")
            assert answer.body == kubelet._compressed
            assert gzip.decompress(answer.body) == recorded_metrics()
            assert kubelet.requests[-1].headers["Accept-Encoding"] == "gzip"


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
async def test_ipv6_node_and_an_ipv6_caller() -> None:
    """A Node at ::1 is scraped with the brackets escaped, as Prometheus sends them, over IPv6 and IPv4."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-six", "::1")
        async with await lab.proxy() as daemon:
            await daemon.ready()
            for path in (kubelet_path(kubelet.port, "%5B::1%5D"), kubelet_path(kubelet.port, "[::1]")):
                for host in ("[::1]", LOOPBACK):
                    assert (await scrape(daemon, path, host=host)).body == recorded_metrics()


async def test_request_other_than_a_scrape_of_a_known_node_is_refused() -> None:
    """Unknown Nodes, ports and paths are 404 and other methods 405, and no kubelet hears of any."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        right = kubelet_path(kubelet.port)
        async with await lab.proxy() as daemon:
            await daemon.ready()
            for wrong in (
                kubelet_path(kubelet.port + 1), kubelet_path(kubelet.port, "192.0.2.1"), kubelet_path(kubelet.port, "node-a"),
                kubelet_path(kubelet.port, "127.1"), right.replace("cadvisor", "probes"), f"{right}/", "/",
                right.replace("/metrics/cadvisor", "/exec"), right.replace("/metrics/cadvisor", "/pods"),
                right.replace("/metrics/cadvisor", "/metrics%2fcadvisor"), f"/api/v1/../..{right}", "/metrics",
                "/api/v1/nodes/other/proxy/metrics/cadvisor",
            ):  # fmt: skip
                answer = await scrape(daemon, wrong)
                assert answer.status == 404, (wrong, answer)
                assert answer.body
            for method in ("HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
                assert (await scrape(daemon, right, method=method)).status == 405, method
            assert kubelet.request_count == 0
            assert (await scrape(daemon, right)).status == 200


async def test_before_the_nodes_are_known() -> None:
    """503 while no list of Nodes arrived, and not ready; then all is well without a restart."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        lab.api_door.refuse()
        async with await lab.proxy() as daemon:
            await daemon.until_said("cannot follow", "no connection to")
            answer = await scrape(daemon, kubelet_path(kubelet.port))
            assert (answer.status, "not known yet" in answer.text) == (503, True)
            assert (await daemon.admin("/readyz"))[0] == 503
            await lab.api_door.heal()
            await daemon.ready()
            assert (await scrape(daemon, kubelet_path(kubelet.port))).status == 200


async def test_losing_the_api_server_does_not_blind_the_monitoring() -> None:
    """The Nodes last known are served, and it stays ready."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        async with await lab.proxy() as daemon:
            await daemon.ready()
            lab.api_door.refuse()
            assert (await scrape(daemon, kubelet_path(kubelet.port))).status == 200
            assert await daemon.is_ready()


async def test_loopback_node_is_not_dialled_unless_allowed() -> None:
    """Without PROXY_ALLOW_LOOPBACK a Node that claims 127.0.0.1 is as good as none."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        async with await lab.proxy(PROXY_ALLOW_LOOPBACK="") as daemon:
            await daemon.ready()
            assert (await scrape(daemon, kubelet_path(kubelet.port))).status == 404
            assert kubelet.request_count == 0


async def test_kubelet_that_cannot_be_reached() -> None:
    """502 with the reason in words, then 200 when it is back."""
    async with running_lab() as lab, await kubelet_door(lab) as door, await lab.proxy() as daemon:
        await daemon.ready()
        door.refuse()
        answer = await scrape(daemon, kubelet_path(door.port))
        assert (answer.status, "refused" in answer.text.lower()) == (502, True), answer
        await door.heal()
        assert (await scrape(daemon, kubelet_path(door.port))).status == 200


async def test_kubelet_that_refuses_us() -> None:
    """502 that names the permission to grant, when the account lacks nodes/metrics."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        lab.token_file.write_text(await lab.cluster.token([rule("list watch", "nodes")]))
        async with await lab.proxy() as daemon:
            await daemon.ready()
            answer = await scrape(daemon, kubelet_path(kubelet.port))
            assert answer.status == 502
            assert "nodes/metrics" in answer.text
            assert (await scrape(daemon, kubelet_path(kubelet.port))).status == 502


async def test_certificate_that_cannot_be_verified() -> None:
    """502 naming both settings; skipping the verification is the operator's explicit choice."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.start_kubelet("node-a", certificate=KubeletCertificate.SELF_SIGNED)
        await lab.cluster.add_node("node-a", ("InternalIP", LOOPBACK), kubelet_port=kubelet.port)
        async with await lab.proxy() as daemon:
            await daemon.ready()
            answer = await scrape(daemon, kubelet_path(kubelet.port))
            assert answer.status == 502
            assert (await scrape(daemon, kubelet_path(kubelet.port))).status == 502
            await daemon.until(lambda: bool(daemon.said("scrapes fail")))
            (line,) = daemon.said("scrapes fail")
            assert line["outcome"] == "kubelet_unverified"
            assert line["example"].startswith("node-a at ")
            assert "KUBELET_CA_FILE" in line["problem"]
            assert "KUBELET_CA_FILE" in answer.text
            assert "KUBELET_INSECURE_SKIP_TLS_VERIFY" in answer.text
            assert kubelet.request_count == 0, "no token was sent"
        async with await lab.proxy(KUBELET_INSECURE_SKIP_TLS_VERIFY="true") as daemon:
            await daemon.ready()
            assert (await scrape(daemon, kubelet_path(kubelet.port))).status == 200


async def test_certificate_for_only_the_nodes_name_is_explained() -> None:
    """KUBELET_TLS_SERVER_NAME=node verifies the name instead of the address."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.start_kubelet("node-a", certificate=KubeletCertificate.NAME_ONLY)
        await lab.cluster.add_node("node-a", ("InternalIP", LOOPBACK), kubelet_port=kubelet.port)
        for setting, status in (("ip", 502), ("node", 200)):
            async with await lab.proxy(KUBELET_TLS_SERVER_NAME=setting) as daemon:
                await daemon.ready()
                assert (await scrape(daemon, kubelet_path(kubelet.port))).status == status


async def test_kubelet_that_does_not_answer_in_time() -> None:
    """504 slightly before the caller would give up, by the time the caller announces."""
    async with running_lab() as lab, await kubelet_door(lab) as door, await lab.proxy() as daemon:
        await daemon.ready()
        door.stall()
        started = time.monotonic()
        patience = {"X-Prometheus-Scrape-Timeout-Seconds": "3.000000"}
        answer = await scrape(daemon, kubelet_path(door.port), patience)
        assert answer.status == 504, answer
        assert 2.0 < time.monotonic() - started < 3.0 + SLACK


async def test_scrape_that_breaks_off_looks_broken() -> None:
    """When the kubelet's connection dies within the text, the caller gets a reset and never a clean end."""
    long = b"# a long text\n" * 300_000
    async with running_lab() as lab, await kubelet_door(lab, long) as door, await lab.proxy() as daemon:
        await daemon.ready()
        url = f"http://{LOOPBACK}:{await daemon.port('port')}{kubelet_path(door.port)}"
        door.delay = 0.05  # a piece: the text takes seconds, so that most of it is still to come at the cut
        plain = {"Accept-Encoding": "identity"}
        async with (
            aiohttp.ClientSession(timeout=LIMIT) as session,
            session.get(url, headers=plain) as response,
        ):
            assert response.status == 200
            await response.content.read(1000)
            door.cut()
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        assert await daemon.is_ready()


async def test_callers_may_have_to_show_a_token() -> None:
    """With PROXY_BEARER_TOKEN_FILE a scrape without the token is 401 and reaches no kubelet."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        file = lab.folder / "inbound"
        file.write_text("what-prometheus-shows\n")
        async with await lab.proxy(PROXY_BEARER_TOKEN_FILE=str(file)) as daemon:
            await daemon.ready()
            right = {"Authorization": "Bearer what-prometheus-shows"}
            assert (await scrape(daemon, kubelet_path(kubelet.port))).status == 401
            assert kubelet.request_count == 0
            assert (await scrape(daemon, kubelet_path(kubelet.port), right)).status == 200
            assert "what-prometheus-shows" not in str(kubelet.requests)
            assert "what-prometheus-shows" not in daemon.output
