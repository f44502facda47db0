"""Every command that the documents show, run as it is written there.

Only the ports, addresses and files in it are exchanged for those of the test. A block that no test can run is
marked as an example in the document, with the reason.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from aiohttp import web

from e2e.test_services import POINTS, SLICES, add_service, allow, slice_body
from k8s_consul_registrar.admin.http_sd import HttpSdServer
from k8s_consul_registrar.sandbox.certificates import Authority
from support.certificates import PlainCA
from support.documents import commands_to_run, shell_blocks
from support.files import DEPLOY, ROOT
from support.lab import running_lab
from support.processes import LOOPBACK, Program, reserve_ports
from support.real_servers import REAL, ROOT_TOKEN, consul_binary, fetched_prometheus, real_consul
from support.seen import Registrar, pod_target
from support.waiting import PATIENCE, until

REGISTRAR = r"k8s-consul-registrar "
# A mode, which runs until a signal: by the name of the command, or by variables before the module.
MODE = rf"{REGISTRAR}(registrar|proxy) |([A-Z_]+=\S+ )+python -m k8s_consul_registrar$"
SANDBOX = r"python -m k8s_consul_registrar\.sandbox "
TO_THE_SANDBOX = "/tmp/sandbox.kubeconfig"
CURL = "curl "
# The other commands, each kind by what it begins with.
ENDS = rf"{REGISTRAR}(plan|sync|purge|explain|lint|check delivery|--help)"
FETCH = rf"{REGISTRAR}fetch-targets "
ACL = r"consul acl (policy|token) "
OPENSSL = "openssl "
PROMETHEUS = r"\.cache/real/prometheus"
PIP = "pip install "
MAKE = "make "
KINDS = (MODE, SANDBOX, CURL, ENDS, FETCH, ACL, OPENSSL, PROMETHEUS, PIP, MAKE)
# There is something to do, something would be rejected, and the collector lacks every target.
EXIT_CODES = {"plan": 3, "lint": 3, "check": 1}
REJECTED = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart, namespace: shop}
spec:
  template:
    metadata: {annotations: {scrape.example.com/scrape: "true"}}
    spec: {containers: [{name: app, image: "registry.example/cart:1"}]}
"""


def shown(kind: str, *pages: Path) -> list[str]:
    """Return the commands of a kind that are to be run."""
    found = [one for one in commands_to_run(*pages) if re.match(kind, one)]
    assert found, f"no document shows a command like {kind}"
    return found


def test_every_command_is_run_or_an_example() -> None:
    """A command is of exactly one kind that a test below runs, or its block says why it is an example."""
    of_no_kind = [
        f"{block.place}: {command}"
        for block in shell_blocks()
        if not block.reason
        for command in block.commands
        if sum(bool(re.match(kind, command)) for kind in KINDS) != 1
    ]
    assert of_no_kind == []


def test_examples_name_what_exists() -> None:
    """An example cannot be run, but what it says of `deploy/` is there: files, objects, containers."""
    manifests = "\n".join(path.read_text() for path in DEPLOY.rglob("*.yaml"))
    names = set(re.findall(r"^ +name: (\S+)", manifests, re.MULTILINE))
    names |= set(re.findall(r"- name: (\S+)", manifests))
    examples = [command for block in shell_blocks() if block.reason for command in block.commands]
    named = [
        name
        for command in examples
        for name in re.findall(r"(?:deploy/|deployment[ /]|job[ /]|(?<=exec )\S+ -c )(k8s-[\w-]+)", command)
    ]
    assert len(named) > 10
    assert set(named) - names <= {"k8s-consul-registrar-old"}
    files = [path for command in examples for path in re.findall(r"-f (deploy/\S+)", command)]
    assert files
    assert [path for path in files if not (ROOT / path).exists()] == []


class Place(NamedTuple):
    """Where a test runs the commands: a folder, variables, and what is exchanged in them, text for text."""

    folder: Path
    environment: Mapping[str, str]
    exchanged: Mapping[str, str]

    def adapted(self, command: str) -> str:
        """Return a command with the test's ports, addresses and files."""
        for text, its_own in self.exchanged.items():
            command = re.sub(rf"(?<![\w.]){re.escape(text)}(?![\w])", its_own, command)
        return command

    @property
    def variables(self) -> dict[str, str]:
        """The whole environment: this Python comes first on PATH, and nothing else is inherited."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.folder), **self.environment}

    async def ended(self, command: str, cwd: Path = ROOT, keys: bytes = b"") -> tuple[int, str]:
        """Run a command on a terminal of its own to its end; return the exit code and what it printed."""
        ours, its = os.openpty()
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            self.adapted(command),
            stdin=its,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self.variables,
            cwd=cwd,
        )
        try:
            os.write(ours, keys)
            said, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            os.close(ours)
            os.close(its)
        assert process.returncode is not None
        return process.returncode, said.decode()

    @contextlib.asynccontextmanager
    async def running(self, command: str) -> AsyncIterator[Program]:
        """Run a command that lasts; it must end well by SIGTERM."""
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}.log"
        script = f"cd {self.folder}; exec env {self.adapted(command)}"
        program = Program(["bash", "-c", script], log, environment=self.variables)
        program.launch()
        try:
            yield program
            program.send(signal.SIGTERM)
            assert await program.ended(PATIENCE) == 0, program.tail()
        finally:
            await program.stop(signal.SIGKILL)


async def answer(url: str) -> tuple[int, str]:
    """Return status and text of a URL, 0 where nothing answers."""
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, await response.text()
    except aiohttp.ClientError:
        return 0, ""


@contextlib.asynccontextmanager
async def sandbox(folder: Path) -> AsyncIterator[tuple[Place, Mapping[str, int]]]:
    """Run the sandbox by its documented command; the ports that documents name lead to reserved ones."""
    documented = (8080, 8081, 8082, 8090, 8500, 9090)
    ports = {str(port): its_own for port, its_own in zip(documented, reserve_ports(6), strict=True)}
    kubeconfig = folder / "sandbox.kubeconfig"
    exchanged = {port: str(its_own) for port, its_own in ports.items()}
    environment = {
        "ADMIN_PORT": exchanged["8081"],
        "PORT": exchanged["8080"],
        "CONSUL_ADDRESS": f"{LOOPBACK}:{exchanged['8500']}",
        "DRAIN_DELAY": "0",
    }
    place = Place(folder, environment, {**exchanged, TO_THE_SANDBOX: str(kubeconfig)})
    (command,) = shown(SANDBOX)
    async with place.running(command) as program:

        async def is_up() -> bool:
            return program.output().endswith("\n") and kubeconfig.exists()

        await until(is_up, context=program.tail)
        (folder / ".kube").mkdir()
        shutil.copy(kubeconfig, folder / ".kube" / "config")
        yield place, ports


async def ready(program: Program, port: int) -> None:
    """Wait until the mode at an admin port is ready."""

    async def is_ready() -> bool:
        assert program.is_running, program.output()
        return (await answer(f"http://{LOOPBACK}:{port}/readyz"))[0] == 200

    await until(is_ready, context=program.tail)


async def no_targets(_: web.Request) -> web.Response:
    """Answer as a Prometheus without targets."""
    return web.json_response({"status": "success", "data": {"activeTargets": [], "droppedTargets": []}})


async def test_commands_that_end_do_so_as_documented() -> None:
    """`plan`, `sync`, `explain` and the others on a cluster with the objects that the documents name."""
    collector = web.Application()
    collector.router.add_get("/api/v1/targets", no_targets)
    runner = web.AppRunner(collector)
    await runner.setup()
    site = web.TCPSite(runner, LOOPBACK, 0)
    await site.start()
    collected: tuple[str, int] = runner.addresses[0]
    async with running_lab() as lab:
        await lab.cluster.add_pod("cart-0", ips=["198.51.100.11"])
        await lab.cluster.add_node("worker-1", ("InternalIP", "192.0.2.11"))
        await allow(lab)
        await add_service(lab)
        await lab.cluster.request("POST", SLICES, slice_body("web-a", POINTS[:1]))
        (lab.folder / "deploy").mkdir()
        (lab.folder / "deploy" / "cart.yaml").write_text(REJECTED)
        place = Place(
            lab.folder,
            {"KUBECONFIG": str(lab.kubeconfig), "CONSUL_ADDRESS": lab.consul_address},
            {
                "127.0.0.1:8500": lab.consul_address,
                TO_THE_SANDBOX: str(lab.kubeconfig),
                "prometheus.example:9090": f"{collected[0]}:{collected[1]}",
            },
        )
        for command in shown(ENDS):
            verb = command.split()[1]
            code, said = await place.ended(command, cwd=lab.folder, keys=b"yes\n")
            assert code == EXIT_CODES.get(verb, 0), f"{command}\n{said}"
            if verb == "plan":
                assert "2 to register" in said
            if verb == "lint":
                assert "error: Deployment shop/cart: no_port: no port is annotated" in said
            if verb == "sync":
                assert lab.has("pod--shop--cart-0", "node--192.0.2.11")
            if verb == "purge":
                assert lab.holds_nothing(), said
    await runner.cleanup()


@pytest.mark.long
async def test_modes_run_until_a_signal(tmp_path: Path) -> None:
    """Each command that starts a mode becomes ready on the sandbox's cluster, and ends by SIGTERM."""
    async with sandbox(tmp_path) as (place, ports):
        issued = PlainCA().issue(LOOPBACK)
        (tmp_path / "proxy.crt").write_bytes(issued.certificate)
        (tmp_path / "proxy.key").write_bytes(issued.key)
        (tmp_path / "proxy.token").write_text("a-token-of-the-test")
        for command in shown(MODE):
            admin = ports["8082"] if "ADMIN_PORT=8082" in command else ports["8081"]
            async with place.running(command) as program:
                await ready(program, admin)


PAGES_WITH_CURL = sorted(
    {
        block.page
        for block in shell_blocks()
        if not block.reason and ".zh-CN" not in block.page.name  # its commands are the same
        if any(one.startswith(CURL) for one in block.commands)
    }
)


@pytest.mark.parametrize("page", PAGES_WITH_CURL, ids=lambda page: page.name)
async def test_what_a_page_starts_answers_what_it_asks(page: Path, tmp_path: Path) -> None:
    """The modes that a page starts on the sandbox run side by side, and each `curl` has its answer."""
    modes = [command for command in shown(MODE, page) if TO_THE_SANDBOX in command]
    async with sandbox(tmp_path) as (place, ports), contextlib.AsyncExitStack() as stack:
        for command in modes:
            program = await stack.enter_async_context(place.running(command))
            await ready(program, ports["8082"] if "ADMIN_PORT=8082" in command else ports["8081"])
        for command in shown(CURL, page):
            code, said = await place.ended(command.replace("curl -s", "curl -sS --fail-with-body"))
            assert (code, bool(said)) == (0, True), f"{command}\n{said}"
            if "/v1/agent/services" in command:
                assert json.loads(said).keys() >= {"node--127.0.0.2"}
            elif "cadvisor" in command:
                assert "cadvisor_version_info{" in said
            elif "/sd/targets" in command:
                assert json.loads(said)


async def test_targets_are_fetched_as_documented(tmp_path: Path) -> None:
    """`fetch-targets` fills its folder from the registrars that the command names."""
    registrar, folder = Registrar(), tmp_path / "prometheus" / "targets"
    registrar.put(pod_target("web-1"))
    folder.mkdir(parents=True)
    (folder.parent / "registrar.token").write_text("a-token-of-the-test")
    (folder.parent / "ca.crt").write_bytes(Authority().pem)
    async with HttpSdServer(port=0, view=registrar) as server:
        url = f"http://{LOOPBACK}:{server.port}"
        exchanged = {
            "/etc/prometheus": str(folder.parent),
            "https://registrar.east.example:8443": url,
            "https://registrar.west.example:8443": url,
        }
        place = Place(tmp_path, {}, exchanged)
        (command,) = shown(FETCH)
        async with place.running(command) as program:

            async def are_there() -> bool:
                assert program.is_running, program.output()
                return {path.name for path in folder.glob("*.json")} == {"east.json", "west.json"}

            await until(are_there, context=program.tail)
    for name in ("east", "west"):
        (group,) = json.loads((folder / f"{name}.json").read_bytes())
        assert group["labels"]["__meta_consul_service_id"] == "pod--shop--web-1"


@REAL
async def test_acl_commands_are_accepted_by_consul(tmp_path: Path) -> None:
    """Policies and tokens are made, in order, from the policies on the pages, by Consul's own program."""
    page = (ROOT / "docs" / "consul.md").read_text()
    registrar, agent = re.findall(r"^```hcl\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[:2]
    (tmp_path / "policy.hcl").write_text(registrar)
    (tmp_path / "agent-policy.hcl").write_text(agent)
    async with real_consul(acl=True) as consul:
        path = f"{consul_binary().parent}{os.pathsep}{os.environ['PATH']}"
        settings = {"CONSUL_HTTP_ADDR": consul.address, "CONSUL_HTTP_TOKEN": ROOT_TOKEN, "PATH": path}
        place = Place(tmp_path, settings, {})
        for command in shown(ACL):
            code, said = await place.ended(command, cwd=tmp_path)
            assert code == 0, f"{command}\n{said}"
            assert "k8s-consul-registrar" in said


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not on PATH")
async def test_certificate_of_a_kubelet_is_shown(tmp_path: Path) -> None:
    """The command prints issuer, subject and names of a kubelet's certificate."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("worker-1")
        place = Place(tmp_path, {}, {"NODE_IP:10250": f"{LOOPBACK}:{kubelet.port}"})
        (command,) = shown(OPENSSL)
        code, said = await place.ended(command)
    assert code == 0, said
    assert all(text in said for text in ("issuer=", "subject=", "DNS:worker-1")), said


@REAL
@pytest.mark.long
async def test_prometheus_finds_the_sandbox_s_targets(tmp_path: Path) -> None:
    """As the quick start says: all of them, with the example configuration, half a minute later."""
    tools = fetched_prometheus("2.24")
    page = (ROOT / "docs" / "quick-start.md").read_text()
    count = int(next(iter(re.findall(r"finds and scrapes all (\d+) of them", page))))
    modes = [one for one in shown(MODE, ROOT / "docs" / "quick-start.md") if TO_THE_SANDBOX in one]
    async with sandbox(tmp_path) as (place, ports), contextlib.AsyncExitStack() as stack:
        configuration = (DEPLOY / "prometheus.yml").read_text().replace(":8500", f":{ports['8500']}")
        (tmp_path / "prometheus.yml").write_text(configuration)
        (command,) = shown(PROMETHEUS)
        flags = f" --web.listen-address={LOOPBACK}:{ports['9090']}"
        exchanged = {
            **place.exchanged,
            ".cache/real/prometheus-2.24/usr/bin/prometheus": str(tools.prometheus),
            "deploy/prometheus.yml": str(tmp_path / "prometheus.yml"),
            "/tmp/sandbox.prometheus": str(tmp_path / "storage"),
        }
        prometheus = place._replace(exchanged=exchanged)
        for mode in modes:
            program = await stack.enter_async_context(place.running(mode))
            await ready(program, ports["8082"] if "ADMIN_PORT=8082" in mode else ports["8081"])
        server = await stack.enter_async_context(prometheus.running(command + flags))

        async def are_all_up() -> bool:
            status, text = await answer(f"http://{LOOPBACK}:{ports['9090']}/api/v1/targets?state=active")
            found: list[dict[str, Any]] = json.loads(text)["data"]["activeTargets"] if status == 200 else []
            return [one["health"] for one in found] == ["up"] * count

        await until(are_all_up, within=4 * PATIENCE, context=server.tail)


@pytest.mark.long
def test_package_installs_as_documented(tmp_path: Path) -> None:
    """`pip install` builds this package and installs its command; its dependencies are here already."""
    for number, command in enumerate(shown(PIP)):
        target = tmp_path / str(number)
        settings = {
            "PIP_TARGET": str(target),
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        place = Place(tmp_path, settings, {"pip": f"{sys.executable} -m pip"})
        done = subprocess.run(
            ("bash", "-c", place.adapted(command)),
            env=place.variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (target / "bin" / "k8s-consul-registrar").exists()


def test_make_s_targets_are_put_together() -> None:
    """Make knows each target, and what it would run is there; CI and the tests of each subject run them."""
    for command in shown(MAKE):
        words = [*command.split()[1:], "-n", "-o", ".venv/.installed"]
        done = subprocess.run(("make", *words), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        programs = re.findall(r"(?:scripts|benchmarks)/[\w.-]+|-m k8s_consul_registrar \w+", done.stdout)
        assert programs or "-m pytest" in done.stdout, done.stdout
        assert [one for one in programs if "/" in one and not (ROOT / one).exists()] == []
