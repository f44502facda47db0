"""Faults of the API server: it goes away, forgets, goes back in time, hangs, refuses and lies by omission."""

import asyncio
import itertools
import time

import pytest

from support.daemon import Daemon
from support.doors import CutAfter, Emptied, Refuse
from support.lab import (
    HEAL_WITHIN,
    IS_SOAK,
    ChaosLab,
    chaos,
    chaos_lab,
    created_of,
    is_blind,
    scaled,
    stays,
)
from support.real_servers import RealConsul

pytestmark = chaos("chaos-api")

OUTAGE = scaled(2, 60)
NUMBERS = itertools.count()
CANNOT = "cannot list; nothing of it is deregistered meanwhile"


@pytest.fixture
def name() -> str:
    """Return a cluster name of a test's own."""
    return f"lab-{next(NUMBERS)}"


async def _settled(lab: ChaosLab, daemon: Daemon) -> dict[str, int]:
    """Fill the cluster, wait until the catalog equals it, and return when each service was created."""
    lab.put_pods(300)
    lab.put_nodes(5)
    await lab.equal(daemon)
    await daemon.ready()
    return created_of(await lab.records())


async def _unharmed(lab: ChaosLab, before: dict[str, int]) -> None:
    """Fail when a service that is wanted all the time was removed, if only for a moment."""
    lab.assert_nothing_wrongful()
    kept = {key: index for key, index in before.items() if key in lab.wanted}
    now = created_of(await lab.records())
    assert {key: now.get(key) for key in kept} == kept


async def test_down_and_up_again(consul: RealConsul, name: str) -> None:
    """Nothing goes, it is shown, and what changed meanwhile is done soon after."""
    async with chaos_lab(consul, name=name) as lab, await lab.chaotic() as daemon:
        before = await _settled(lab, daemon)
        lab.api_wire.refuse()
        lab.drop_pod("web-7")
        lab.put_pod("new")
        await daemon.until(lambda: is_blind(daemon, "pod"))
        await daemon.until(lambda: is_blind(daemon, "node"))
        await asyncio.sleep(OUTAGE)
        assert created_of(await lab.records()) == before
        assert await daemon.is_ready()
        await lab.api_wire.heal()
        await lab.equal(daemon)
        await _unharmed(lab, before)
        await daemon.until(lambda: _sees(daemon))


async def _sees(daemon: Daemon) -> bool:
    return not (await is_blind(daemon, "pod") or await is_blind(daemon, "node"))


@pytest.mark.parametrize("history", ["compacted", "lower", "lower and ahead again"])
async def test_up_again_with_another_history(consul: RealConsul, name: str, history: str) -> None:
    """A version that is too old (410), or from a future that never was, leads to a new list, never to loss."""
    async with chaos_lab(consul, name=name) as lab, await lab.chaotic() as daemon:
        backup = lab.sandbox.kube.store.backup()
        lab.put_pods(300)
        lab.put_nodes(5)
        if history == "lower":
            backup = lab.sandbox.kube.store.backup()
            lab.put_pod("of-the-future")
        await lab.equal(daemon)
        before = created_of(await lab.records())
        lab.api_wire.refuse()
        await daemon.until(lambda: is_blind(daemon, "pod"))
        if history == "compacted":
            lab.drop_pod("web-7")
            lab.put_pod("new")
            lab.sandbox.kube.store.compact()
        elif history == "lower":
            lab.sandbox.kube.store.restore(backup)
            del lab.wanted["pod--shop--of-the-future"]
        else:
            lab.sandbox.kube.store.restore(backup)
            lab.wanted.clear()
            lab.put_pods(300)
            lab.put_nodes(5)
            lab.put_pod("new")
        await lab.api_wire.heal()
        await lab.equal(daemon)
        await _unharmed(lab, before)


async def test_hung_in_the_middle_of_a_watch(consul: RealConsul, name: str) -> None:
    """A server that stops answering and then goes on loses nothing and is waited for."""
    async with chaos_lab(consul, name=name) as lab, await lab.chaotic() as daemon:
        before = await _settled(lab, daemon)
        lab.api_wire.stall()
        lab.drop_pod("web-7")
        lab.put_pod("new")
        await asyncio.sleep(OUTAGE)
        assert created_of(await lab.records()) == before
        await lab.api_wire.heal()
        await lab.equal(daemon)
        await _unharmed(lab, before)


@pytest.mark.skipif(not IS_SOAK, reason="a watch is given up only after three silent minutes")
@pytest.mark.timeout(400)
async def test_watch_that_hangs_for_good(consul: RealConsul, name: str) -> None:
    """A connection that swallows everything and never ends is given up for its silence."""
    async with chaos_lab(consul, name=name) as lab, await lab.chaotic() as daemon:
        before = await _settled(lab, daemon)
        lab.api_wire.black_hole()
        lab.drop_pod("web-7")
        lab.put_pod("new")
        await asyncio.sleep(OUTAGE)
        await lab.api_wire.heal()
        await daemon.until_said(CANNOT, "neither event nor bookmark", within=200)
        await lab.equal(daemon)
        await _unharmed(lab, before)


async def test_answers_that_ask_for_patience(consul: RealConsul, name: str) -> None:
    """Refused lists and watches harm nothing, and are over soon after the server recovers."""
    async with chaos_lab(consul, name=name) as lab, await lab.chaotic() as daemon:
        before = await _settled(lab, daemon)
        for status in (429, 500, 504):
            lab.api.refuse(status, "1" if status == 429 else "")
            lab.forget_history()
            await daemon.until_said(CANNOT, f"answered {status}")
            await asyncio.sleep(OUTAGE)
            lab.drop_pod(f"web-{status - 400}")
            lab.put_pod(f"new-{status}")
        assert await is_blind(daemon, "pod")
        assert await is_blind(daemon, "node")
        assert created_of(await lab.records()) == before
        lab.api.heal()
        await lab.equal(daemon)
        await _unharmed(lab, before)


async def test_list_cut_in_the_middle(consul: RealConsul, name: str) -> None:
    """However often it breaks off, half a list removes nothing."""
    async with (
        chaos_lab(consul, name=name) as lab,
        await lab.chaotic() as daemon,
    ):
        lab.put_pods(900)
        before = await _settled(lab, daemon)
        lab.api.fault = lambda request: CutAfter(3_000) if request.path.endswith("/pods") else None
        lab.api_wire.cut()
        lab.drop_pod("web-7")
        lab.forget_history()
        await daemon.until_said(CANNOT, "pods")
        await asyncio.sleep(OUTAGE)
        assert created_of(await lab.records()) == before
        assert await is_blind(daemon, "pod")
        lab.api.heal()
        await lab.equal(daemon)
        await _unharmed(lab, before)


@pytest.mark.parametrize("plural", ["pods", "nodes"])
async def test_empty_list(consul: RealConsul, name: str, plural: str) -> None:
    """The brake holds what an empty list would remove, shows it, and a later full list ends it."""
    async with (
        chaos_lab(consul, name=name) as lab,
        await lab.chaotic(BRAKE_CONFIRM_START="5") as daemon,
    ):
        before = await _settled(lab, daemon)
        lab.api.break_lists(Emptied(), plural)
        lab.forget_history()
        line = await daemon.until_said("brake: a mass removal is held")
        assert line["source"] == plural
        held = {"pods": 300, "nodes": 5}[plural]
        await daemon.until(lambda: _holds(daemon, held))
        lab.api.heal()
        lab.put_pod("new")
        await lab.equal(daemon)
        await daemon.until(lambda: _holds(daemon, 0))
        await _unharmed(lab, before)


async def _holds(daemon: Daemon, count: int) -> bool:
    return await daemon.metric("brake_held_services") == count


@pytest.mark.parametrize("plurals", [("pods",), ("nodes",), ("pods", "nodes")], ids="+".join)
async def test_empty_list_on_the_first_pass(consul: RealConsul, name: str, plurals: tuple[str, ...]) -> None:
    """A start that sees nothing removes nothing, and goes right once it sees."""
    async with chaos_lab(consul, name=name) as lab:
        async with await lab.chaotic() as daemon:
            before = await _settled(lab, daemon)
        lab.api.break_lists(Emptied(), *plurals)
        lab.drop_pod("web-7")
        async with await lab.chaotic(BRAKE_CONFIRM_START="4") as daemon:
            await daemon.until_said("brake: a mass removal is held")
            await asyncio.sleep(1)
            lab.api.heal()
            await lab.equal(daemon)
        await _unharmed(lab, before)


@pytest.mark.parametrize("plural", ["pods", "nodes"])
async def test_right_withdrawn(consul: RealConsul, name: str, plural: str) -> None:
    """From one moment on a 403 blocks its kind alone; the other is followed on."""
    async with chaos_lab(consul, name=name) as lab, await lab.chaotic() as daemon:
        before = await _settled(lab, daemon)
        lab.api.break_lists(Refuse(403), plural)
        lab.api_wire.cut()
        await daemon.until_said(CANNOT, plural)
        lab.drop_pod("web-7")
        lab.sandbox.kube.delete("Node", "node-2")
        del lab.wanted["node--192.0.2.3"]
        lab.put_pod("new")
        lab.put_node("node-new", "192.0.2.77")
        other = {
            "pods": ("node--192.0.2.77", "node--192.0.2.3"),
            "nodes": ("pod--shop--new", "pod--shop--web-7"),
        }
        came, went = other[plural]

        async def is_followed() -> bool:
            held = await lab.records()
            return came in held and went not in held

        await daemon.until(is_followed)
        await asyncio.sleep(OUTAGE)
        own = {key: at for key, at in before.items() if key.startswith(plural[:-1])}
        assert created_of(await lab.records(), list(own)) == own
        assert await is_blind(daemon, plural[:-1])
        lab.api.heal()
        await lab.equal(daemon)
        await _unharmed(lab, before)


async def test_right_withdrawn_in_one_namespace(consul: RealConsul, name: str) -> None:
    """With NAMESPACES a 403 in one of them blocks that one alone."""
    async with chaos_lab(consul, name=name) as lab, await lab.chaotic(NAMESPACES="shop,bank") as daemon:
        lab.put_pods(20, "shop")
        lab.put_pods(20, "bank")
        await lab.equal(daemon)
        before = created_of(await lab.records())
        lab.api.break_lists(Refuse(403), "pods", namespace="bank")
        lab.api_wire.cut()
        await daemon.until_said(CANNOT, "bank")
        lab.drop_pod("web-3", "bank")
        lab.drop_pod("web-3", "shop")
        lab.put_pod("new", "shop")

        async def is_followed() -> bool:
            held = await lab.records()
            return "pod--shop--new" in held and "pod--shop--web-3" not in held

        await daemon.until(is_followed)
        assert "pod--bank--web-3" in await lab.records()
        assert await is_blind(daemon, "pod")
        lab.api.heal()
        await lab.equal(daemon)
        await _unharmed(lab, before)


async def test_expired_token(consul: RealConsul, name: str) -> None:
    """A token that is accepted no more blinds; the file's next one mends it."""
    async with chaos_lab(consul, name=name) as lab, await lab.chaotic() as daemon:
        before = await _settled(lab, daemon)
        lab.cluster.access.revoke(lab.token_file.read_text())
        lab.api_wire.cut()
        lab.drop_pod("web-7")
        lab.put_pod("new")
        await daemon.until_said(CANNOT, "our credentials are not accepted")
        await daemon.until(lambda: is_blind(daemon, "pod"))
        await stays(lambda: _is_as(lab, before), OUTAGE)
        lab.token_file.write_text(await lab.cluster.token())
        await lab.equal(daemon)
        await _unharmed(lab, before)


async def _is_as(lab: ChaosLab, before: dict[str, int]) -> bool:
    return created_of(await lab.records()) == before


async def test_flapping_for_a_while(consul: RealConsul, name: str) -> None:
    """Many short outages, each with a lost history, leave what must be removed no longer than others."""
    async with chaos_lab(consul, name=name) as lab, await lab.chaotic() as daemon:
        before = await _settled(lab, daemon)
        for number in range(scaled(5, 20)):
            lab.api_wire.refuse()
            lab.drop_pod(f"web-{number}")
            lab.sandbox.kube.store.compact()
            await asyncio.sleep(0.7)
            await lab.api_wire.heal()
            await asyncio.sleep(1.5)
        began = time.monotonic()
        await lab.equal(daemon)
        assert time.monotonic() - began < HEAL_WITHIN
        await _unharmed(lab, before)
