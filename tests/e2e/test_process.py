"""The daemon as a process: its settings, its signals, its exit codes, and what its output never holds."""

import json
import signal
from pathlib import Path

import pytest

from k8s_consul_registrar.settings.reading import SETTINGS
from support.cluster import rule
from support.daemon import STOP_WITHIN, Daemon
from support.lab import running_lab

WEB = "pod--shop--web-1"
MARKER = "s3cr3t-marker-token-0123456789"


def run(folder: Path, *arguments: str, **environment: str) -> Daemon:
    """Return a daemon that has no cluster and no Consul, not started yet."""
    return Daemon(arguments, environment, folder, secrets=[MARKER])


async def test_every_wrong_setting_is_told_at_once(tmp_path: Path) -> None:
    """Exit 2, each mistake by the name of its variable, and nothing was started."""
    wrong = {
        "CLUSTER_NAME": "a name/with everything",
        "INSTANCE": "x" * 51,
        "CONSUL_ADDRESS": f"http://user:{MARKER}@127.0.0.1:8500",
        "CONSUL_HTTP_SSL_VERIFY": "perhaps",
        "BRAKE_CONFIRM": "soon",
        "PROXY_NODE_PORT": "70000",
        "SHARD_PATHS": "x" * 600,
        "ADMIN_PORT": "http",
        "LOG_LEVEL": "loud",
        "LOG_FORMAT": "xml",
    }
    async with run(tmp_path, "registrar", **wrong) as daemon:
        assert await daemon.ended() == 2
        for name in wrong:
            assert f"\n  - {name}: " in daemon.output
        assert "registrar starts" not in daemon.output


async def test_every_wrong_setting_of_the_proxy_is_told_at_once(tmp_path: Path) -> None:
    """The same for the other mode."""
    wrong = {
        "PORT": "0x50",
        "PROXY_PATHS": "/metrics/cadvisor,/exec",
        "SCRAPE_TIMEOUT_MAX": "never",
        "SCRAPE_CONCURRENCY": "0",
        "KUBELET_TLS_SERVER_NAME": "anything",
    }
    async with run(tmp_path, "proxy", **wrong) as daemon:
        assert await daemon.ended() == 2
        for name in wrong:
            assert f"\n  - {name}: " in daemon.output


@pytest.mark.parametrize("period", ["0", "-1", "often", "nan"])
async def test_wrong_period_is_no_reason_to_stop(period: str) -> None:
    """SYNC_PERIOD falls back to its default with a warning, as the original does."""
    async with running_lab() as lab, await lab.registrar(SYNC_PERIOD=period) as daemon:
        await lab.cluster.add_pod()
        await daemon.ready()
        assert f"SYNC_PERIOD {period!r} is not a number of seconds above 0: 600 is used" in daemon.output


@pytest.mark.parametrize("given", [("relay", {}), ("", {"MODE": "relay"})])
async def test_unknown_mode_names_the_choices(tmp_path: Path, given: tuple[str, dict[str, str]]) -> None:
    """Exit 2, by command or by variable."""
    command, environment = given
    async with run(tmp_path, *([command] if command else []), **environment) as daemon:
        assert await daemon.ended() == 2
        assert "'relay' is not one of: registrar, proxy" in daemon.output


async def test_help_documents_every_variable(tmp_path: Path) -> None:
    """`--help` names each setting and exits 0."""
    async with run(tmp_path, "--help") as daemon:
        assert await daemon.ended() == 0
        for name in ("MODE", *(option.env for option in SETTINGS)):
            assert name in daemon.output


RETIRED = f"""
current-context: a
contexts: [{{name: a, context: {{cluster: a, user: a}}}}]
clusters: [{{name: a, cluster: {{server: "https://127.0.0.1:1"}}}}]
users: [{{name: a, user: {{auth-provider: {{name: gcp, config: {{access-token: {MARKER}}}}}}}}}]
"""
BROKEN_KUBECONFIGS = {
    "absent": (None, "there is no"),
    "no yaml": ("{]", "kubeconfig"),
    "a list": ("- 1\n", "kubeconfig"),
    "no context": ("apiVersion: v1\nkind: Config\nclusters: []\n", "current-context"),
    "retired": (RETIRED, "exec"),
    "token in no yaml": (f"users: [{{name: a, user: {{token: {MARKER}}}}}]\n}}{{", "kubeconfig"),
}


@pytest.mark.parametrize("mode", ["registrar", "proxy"])
@pytest.mark.parametrize("case", BROKEN_KUBECONFIGS)
async def test_broken_kubeconfig_is_told_in_a_line(tmp_path: Path, case: str, mode: str) -> None:
    """Exit 2 with the file and what is wrong with it, and never a token out of it."""
    text, said = BROKEN_KUBECONFIGS[case]
    path = tmp_path / "the-kubeconfig"
    if text is not None:
        path.write_text(text)
    async with run(tmp_path, mode, KUBECONFIG=str(path), CLUSTER_NAME="lab", PORT="0") as daemon:
        assert await daemon.ended() == 2
        assert str(path) in daemon.output
        assert said in daemon.output


async def test_without_any_kubeconfig_it_says_where_it_looked(tmp_path: Path) -> None:
    """Exit 2 when there is no cluster to talk to."""
    async with run(tmp_path, "registrar", CLUSTER_NAME="lab") as daemon:
        assert await daemon.ended() == 2
        assert "KUBECONFIG is not set" in daemon.output


@pytest.mark.parametrize("hangs", ["nothing", "consul", "api", "both refuse"])
async def test_sigterm_ends_the_registrar_in_time(hangs: str) -> None:
    """Exit 0 within 5 seconds, whatever it waits for, and what is registered stays."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_pod()
        await daemon.until(lambda: lab.has(WEB))
        if hangs == "both refuse":
            lab.consul_door.refuse()
            lab.api_door.refuse()
            await daemon.until_said("Consul cannot be used; trying again")
        elif hangs != "nothing":
            door = lab.consul_door if hangs == "consul" else lab.api_door
            door.stall()
            await lab.cluster.add_pod("web-2")
            await daemon.until(lambda: door.is_held)
        assert await daemon.terminate() == 0
        assert lab.has(WEB)
        assert daemon.said("registrar ends; what is registered stays")


@pytest.mark.parametrize("door", ["consul", "api"])
async def test_sigterm_ends_a_registrar_that_never_got_going(door: str) -> None:
    """A first request that hangs does not hold up the end."""
    async with running_lab() as lab:
        stalled = lab.consul_door if door == "consul" else lab.api_door
        stalled.stall()
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: stalled.is_held)
            assert await daemon.terminate() == 0


async def test_sigint_is_quiet() -> None:
    """Ctrl-C ends it at once with 130."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await daemon.ready()
        daemon.send(signal.SIGINT)
        assert await daemon.ended(STOP_WITHIN) == 130


async def test_no_secret_reaches_the_log() -> None:
    """Tokens of either side stay out of every line, at the level that says most and while all goes wrong."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        right = await lab.cluster.token()
        lab.token_file.write_text(MARKER)
        settings = {"LOG_LEVEL": "debug", "CONSUL_HTTP_TOKEN": f"{MARKER}-of-consul"}
        async with await lab.registrar(**settings) as daemon:
            await daemon.until_said("cannot list; nothing of it is deregistered meanwhile", "not accepted")
            lab.api_door.refuse()
            await daemon.until_said("cannot list; nothing of it is deregistered meanwhile", "no connection")
            lab.consul_door.refuse()
            lab.token_file.write_text(right)
            await lab.api_door.heal()
            await daemon.until_said("Consul cannot be used; trying again")
            await lab.consul_door.heal()
            await daemon.until(lambda: lab.has(WEB))
            pages = [(await daemon.admin(path))[1] for path in ("/readyz", "/healthz", "/metrics")]
            for secret in (MARKER, right):
                assert secret not in daemon.output
                assert secret not in "".join(pages)


async def test_health_and_metrics_of_a_healthy_registrar() -> None:
    """Alive, ready, and figures that agree with what is registered."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_pod()
        await lab.cluster.add_node("node-a", ("InternalIP", "192.0.2.10"))
        await daemon.until(lambda: lab.has(WEB, "node--192.0.2.10"))
        await daemon.passes()
        await daemon.ready()
        assert await daemon.admin("/healthz") == await daemon.admin("/readyz") == (200, "ok\n")
        for kind in ("pod", "node"):
            await daemon.measures(f'targets{{kind="{kind}",state="registered"}}', 1)
        assert await daemon.metric('writes_total{verb="register",outcome="success"}') is None
        assert await daemon.metric('writes_total{outcome="success",verb="register"}') == 2
        assert (await daemon.metric('passes_total{outcome="success"}') or 0) >= 2


async def test_every_log_line_is_json() -> None:
    """Without a terminal the log is JSON, one object a line, with level and time, and nothing between."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        lab.token_file.write_text(await lab.cluster.token([rule("list", "nodes")]))
        await daemon.until_said("cannot list; nothing of it is deregistered meanwhile")
        assert await daemon.terminate() == 0
        for line in daemon.output.splitlines():
            assert {"event", "level", "timestamp"} <= json.loads(line).keys()


async def test_console_format_is_for_people() -> None:
    """LOG_FORMAT=console writes lines of text; without a terminal they are not coloured."""
    async with running_lab() as lab, await lab.registrar(LOG_FORMAT="console") as daemon:
        await daemon.until(lambda: "registrar starts" in daemon.output)
        assert await daemon.terminate() == 0
        assert "\x1b" not in daemon.output
        assert not daemon.lines
