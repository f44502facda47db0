"""HTTP_SD_STATE_FILE and the recorded selection in the daemon: restarts, and what they serve and remove."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from e2e.test_http_sd import served
from support.cluster import rule
from support.daemon import Daemon
from support.lab import SandboxLab, running_lab
from support.waiting import PATIENCE

FOREVER = "600"
WEB = "pod--shop--web-1"


def settings_of(lab: SandboxLab, **changes: str) -> dict[str, str]:
    """Return settings without Consul, with the file."""
    given = {
        "CONSUL_BACKEND": "none",
        "HTTP_SD_PORT": "0",
        "HTTP_SD_STATE_FILE": str(lab.folder / "state.json"),
    }
    return {**given, **changes}


async def ask(daemon: Daemon, query: str = "") -> tuple[int, str, dict[str, str]]:
    """Return status, text and headers of one request."""
    url = f"http://127.0.0.1:{await daemon.port('http_sd_port')}/sd/targets{query}"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text(), dict(response.headers)


async def saved_by_a_first_run(lab: SandboxLab, number: int = signal.SIGTERM) -> str:
    """Run once with one Pod until it is saved, end by a signal, and return what was served."""
    async with await lab.registrar(**settings_of(lab)) as daemon:
        await lab.cluster.add_pod()
        await daemon.until(lambda: _serves(daemon, WEB))
        text = (await ask(daemon))[1]
        if number == signal.SIGTERM:
            assert await daemon.terminate() == 0
        else:
            await daemon.until(lambda: WEB in _content(lab), "saved", within=2 * PATIENCE)
            daemon.send(number)
            await daemon.ended()
    return text


def _content(lab: SandboxLab) -> str:
    path = lab.folder / "state.json"
    return path.read_text() if path.exists() else ""


async def _serves(daemon: Daemon, *ids: str) -> bool:
    return set(await served(daemon)) == set(ids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_restart_while_the_api_server_is_away_serves_what_was_saved(number: int) -> None:
    """The same document, marked as stale, until the cluster was listed; then the cluster's own."""
    async with running_lab() as lab:
        text = await saved_by_a_first_run(lab, number)
        lab.api_door.refuse()
        async with await lab.registrar(**settings_of(lab)) as daemon:
            await daemon.until(lambda: _serves(daemon, WEB))
            status, stale, headers = await ask(daemon)
            assert (status, stale) == (200, text)
            assert headers["X-Stale-Since"].endswith("Z")
            assert 0 <= int(headers["Age"]) < 600
            assert await _serves(daemon, WEB)
            assert (await ask(daemon, "?kind=node"))[:2] == (200, "[]\n")
            assert len(daemon.said("serving targets that an earlier process saved")) == 1
            await lab.api_door.heal()
            await lab.cluster.add_pod("web-2", ips=["198.51.100.11"])
            await daemon.until(lambda: _serves(daemon, WEB, "pod--shop--web-2"))
            headers = (await ask(daemon))[2]
            assert "X-Stale-Since" not in headers
            assert "Age" not in headers


async def test_standby_saves_and_serves_too() -> None:
    """A replica that never led begins with what it saved."""
    election = {
        "LEADER_ELECTION": "true",
        "CONSUL_BACKEND": "catalog",
        "LEASE_NAMESPACE": "default",
        "HTTP_SD_PORT": "0",
    }
    leases = rule("get create update", "leases", group="coordination.k8s.io")
    async with running_lab() as lab:
        lab.token_file.write_text(
            await lab.cluster.token([rule("list watch", "pods nodes"), rule("get", "namespaces"), leases])
        )
        await lab.cluster.add_pod()
        async with await lab.registrar(**election) as leader:
            await leader.until_said("became leader")
            await leader.until(lambda: _serves(leader, WEB))
            settings = {**election, "HTTP_SD_STATE_FILE": str(lab.folder / "state.json")}
            async with await lab.registrar(**settings) as standby:
                await standby.until(lambda: _serves(standby, WEB))
                await standby.until(standby.is_ready)
                assert await standby.terminate() == 0
            lab.api_door.refuse()
            async with await lab.registrar(**settings) as standby:
                await standby.until(lambda: _serves(standby, WEB))
                assert "X-Stale-Since" in (await ask(standby))[2]


@pytest.mark.parametrize(
    "changes",
    [{"INSTANCE": "blue"}, {"CLUSTER_NAME": "other"}, {"SERVICE_TAGS": "a"}, {"NAMESPACES": "shop"}],
)
async def test_targets_saved_under_other_settings_are_not_served(changes: dict[str, str]) -> None:
    """503 until the cluster was listed, as without a file."""
    async with running_lab() as lab:
        await saved_by_a_first_run(lab)
        lab.api_door.refuse()
        async with await lab.registrar(**settings_of(lab, **changes)) as daemon:
            await daemon.until_said("saved targets are not used", "written under another")
            await daemon.until_said("cannot list; nothing of it is deregistered meanwhile")
            await asyncio.sleep(3)
            assert (await ask(daemon))[0] == 503


async def test_targets_saved_of_another_cluster_are_never_served() -> None:
    """As soon as the API server says which cluster it is, and Pods cannot be listed, the answer is 503."""
    async with running_lab() as lab:
        await saved_by_a_first_run(lab)
        path = lab.folder / "state.json"
        path.write_text(_content(lab).replace(await lab.cluster.uid(), "the-uid-of-another-cluster"))
        lab.token_file.write_text(await lab.cluster.token([rule("get", "namespaces")]))
        async with await lab.registrar(**settings_of(lab)) as daemon:
            await daemon.until_said("saved targets are dropped", "another cluster")
            status, text, _ = await ask(daemon)
            assert status == 503
            assert "pods" in text


async def test_one_kind_is_served_while_the_other_is_denied() -> None:
    """A request for what is listed is answered, any other one names what is not."""
    async with running_lab() as lab:
        lab.token_file.write_text(
            await lab.cluster.token([rule("list watch", "pods"), rule("get", "namespaces")])
        )
        await lab.cluster.add_pod()
        async with await lab.registrar(CONSUL_BACKEND="none", HTTP_SD_PORT="0") as daemon:
            await daemon.until_said("cannot list; nothing of it is deregistered meanwhile", "nodes")
            await daemon.until(lambda: _answers(daemon, "?kind=pod", 200))
            assert WEB in (await ask(daemon, "?kind=pod"))[1]
            assert WEB in (await ask(daemon, "?namespace=shop"))[1]
            for query in ("", "?kind=node", "?kind=pod&kind=node", "?shard_path=s1"):
                status, text, headers = await ask(daemon, query)
                assert (status, headers["Retry-After"]) == (503, "5")
                assert "nodes are not listed yet" in text
                assert "pods" not in text.split(":")[0]


async def _answers(daemon: Daemon, query: str, status: int) -> bool:
    return (await ask(daemon, query))[0] == status


async def test_folder_that_cannot_be_written_is_exit_2() -> None:
    """By the setting's name, before anything else begins."""
    async with running_lab() as lab:
        settings = settings_of(lab, HTTP_SD_STATE_FILE=str(lab.folder / "missing" / "state.json"))
        async with await lab.registrar(**settings) as daemon:
            assert await daemon.ended() == 2
            assert "HTTP_SD_STATE_FILE: cannot write in" in daemon.output


CATALOG = {"CONSUL_BACKEND": "catalog", "HTTP_SD_PORT": "0", "BRAKE_CONFIRM_START": FOREVER}


NODE = "node--192.0.2.10"
EVERYTHING = [NODE, *(f"pod--shop--web-{number}" for number in range(10))]
LEFT = [NODE, *(f"pod--shop--web-{number}" for number in range(6, 10))]


async def node_meta(lab: SandboxLab) -> dict[str, Any]:
    """Return the meta of the catalog's node."""
    url = f"http://{lab.consul_address}/v1/catalog/node/k8s-lab"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        found = await response.json()
    return dict(found["Node"]["Meta"]) if found and found.get("Node") else {}


async def has_selection(lab: SandboxLab) -> bool:
    """Return whether the node says a selection."""
    return "selection" in await node_meta(lab)


async def ten_pods_of_which_six_go(lab: SandboxLab, **settings: str) -> None:
    """Register ten Pods of a Node by a first run, end it, and delete six."""
    await lab.cluster.add_node("node-a", ("InternalIP", "192.0.2.10"))
    for number in range(10):
        await lab.cluster.add_pod(f"web-{number}", ips=[f"198.51.100.{number + 10}"])
    async with await lab.registrar(**settings) as daemon:
        await daemon.ready()
        await daemon.until(lambda: _serves(daemon, *EVERYTHING))
        if settings["CONSUL_BACKEND"] == "catalog":
            await daemon.until(lambda: has_selection(lab))
        await daemon.passes()
        assert await daemon.terminate() == 0
    for number in range(6):
        await lab.cluster.delete_pod(f"web-{number}")


@pytest.mark.parametrize("record", ["node", "file"])
async def test_absences_after_a_restart_with_the_same_selection_wait_the_short_time(record: str) -> None:
    """Six of ten Pods that are confirmed absent by name go after BRAKE_CONFIRM."""
    async with running_lab() as lab:
        settings = {**CATALOG, "BRAKE_CONFIRM": "0.5"}
        if record == "file":
            file = str(lab.folder / "state.json")
            settings |= {"CONSUL_BACKEND": "agent", "HTTP_SD_STATE_FILE": file}
        await ten_pods_of_which_six_go(lab, **settings)
        async with await lab.registrar(**settings) as daemon:
            await daemon.until(lambda: _serves(daemon, *LEFT))


@pytest.mark.parametrize(
    ("record", "changes"),
    [
        ("node", {"SERVICE_TAGS": "new"}),
        pytest.param("node", {"POD_LABEL_SELECTOR": "app!=none"}, marks=pytest.mark.long),
        pytest.param("file", {"SERVICE_TAGS": "new"}, marks=pytest.mark.long),
        pytest.param("file", {"POD_LABEL_SELECTOR": "app!=none"}, marks=pytest.mark.long),
        pytest.param("none", {}, marks=pytest.mark.long),
    ],
)
async def test_absences_after_a_restart_with_another_selection_wait_the_long_time(
    record: str, changes: dict[str, str]
) -> None:
    """They are held for BRAKE_CONFIRM_START, and stay targets; a restart in between shortens nothing."""
    async with running_lab() as lab:
        settings = {**CATALOG, "BRAKE_CONFIRM": "0.5"}
        if record != "node":
            settings["CONSUL_BACKEND"] = "agent"
        if record == "file":
            settings["HTTP_SD_STATE_FILE"] = str(lab.folder / "state.json")
        await ten_pods_of_which_six_go(lab, **settings)
        settings |= changes
        for _ in range(2):
            async with await lab.registrar(**settings) as daemon:
                line = await daemon.until_said("brake: a mass removal is held")
                assert "600 s" in line["held"]
                await daemon.passes(3)
                assert await _serves(daemon, *EVERYTHING)
                kept = [one for one in (await served(daemon)).values() if "web-0" in str(one)]
                assert kept[0]["labels"]["__meta_consul_service_metadata_pod"] == "web-0"
                assert kept[0]["targets"] == ["198.51.100.10:9102"]
                await daemon.measures('targets{kind="pod",state="kept"}', 6)
                _, page = await daemon.admin("/api/v1/targets?state=kept")
                assert msgspec.json.decode(page)["found"] == 6
                assert await daemon.terminate() == 0


def names(folder: Path) -> list[str]:
    """Return what is in a folder."""
    return [one.name for one in folder.iterdir()]


async def test_file_is_private_and_whole(tmp_path: Path) -> None:
    """Its mode lets its owner alone read it, and nothing else is left in the folder."""
    async with running_lab() as lab:
        path = tmp_path / "state.json"
        async with await lab.registrar(**settings_of(lab, HTTP_SD_STATE_FILE=str(path))) as daemon:
            await lab.cluster.add_pod()
            await daemon.until(lambda: _serves(daemon, WEB))
            assert await daemon.terminate() == 0
        assert oct(path.stat().st_mode & 0o777) == "0o600"
        assert names(tmp_path) == ["state.json"]
