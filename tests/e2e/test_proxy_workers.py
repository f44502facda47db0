"""The proxy in several processes: one port, one set of figures, and a worker's death that ends no other."""

import asyncio
import json
import os
import signal
import ssl
import time
from pathlib import Path

import aiohttp
import pytest
import trustme

from k8s_consul_registrar.sandbox.kubelet import recorded_metrics
from support.daemon import STOP_WITHIN, Daemon
from support.lab import LIMIT, kubelet_door, kubelet_path, running_lab, scrape
from support.processes import LOOPBACK, is_running
from support.proxy_lab import Files
from support.waiting import SLACK

WORKERS = 3
CALLERS = 24
# One kubelet gets all scrapes here, and however the system spreads connections none is to wait for a place.
ROOM = {"SCRAPE_CONCURRENCY_PER_NODE": str(CALLERS * WORKERS)}
OK = 'proxy_scrapes_total{outcome="ok"}'


def workers_of(daemon: Daemon) -> list[int]:
    """Return the processes its log says serve, and that still run."""
    pids = [int(line["pid"]) for line in daemon.said("a worker serves")]
    return [pid for pid in pids if is_running(pid)]


def shown_of(pid: int) -> bytes:
    """Return what the system shows of a process: its arguments and its environment."""
    return Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()


async def test_one_port_and_one_set_of_figures() -> None:
    """Scrapes over many connections meet every worker, and the counters are their sum."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        async with await lab.proxy(PROXY_WORKERS=str(WORKERS), **ROOM) as daemon:
            await daemon.ready()
            assert len(workers_of(daemon)) == WORKERS
            answers = [await scrape(daemon, kubelet_path(kubelet.port)) for _ in range(CALLERS)]
            assert {(answer.status, answer.body) for answer in answers} == {(200, recorded_metrics())}
            assert (await scrape(daemon, "/nothing")).status == 404

            async def are_counted() -> bool:
                unknown = await daemon.metric('proxy_scrapes_total{outcome="unknown_path"}')
                return await daemon.metric(OK) == CALLERS and unknown == 1

            await daemon.until(are_counted, "all scrapes in the figures")
            assert (await daemon.metric("proxy_body_bytes_total") or 0) >= CALLERS * len(recorded_metrics())
            assert await daemon.metric("proxy_scrape_duration_seconds_count") == CALLERS
            # Each that met a kubelet had to connect; one connection alone would mean one worker alone.
            assert (await daemon.metric("proxy_kubelet_dials_total") or 0) > 1
            assert await daemon.metric("proxy_workers") == WORKERS
            assert await daemon.metric("proxy_worker_deaths_total") == 0
            assert await daemon.metric("proxy_nodes") == 1
            assert (await daemon.admin("/"))[0] == 200
            (row,) = json.loads((await daemon.admin("/api/v1/upstreams"))[1])["upstreams"]
            assert (row["object"]["name"], row["state"], row["failures"]) == ("node-a", "answers", 0)
            assert row["expires_at"] > row["at"]
            status = json.loads((await daemon.admin("/api/v1/status"))[1])
            assert status["workers"] == [WORKERS, 0]
            assert status["sources"][0] == {"name": "nodes", "objects": 1, "behind": 0.0, "problem": ""}
            assert await daemon.terminate() == 0
            assert workers_of(daemon) == []


async def test_killed_worker_leaves_the_others_running() -> None:
    """Under load: the others go on, it is counted and started again, and no counter goes back."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        async with await lab.proxy(PROXY_WORKERS=str(WORKERS), **ROOM) as daemon:
            await daemon.ready()
            path, port = kubelet_path(kubelet.port), await daemon.port("port")
            is_over = False
            cut, good = 0, 0

            async def caller() -> None:
                nonlocal cut, good
                async with aiohttp.ClientSession(timeout=LIMIT) as session:
                    while not is_over:
                        try:
                            async with session.get(f"http://{LOOPBACK}:{port}{path}") as answer:
                                assert answer.status == 200
                                assert await answer.read() == recorded_metrics()
                                good += 1
                        except aiohttp.ClientConnectionError:
                            cut += 1

            callers = [asyncio.create_task(caller()) for _ in range(CALLERS)]
            await daemon.until(lambda: good > 3 * CALLERS)
            await asyncio.sleep(1.2)  # so that every worker has told its figures
            before = await daemon.metric(OK)
            victim = workers_of(daemon)[0]
            os.kill(victim, signal.SIGKILL)
            await daemon.until_said("a worker ended", "signal 9")
            after = await daemon.metric(OK)
            await daemon.until(lambda: len(daemon.said("a worker serves")) == WORKERS + 1)
            await asyncio.sleep(0.5)
            is_over = True
            await asyncio.gather(*callers)
            assert before is not None
            assert after is not None
            assert after >= before
            # A caller loses at most the scrape under way, and perhaps one on the connection that died with it.
            assert cut <= 2 * CALLERS
            assert len(workers_of(daemon)) == WORKERS
            assert await daemon.metric("proxy_worker_deaths_total") == 1
            await daemon.ready()


async def test_rotated_token_reaches_the_workers() -> None:
    """Scrapes go on when kubelets accept another token; neither token is on a command line."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        file = lab.folder / "inbound"
        file.write_text("shown-at-first")
        async with await lab.proxy(PROXY_WORKERS="2", PROXY_BEARER_TOKEN_FILE=str(file)) as daemon:
            await daemon.ready()
            first, second = (
                {"Authorization": f"Bearer {text}"} for text in ("shown-at-first", "shown-later")
            )
            assert (await scrape(daemon, kubelet_path(kubelet.port), first)).status == 200
            assert (await scrape(daemon, kubelet_path(kubelet.port))).status == 401
            file.write_text("shown-later")

            async def answers(token: dict[str, str]) -> set[int]:
                # Each connection meets one of the workers by chance.
                return {(await scrape(daemon, kubelet_path(kubelet.port), token)).status for _ in range(16)}

            async def is_taken() -> bool:
                return await answers(second) == {200} and await answers(first) == {401}

            await daemon.until(is_taken, "the new token for callers everywhere")
            for pid in workers_of(daemon):
                assert b"shown" not in shown_of(pid)
                assert lab.token_file.read_bytes() not in shown_of(pid)


async def test_unusable_token_file_and_a_renewal_leave_the_workers_serving(tmp_path: Path) -> None:
    """Workers that die meanwhile come back with the last good tokens; a removed token is refused by all of them."""
    ca = trustme.CA()
    files = Files(tmp_path, ca)
    tokens = tmp_path / "tokens"
    tokens.write_text("old-token\nnew-token\n")
    context = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        daemon = await lab.proxy(
            PROXY_WORKERS="2",
            PROXY_BEARER_TOKEN_FILE=str(tokens),
            TLS_CERT_FILE=str(files.certificate),
            TLS_KEY_FILE=str(files.key),
        )
        async with daemon:
            await daemon.ready()
            url = f"https://{LOOPBACK}:{await daemon.port('port')}{kubelet_path(kubelet.port)}"

            async def ask(token: str) -> int:
                async with (
                    aiohttp.ClientSession(timeout=LIMIT) as session,
                    session.get(url, ssl=context, headers={"Authorization": f"Bearer {token}"}) as answer,
                ):
                    return answer.status

            async def statuses(token: str) -> set[int]:
                return {await ask(token) for _ in range(12)}

            async def is_old_refused() -> bool:
                return await statuses("old-token") == {401}

            assert await statuses("old-token") == {200}
            tokens.write_text("new-token\n")
            await daemon.until(is_old_refused, "the removed token refused by every worker")
            tokens.write_text("new-token # a comment\n")
            await daemon.until_said("changed files cannot be used; those before stay in use")
            files.issue(ca)
            address = LOOPBACK, await daemon.port("port")

            async def is_renewed() -> bool:
                shown = {await asyncio.to_thread(ssl.get_server_certificate, address) for _ in range(12)}
                return len(shown) == 1 and files.certificate.read_text().startswith(shown.pop())

            await daemon.until(is_renewed, "the renewed certificate shown by every worker")
            for pid in workers_of(daemon):
                os.kill(pid, signal.SIGKILL)

            async def are_back() -> bool:
                deaths = await daemon.metric("proxy_worker_deaths_total")
                return deaths == 2 and await daemon.metric("proxy_workers") == 2

            await daemon.until(are_back, "both workers started again")
            assert await statuses("new-token") == {200}
            assert await is_old_refused()
            assert await is_renewed()
            assert await daemon.metric('rotating_file_ok{of="PROXY_BEARER_TOKEN_FILE"}') == 0
            assert await daemon.metric('rotating_file_ok{of="TLS_CERT_FILE"}') == 1


async def test_sigterm_drains_every_worker() -> None:
    """The scrapes under way finish, whichever worker has them; then all are gone and the exit code is 0."""
    async with (
        running_lab() as lab,
        await kubelet_door(lab) as door,
        await lab.proxy(PROXY_WORKERS="2", **ROOM) as daemon,
    ):
        await daemon.ready()
        door.stall()
        under_way = [asyncio.create_task(scrape(daemon, kubelet_path(door.port))) for _ in range(8)]
        await daemon.until(lambda: door.is_held)

        async def are_under_way() -> bool:
            return await daemon.metric("proxy_scrapes_in_flight") == 8

        await daemon.until(are_under_way, "8 scrapes in flight")
        daemon.send(signal.SIGTERM)
        await daemon.until_said("draining")
        await asyncio.sleep(0.3)
        assert not any(each.done() for each in under_way)
        await door.heal()
        for answer in await asyncio.gather(*under_way):
            assert (answer.status, answer.body) == (200, recorded_metrics())
        assert await daemon.ended(STOP_WITHIN) == 0
        assert workers_of(daemon) == []


async def test_sigint_ends_every_worker_at_once() -> None:
    """Ctrl-C waits for no scrape; what is under way looks cut."""
    async with (
        running_lab() as lab,
        await kubelet_door(lab) as door,
        await lab.proxy(PROXY_WORKERS="2") as daemon,
    ):
        await daemon.ready()
        door.stall()
        under_way = asyncio.create_task(scrape(daemon, kubelet_path(door.port)))
        await daemon.until(lambda: door.is_held)
        started = time.monotonic()
        daemon.send(signal.SIGINT)
        assert await daemon.ended(STOP_WITHIN) == 130
        assert time.monotonic() - started < SLACK
        with pytest.raises(aiohttp.ClientError):
            await under_way
        assert workers_of(daemon) == []


async def test_workers_end_with_their_parent() -> None:
    """A parent that is killed leaves no worker behind that would go on with what it knew last."""
    async with running_lab() as lab:
        await lab.cluster.add_kubelet("node-a")
        async with await lab.proxy(PROXY_WORKERS="2") as daemon:
            await daemon.ready()
            pids = workers_of(daemon)
            assert len(pids) == 2
            os.kill(daemon._program.pid, signal.SIGKILL)
            await daemon.until(lambda: not any(map(is_running, pids)), "the workers' end")


async def test_a_second_proxy_does_not_share_the_port() -> None:
    """It would take half of the scrapes without a word: it ends with exit code 2 and names the setting."""
    async with running_lab() as lab, await lab.proxy(PROXY_WORKERS="2") as first:
        await first.ready()
        port = str(await first.port("port"))
        for workers in ("1", "2"):
            async with await lab.proxy(PORT=port, PROXY_WORKERS=workers) as second:
                assert await second.ended() == 2
                assert f"PORT {port}: another proxy" in second.output
        assert (await scrape(first, "/nothing")).status == 404
