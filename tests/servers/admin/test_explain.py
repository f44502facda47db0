"""`/api/v1/explain`: what the status page asks about one object."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.admin import explain
from k8s_consul_registrar.admin.explain import Explainer, explain_route
from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.admin.target_groups import GroupEncoder
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import ObjectKey
from support.builders import annotated, make_pod
from support.controller_lab import ControllerLab, Seen
from support.seen import Healthy
from support.waiting import PATIENCE, until


class Asking:
    """A client of the page's API."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session

    async def ask(self, what: str) -> tuple[int, dict[str, Any]]:
        """Ask about an object."""
        return await self.get(urlencode({"what": what}))

    async def get(self, query: str) -> tuple[int, dict[str, Any]]:
        """Send a query; return status and answer."""
        async with self._session.get(f"{self._url}/api/v1/explain?{query}") as response:
            return response.status, json.loads(await response.read())


@asynccontextmanager
async def explaining() -> AsyncIterator[tuple[Asking, ControllerLab]]:
    """Run a registrar that explains."""
    lab = Seen().lab
    route = explain_route(Explainer(lab.core, lab.cluster, GroupEncoder(), "prometheus.io/", {}))
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with (
        lab.running(),
        AdminServer(port=0, health=Healthy(), registry=CollectorRegistry(), routes=[route]) as server,
        aiohttp.ClientSession(timeout=timeout) as session,
    ):
        yield Asking(f"http://127.0.0.1:{server.port}", session), lab


async def test_target_rejection_and_stranger_are_told_apart() -> None:
    """By name and by address; nothing is written by it."""
    async with explaining() as (asking, lab):
        pods = [
            make_pod("a", ip="198.51.100.1"),
            make_pod("b", annotations=annotated(port="none")),
            make_pod("c", annotations={}),
        ]
        lab.cluster.put_list(pods)
        await lab.until("a")
        writes = list(lab.consul.writes)
        status, found = await asking.ask("pod shop/a")
        (explained,) = found["objects"]
        assert (status, explained["is_target"], explained["object"]) == (200, True, "pod shop/a")
        assert explained["services"][0]["labels"]["__meta_consul_service_id"] == "pod--shop--a"
        assert await asking.ask("198.51.100.1") == (200, {**found, "what": "198.51.100.1"})
        for name, condition in (("b", "accepted"), ("c", "annotated"), ("d", "exists")):
            _, found = await asking.ask(f"pod shop/{name}")
            (explained,) = found["objects"]
            assert explained["is_target"] is False
            assert explained["conditions"][-1]["name"] == condition
        assert (await asking.ask("203.0.113.1"))[1]["objects"] == []
        assert lab.consul.writes == writes


async def test_ipv6_target_is_found_in_any_spelling_and_shown_in_brackets() -> None:
    """With a port beside it the address alone would be another one."""
    async with explaining() as (asking, lab):
        lab.cluster.put_list([make_pod("a", ip="2001:db8::a")])
        await lab.until("a")
        for spelled in ("2001:db8::a", "[2001:DB8::A]", "2001:db8:0::a"):
            _, found = await asking.ask(spelled)
            (explained,) = found["objects"]
            assert [one["address"] for one in explained["services"]] == ["[2001:db8::a]:9102"]


@pytest.mark.parametrize(
    "query", ["", "what=", "what=pod", "what=pots+a/b", "what=pod+a", "q=pod+a/b", f"what={'x' * 500}"]
)
async def test_senseless_question_is_a_400_with_words(query: str) -> None:
    """As every other mistake in a query."""
    async with explaining() as (asking, _):
        status, found = await asking.get(query)
        assert (status, list(found)) == (400, ["error"])


async def test_consul_that_is_down_is_said() -> None:
    """503 and the problem; the daemon goes on, and answers when Consul is back."""
    async with explaining() as (asking, lab):
        lab.cluster.put_list([make_pod("a")])
        await lab.until("a")
        lab.consul.is_down = True
        status, found = await asking.ask("pod shop/a")
        assert (status, bool(found["error"])) == (503, True)
        lab.consul.is_down = False
        assert (await asking.ask("pod shop/a"))[0] == 200


async def test_many_questions_are_answered_one_at_a_time_and_a_bounded_number_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No client can make the registrar flood the API server or Consul through the page, nor hang it."""
    async with explaining() as (asking, lab):
        lab.cluster.put_list([make_pod("a")])
        await lab.until("a")
        may_answer, under_way = asyncio.Event(), 0
        read = lab.cluster.read_object

        async def slowly(key: ObjectKey) -> Item | None:
            nonlocal under_way
            under_way += 1
            assert under_way == 1
            await may_answer.wait()
            under_way -= 1
            return await read(key)

        monkeypatch.setattr(lab.cluster, "read_object", slowly)
        questions = [asyncio.create_task(asking.ask("pod shop/a")) for _ in range(explain.MOST_WAITING + 1)]
        await until(lambda: under_way == 1)
        done, waiting = await asyncio.wait(questions, return_when=asyncio.FIRST_COMPLETED)
        assert [one.result()[0] for one in done] == [429]
        assert (await asking.ask("pod shop/a"))[0] == 429
        may_answer.set()
        assert {status for status, _ in await asyncio.gather(*waiting)} == {200}
        may_answer.clear()
        monkeypatch.setattr(explain, "ANSWER", 0.1)
        assert (await asking.ask("pod shop/a"))[0] == 503
