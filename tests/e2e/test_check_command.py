"""`check` as an operator runs it: what is broken is the line that fails, and its hint is what repairs it."""

import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from k8s_consul_registrar.sandbox.certificates import Authority, KubeletCertificate
from k8s_consul_registrar.sandbox.consul_release import NEWEST, ConsulOptions
from k8s_consul_registrar.sandbox.kubelet import Kubelet
from support.cluster import PROXY_RULES, REGISTRAR_RULES, rule
from support.doors import TcpProxy
from support.lab import Lab, running_lab, running_lab_with
from support.processes import LOOPBACK, Program
from support.real_servers import REAL, real_consul
from support.waiting import PATIENCE


class Said(NamedTuple):
    """The exit code and output of one run; `failed` are the names that fail, each with its hint."""

    code: int
    text: str
    failed: dict[str, str]


async def said_by_check(lab: Lab, mode: str, **environment: str) -> Said:
    """Run `k8s-consul-registrar check` for a mode to its end."""
    program = Program(
        [sys.executable, "-m", "k8s_consul_registrar", "check", mode],
        lab.folder / "check.log",
        environment={
            "PATH": os.environ["PATH"],
            "HOME": str(lab.folder),
            "KUBECONFIG": str(lab.kubeconfig),
            "CONSUL_ADDRESS": lab.consul_address,
            "CLUSTER_NAME": "lab",
            "PROXY_ALLOW_LOOPBACK": "true",
            **environment,
        },
    )
    program.launch()
    try:
        code = await program.ended(PATIENCE)
    finally:
        await program.stop(signal.SIGKILL)
    text = program.log.read_text()
    program.log.unlink()
    lines = text.splitlines()
    indent = lines[0].find("those of the")
    failed = {
        line[9:indent].strip(): lines[number + 1].strip().removeprefix("> ")
        for number, line in enumerate(lines)
        if line.startswith("fail ")
    }
    return Said(code, text, failed)


async def test_broken_permission() -> None:
    """The verb and the resource to grant, and in which role."""
    async with running_lab() as lab:
        lab.token_file.write_text(
            await lab.cluster.token([rule("list watch", "nodes"), rule("list", "pods")])
        )
        said = await said_by_check(lab, "registrar")
    assert said.code == 1
    assert said.failed == {
        "watch pods": 'grant verbs ["watch"] on resources ["pods"] in the ClusterRole of our account '
        "(deploy/rbac.yaml)"
    }


async def test_bad_token_of_the_api_server() -> None:
    """The credentials it came from, and what may be wrong with it; the token itself is not shown."""
    async with running_lab() as lab:
        lab.token_file.write_text("s3cret-of-yesterday")
        said = await said_by_check(lab, "registrar")
    assert said.code == 1
    assert said.failed == {"api server": "the token or certificate is expired, revoked, or another cluster's"}
    assert str(lab.kubeconfig) in said.text
    assert "s3cret" not in said.text


@pytest.mark.parametrize("backend", ["agent", "catalog"])
class TestRealConsul:
    """A real Consul with ACLs."""

    pytestmark = REAL

    async def test_bad_token(self, backend: str) -> None:
        """The settings that hold it, and the command that makes another; the token itself is not shown."""
        token = "5d7c6d0e-8f5b-4a52-9d3c-0b7a52a1c9e4"
        async with real_consul(acl=True) as consul, running_lab_with(consul.address) as lab:
            lab.token_file.write_text(await lab.cluster.token(REGISTRAR_RULES))
            said = await said_by_check(lab, "registrar", CONSUL_HTTP_TOKEN=token, CONSUL_BACKEND=backend)
            repaired = await said_by_check(
                lab, "registrar", CONSUL_HTTP_TOKEN=consul.token, CONSUL_BACKEND=backend
            )
        assert said.code == 1
        assert list(said.failed) == ["consul token"]
        assert "CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE" in said.failed["consul token"]
        assert "consul acl token create" in said.failed["consul token"]
        assert token not in said.text
        assert (repaired.code, repaired.failed) == (0, {})


async def test_kubelet_of_a_foreign_authority(tmp_path: Path) -> None:
    """The setting that names the authority; with it the same kubelet passes."""
    authority = Authority()
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    async with running_lab() as lab:
        tls = authority.kubelet("n1", "127.0.0.2", KubeletCertificate.ADDRESS)
        async with Kubelet("n1", lab.cluster.access, tls, host="127.0.0.2") as kubelet:
            await lab.cluster.add_node("n1", ("InternalIP", "127.0.0.2"), kubelet_port=kubelet.port)
            lab.token_file.write_text(await lab.cluster.token(PROXY_RULES))
            said = await said_by_check(lab, "proxy")
            assert kubelet.request_count == 0
            repaired = await said_by_check(lab, "proxy", KUBELET_CA_FILE=str(tmp_path / "ca.crt"))
    assert said.code == 1
    assert list(said.failed) == ["kubelet n1"]
    assert said.failed["kubelet n1"].startswith("set KUBELET_CA_FILE to the CA that signed it")
    assert (repaired.code, repaired.failed) == (0, {})


async def test_services_left_in_the_catalog() -> None:
    """They are named, with the rights that the agent needs; without any the check is fine."""
    async with running_lab(ConsulOptions(NEWEST, is_server=False)) as lab:
        lab.token_file.write_text(await lab.cluster.token(REGISTRAR_RULES))
        fine = await said_by_check(lab, "registrar")
        lab.consul.agent.has_node_write = False
        await lab.seed_pod("web-1")
        await lab.unseed("pod--shop--web-1")
        said = await said_by_check(lab, "registrar")
    assert "ok       agent's removals" in fine.text
    assert "1 services are in the catalog at agent-1 and not at the agent: pod--shop--web-1" in said.text
    assert 'node "agent-1" { policy = "write" }' in said.text


async def test_agents_of_several_nodes() -> None:
    """Behind a load balancer the agent backend registers everything twice; the catalog is right there."""
    async with running_lab() as lab, lab.consul.peer("agent-2") as other:
        ports = (int(one.address.rpartition(":")[2]) for one in (lab.consul, other))
        async with TcpProxy(LOOPBACK, *ports) as service:
            lab.token_file.write_text(await lab.cluster.token(REGISTRAR_RULES))
            agent = await said_by_check(lab, "registrar", CONSUL_ADDRESS=service.address)
            catalog = await said_by_check(
                lab, "registrar", CONSUL_ADDRESS=service.address, CONSUL_BACKEND="catalog"
            )
    assert agent.failed == {"consul agent": "set CONSUL_BACKEND=catalog, or CONSUL_ADDRESS to one agent"}
    assert "agents of several nodes answer (agent-1, agent-2)" in agent.text
    assert catalog.failed == {}


async def test_http_sd_without_consul_names_what_it_needs(tmp_path: Path) -> None:
    """A token's file that is empty fails by its setting; random shards are exit 2, as the daemon would say."""
    (tmp_path / "token").write_text("\n")
    async with running_lab() as lab:
        lab.token_file.write_text(await lab.cluster.token(REGISTRAR_RULES))
        without = {"CONSUL_BACKEND": "none", "HTTP_SD_PORT": "0"}
        said = await said_by_check(
            lab, "registrar", HTTP_SD_BEARER_TOKEN_FILE=str(tmp_path / "token"), **without
        )
        random = await said_by_check(lab, "registrar", SHARD_STRATEGY="random", SHARD_PATHS="a,b", **without)
    assert said.code == 1
    assert list(said.failed) == ["http_sd token"]
    assert "HTTP_SD_BEARER_TOKEN_FILE" in said.failed["http_sd token"]
    assert random.code == 2
    assert "SHARD_STRATEGY" in random.text


async def test_check_asks_for_the_rights_to_services() -> None:
    """With DISCOVER=services each right that is missing is named, and the overlay that grants it."""
    async with running_lab() as lab:
        lab.token_file.write_text(await lab.cluster.token(REGISTRAR_RULES))
        said = await said_by_check(lab, "registrar", DISCOVER="pods,nodes,services")
        assert said.code == 1
        assert {name.split()[1] for name in said.failed} == {"services", "endpointslices"}, said.text
        hint = said.failed["list endpointslices"]
        assert 'apiGroups ["discovery.k8s.io"]' in hint
        assert "deploy/overlays/services" in hint


@pytest.mark.parametrize(("namespaces", "where"), [("", ""), ("shop", " in shop")])
async def test_check_asks_for_the_right_to_write_events(namespaces: str, where: str) -> None:
    """With EMIT_EVENTS it is asked for where the objects are, and the hint names the overlay; by default it is not."""
    async with running_lab() as lab:
        lab.token_file.write_text(await lab.cluster.token(REGISTRAR_RULES))
        said = await said_by_check(lab, "registrar", EMIT_EVENTS="problems", NAMESPACES=namespaces)
        assert list(said.failed) == [f"create events{where}", f"patch events{where}"], said.text
        assert "deploy/overlays/emit-events" in said.failed[f"create events{where}"]
        assert 'apiGroups ["events.k8s.io"]' in said.failed[f"create events{where}"]
        assert (await said_by_check(lab, "registrar")).failed == {}


async def test_check_asks_for_the_rights_to_namespaces() -> None:
    """Only a setting that needs them makes the registrar follow Namespaces."""
    async with running_lab() as lab:
        lab.token_file.write_text(await lab.cluster.token(REGISTRAR_RULES))
        said = await said_by_check(lab, "registrar", NAMESPACE_LABELS_AS_META="team")
        assert said.code == 1
        assert set(said.failed) == {"list namespaces", "watch namespaces"}, said.text
        assert "deploy/overlays/namespace-labels" in said.failed["list namespaces"]
