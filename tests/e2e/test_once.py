"""plan, sync and purge as commands: what they show, what they write, and how they end."""

import json
from collections import Counter

import pytest

from k8s_consul_registrar.registrar.absences import MOST_BY_NAME
from support.cluster import REGISTRAR_RULES, SCRAPED
from support.lab import SandboxLab, running_lab

WEB = "pod--shop--web-1"


async def run(lab: SandboxLab, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a command to its end and return its exit code and output."""
    if not lab.token_file.exists():
        lab.token_file.write_text(await lab.cluster.token(REGISTRAR_RULES))
    settings = {"CLUSTER_NAME": "lab", "CONSUL_ADDRESS": lab.consul_door.address, **environment}
    async with lab.daemon(*arguments, **settings) as command:
        code = await command.ended()
    return code, command.output


async def test_plan_without_consul_shows_the_targets() -> None:
    """With the backend none every target is new, no Consul is asked, and no other setting is needed."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        lab.consul_door.refuse()
        code, output = await run(lab, "plan", "--consul-backend", "none")
        assert (code, WEB in output) == (3, True), output
        assert "1 to register, 0 to update, 0 to deregister" in output


async def test_plan_shows_what_would_change_and_changes_nothing() -> None:
    """Exit 3 with a line a change, and 0 once there is nothing to do."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        await lab.seed_pod("gone")
        await lab.seed(WEB, {"cluster": "other"})
        await lab.cluster.add_pod("web-2")
        code, output = await run(lab, "plan")
        assert code == 3
        assert "+ pod--shop--web-2" in output
        assert "- pod--shop--gone" in output
        assert f"! {WEB}  conflict" in output
        assert "1 to register, 0 to update, 1 to deregister" in output
        assert lab.writes == []
        code, output = await run(lab, "plan", "--output", "json", LOG_LEVEL="error")
        assert {line["sign"] for line in json.loads(output)} == {"+", "-", "!"}


async def test_sync_makes_one_pass() -> None:
    """It writes what plan showed, after which plan has nothing to show."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        code, output = await run(lab, "sync", "--once")
        assert (code, "registered 1" in output) == (0, True)
        assert lab.has(WEB)
        assert (await run(lab, "plan"))[0] == 0
        await lab.cluster.set_pod_status(phase="Running", ips=["198.51.100.77"])
        code, output = await run(lab, "plan")
        assert code == 3
        assert f"~ {WEB}" in output
        assert "-> '198.51.100.77'" in output


async def test_sync_removes_nothing_of_a_held_removal() -> None:
    """A mass removal that only the first list infers is exit 3, and everything stays."""
    async with running_lab() as lab:
        for number in range(5):
            await lab.seed_pod(f"p{number}")
        assert (await run(lab, "sync", "--once"))[0] == 3
        assert len(lab.services) == 5
        code, _ = await run(lab, "sync", "--once", "--allow-mass-deregister")
        assert (code, len(lab.services)) == (0, 0)


async def test_plan_shows_rejections_conflicts_kept_and_held_services() -> None:
    """Each rejected object has a line, and everything that a sync counts is counted; JSON has the same lines."""
    async with running_lab() as lab:
        await lab.cluster.add_pod("bad-port", annotations={**SCRAPED, "prometheus.io/port": "none"})
        await lab.cluster.add_pod("bad-path", annotations={**SCRAPED, "prometheus.io/path": "http://x/y"})
        await lab.cluster.add_pod("taken")
        await lab.seed("pod--shop--taken", {"cluster": "other"})
        for name in ("gone-1", "gone-2", "gone-3", "bad-port"):
            await lab.seed_pod(name)
        code, output = await run(lab, "plan")
        assert code == 3  # a removal is held
        assert "! pod--shop--bad-port  rejected: unknown_port_name: " in output
        assert "! pod--shop--bad-path  rejected: invalid_path: " in output
        assert "! pod--shop--taken  conflict: held by " in output
        assert output.count("held by the brake: missing from pods") == 3
        assert (
            "0 to register, 0 to update, 0 to deregister, 0 unchanged, 1 in conflict, 3 held, 1 kept, 2 rejected"
        ) in output
        code, output = await run(lab, "plan", "--output", "json", LOG_LEVEL="error")
        lines = json.loads(output)
        assert {tuple(line) for line in lines} == {("sign", "id", "what")}
        assert Counter(line["what"].partition(":")[0] for line in lines) == {
            "rejected": 2,
            "conflict": 1,
            "held by the brake": 3,
        }
        assert lab.writes == []


async def test_plan_of_rejections_alone_has_nothing_to_do() -> None:
    """An object that cannot be a target is shown, and is no change: exit 0; sync counts it too."""
    async with running_lab() as lab:
        await lab.cluster.add_pod(annotations={**SCRAPED, "prometheus.io/scheme": "gopher"})
        code, output = await run(lab, "plan")
        assert (code, f"! {WEB}  rejected: invalid_scheme" in output) == (0, True)
        code, output = await run(lab, "sync")
        assert code == 0
        assert "registered 0, updated 0, deregistered 0, unchanged 0, refused 0, rejected 1" in output


async def test_plan_and_sync_confirm_many_absences_by_a_new_list() -> None:
    """More absences than are read by name wait for one more list, and are then acted on at once."""
    names = [f"p{number}" for number in range(MOST_BY_NAME + 20)]
    async with running_lab() as lab:
        for name in names:
            await lab.seed_pod(name)
        code, output = await run(lab, "plan", "--allow-mass-deregister")
        assert (code, f"{len(names)} to deregister" in output) == (3, True)
        assert len(lab.services) == len(names)
        assert (await run(lab, "plan"))[0] == 3
        assert len(lab.services) == len(names)
        code, output = await run(lab, "sync", "--allow-mass-deregister")
        assert (code, f"deregistered {len(names)}" in output) == (0, True)
        assert lab.services == {}


async def test_unreachable_server_is_exit_1_and_writes_nothing() -> None:
    """An API server or a Consul that does not answer is exit 1 with the reason, and nothing is written."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        code, output = await run(lab, "plan", CONSUL_ADDRESS="127.0.0.1:9")
        assert (code, "127.0.0.1:9" in output) == (1, True)
        lab.api_door.refuse()
        code, output = await run(lab, "sync", "--once")
        assert code == 1
        for form in ("diff", "json"):
            code, output = await run(lab, "plan", "--output", form)
            assert (code, "the plan is incomplete: pods: " in output) == (1, True), output
        assert lab.writes == []


async def test_variable_that_resembles_a_setting_is_named() -> None:
    """A command that ends soon says so as the modes do: a misspelt address leads to another Consul."""
    async with running_lab() as lab:
        for command in (("plan",), ("sync", "--once"), ("explain", "pod", "shop/web-1"), ("purge", "--yes")):
            _, output = await run(lab, *command, CONSUL_ADRESS="192.0.2.1:8500")
            assert "CONSUL_ADRESS is not a setting: CONSUL_ADDRESS is meant?" in output, command


@pytest.mark.parametrize("backend", ["agent", "catalog"])
async def test_purge_removes_what_is_ours_and_nothing_else(backend: str) -> None:
    """It asks first; another cluster's, another instance's and hand-made services stay."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        await lab.cluster.add_pod("web-2")
        assert (await run(lab, "sync", CONSUL_BACKEND=backend))[0] == 0
        assert (await run(lab, "sync", CONSUL_BACKEND=backend, INSTANCE="blue", SERVICE_ID_PREFIX="b-",
                          CONSUL_NODE_NAME="k8s-lab"))[0] == 0  # fmt: skip
        code, output = await run(lab, "purge", CONSUL_BACKEND=backend)
        assert (code, "--yes" in output, WEB in output) == (1, True, True)
        code, output = await run(lab, "purge", "--yes", CONSUL_BACKEND=backend)
        assert (code, "removed 2" in output) == (0, True)
        code, output = await run(lab, "purge", "--yes", CONSUL_BACKEND=backend, INSTANCE="blue",
                                 CONSUL_NODE_NAME="k8s-lab")  # fmt: skip
        assert "removed 2" in output


async def test_purge_needs_a_name() -> None:
    """The default cluster name proves nothing: several clusters may have it."""
    async with running_lab() as lab:
        code, output = await run(lab, "purge", "--yes", CLUSTER_NAME="")
        assert (code, "CLUSTER_NAME" in output) == (2, True)
