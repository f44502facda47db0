"""`check` in the sandbox: everything in place, and each thing that can be wrong, with the hint that repairs it."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands.check.report import Finding, Result, is_passed
from k8s_consul_registrar.commands.check.suite import check, read_modes
from k8s_consul_registrar.sandbox.certificates import KubeletCertificate
from k8s_consul_registrar.sandbox.consul_release import ConsulOptions
from support.cluster import PROXY_RULES, REGISTRAR_RULES, kubeconfig, rule
from support.lab import SandboxLab as Lab
from support.lab import running_lab
from support.processes import LOOPBACK, Program, reserve_ports
from support.proxy_lab import METRICS, Files, Kubelet, always, answer
from support.waiting import PATIENCE, until

QUICK = Timing(connect_timeout=1, read_timeout=1)
# A busy machine ends no answer too early.
PATIENT = Timing(connect_timeout=20, read_timeout=20)
TOKEN = "b1946ac9-2492-4d27-9f1b-6f4a0c3d2e11"
# As in deploy/deployment.yaml: an agent beside the registrar, which is no server.
AGENT = ConsulOptions(is_server=False)


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    """Run an empty cluster and an empty Consul."""
    async with running_lab(AGENT) as lab:
        yield lab


async def findings(lab: Lab, *modes: str, **environment: str) -> dict[str, Finding]:
    """Check modes (the registrar when none is named) and return what was found by name, the worst of each."""
    return await findings_within(PATIENT, lab, *modes, **environment)


async def findings_within(timing: Timing, lab: Lab, *modes: str, **environment: str) -> dict[str, Finding]:
    """Check modes with these timeouts."""
    settings = {
        "KUBECONFIG": str(lab.kubeconfig),
        "CONSUL_ADDRESS": lab.consul_door.address,
        "CLUSTER_NAME": "lab",
        "PROXY_ALLOW_LOOPBACK": "true",
        **environment,
    }
    if not lab.token_file.exists():
        rules = PROXY_RULES if modes == ("proxy",) else REGISTRAR_RULES
        lab.token_file.write_text(await lab.cluster.token(rules))
    found = await check(read_modes(modes or ("registrar",), settings), timing)
    order = [Result.FAIL, Result.WARN, Result.SKIPPED, Result.OK]
    return {one.name: one for one in sorted(found, key=lambda one: order.index(one.outcome), reverse=True)}


def outcomes(found: dict[str, Finding], outcome: Result) -> set[str]:
    """Return the names of what came out in a way."""
    return {one.name for one in found.values() if one.outcome is outcome}


async def test_everything_in_place_passes(lab: Lab) -> None:
    """With the roles of `deploy/rbac.yaml`, a proxy and kubelets that verify, nothing fails and nothing warns."""
    await lab.cluster.add_kubelet("n1", "127.0.0.2")
    await lab.cluster.add_kubelet("n2", "127.0.0.3")
    async with await lab.proxy() as proxy:
        await proxy.ready()
        port = str((await proxy.until_said("proxy starts"))["port"])
        found = await findings(lab, "proxy")
        assert outcomes(found, Result.OK) == set(found)
        assert {"kubelet n1", "kubelet n2", "get nodes/metrics"} <= set(found)
        lab.token_file.unlink()
        found = await findings(lab, PROXY_NODE_PORT=port)
        assert outcomes(found, Result.OK) == set(found)
        assert "v1.36" in found["api server"].detail
        assert "1.8.7" in found["consul"].detail
        assert found["cluster uid"].detail == await lab.cluster.uid()
        assert "n1, n2" in found["node port"].detail
    assert lab.consul.writes == []


@pytest.mark.parametrize(
    ("missing", "verbs", "resources"),
    [
        ("list pods", "list watch", "nodes"),
        ("watch nodes", "list", "pods nodes"),
        ("list nodes", "list watch", "pods"),
    ],
)
async def test_missing_permission_is_named(lab: Lab, missing: str, verbs: str, resources: str) -> None:
    """A broken role fails by the permission that is missing, and the hint is the line to add."""
    lab.token_file.write_text(await lab.cluster.token([rule(verbs, resources)]))
    found = await findings(lab)
    verb, resource = missing.split()
    assert found[missing].outcome is Result.FAIL
    assert f'verbs ["{verb}"] on resources ["{resource}"]' in found[missing].hint
    assert found["cluster uid"].outcome is Result.WARN
    assert "kube-system" in found["cluster uid"].hint


async def test_proxy_needs_nodes_metrics_and_never_nodes_proxy(lab: Lab) -> None:
    """Without `nodes/metrics` both the review and the kubelet's 403 say so; `nodes/proxy` is warned of."""
    await lab.cluster.add_kubelet("n1", "127.0.0.2")
    lab.token_file.write_text(
        await lab.cluster.token([rule("list watch", "nodes"), rule("get", "nodes/proxy")])
    )
    found = await findings(lab, "proxy")
    assert outcomes(found, Result.FAIL) == {"get nodes/metrics", "kubelet n1"}
    assert "403" in found["kubelet n1"].detail
    for name in ("get nodes/metrics", "kubelet n1"):
        assert '"nodes/metrics"' in found[name].hint
    assert found["nodes/proxy"].outcome is Result.WARN


async def test_bad_token_of_the_api_server_is_found(lab: Lab) -> None:
    """An unknown token is one failure, by the credentials' origin; what hangs on it is skipped."""
    lab.token_file.write_text("made-up")
    found = await findings(lab)
    assert outcomes(found, Result.FAIL) == {"api server"}
    assert str(lab.kubeconfig) in found["api server"].detail
    assert "expired, revoked" in found["api server"].hint
    assert outcomes(found, Result.SKIPPED) == {"permissions", "node port"}
    assert not any("made-up" in str(one) for one in found.values())


async def test_kubeconfig_that_cannot_be_read_is_found(lab: Lab) -> None:
    """It fails by the file's name, and Consul is checked all the same."""
    found = await findings(lab, KUBECONFIG="/nonexistent")
    assert "/nonexistent" in found["credentials"].detail
    assert found["consul"].outcome is Result.OK
    found = await findings(lab, "proxy", KUBECONFIG="/nonexistent")
    assert found["kubelets"].outcome is Result.SKIPPED
    lab.token_file.unlink()
    (bare := lab.folder / "bare").write_text(
        kubeconfig(lab.api_door.address, lab.cluster.endpoint.authority, {"tokenFile": str(lab.token_file)})
    )
    lab.token_file.mkdir()
    found = await findings(lab, KUBECONFIG=str(bare))
    assert found["credentials"].outcome is Result.FAIL
    assert str(lab.token_file) in found["credentials"].detail


async def test_api_server_of_another_ca_is_found(lab: Lab) -> None:
    """A certificate that the kubeconfig's CA did not sign is reported, with the field that holds the CA."""
    async with running_lab() as elsewhere:
        strange = kubeconfig(lab.api_door.address, elsewhere.cluster.endpoint.authority, {"token": "t"})
    (lab.folder / "strange").write_text(strange)
    found = await findings(lab, KUBECONFIG=str(lab.folder / "strange"))
    assert found["api server"].outcome is Result.FAIL
    assert "certificate-authority" in found["api server"].detail


async def test_unreachable_servers_are_found_in_time(lab: Lab) -> None:
    """An API server that hangs and a Consul that is not there are two failures, well within the bound."""
    (port,) = reserve_ports(1)
    lab.api_door.stall()
    async with asyncio.timeout(PATIENCE):
        found = await findings_within(QUICK, lab, CONSUL_ADDRESS=f"127.0.0.1:{port}")
    assert outcomes(found, Result.FAIL) == {"api server", "consul"}
    assert "timed out" in found["api server"].detail
    assert "CONSUL_ADDRESS" in found["consul"].hint


@pytest.mark.parametrize(
    ("token", "failing"),
    [("made-up", "does not know the token"), ("", "no token is set"), ("blind", "service_prefix")],
)
async def test_bad_consul_token_is_found(token: str, failing: str) -> None:
    """An unknown token, none, and one without rights each fail with what repairs them."""
    options = ConsulOptions(token=TOKEN, blind_tokens=frozenset({"blind"}))
    async with running_lab(consul=options) as lab:
        found = await findings(lab, CONSUL_HTTP_TOKEN=token)
        good = await findings(lab, CONSUL_HTTP_TOKEN=TOKEN)
    assert outcomes(found, Result.FAIL) == {"consul token"}
    assert failing in f"{found['consul token'].detail} {found['consul token'].hint}"
    assert good["consul token"].outcome is Result.OK
    assert lab.consul.writes == []


async def test_services_consul_already_holds_are_listed_by_owner(lab: Lab) -> None:
    """The original's services, look-alikes, other registrars and meta keys in use each have their line."""
    mine = {"managed_by": "k8s-consul-registrar", "cluster": "lab", "cluster_uid": await lab.cluster.uid()}
    await lab.seed("pod--a--old", {"cluster": "lab", "namespace": "a"})
    await lab.seed("pod--a--new", mine)
    await lab.seed("node--192.0.2.1", {"managed_by": "by-hand", "node": "x"})
    await lab.seed("db", {"team": "a"})
    await lab.seed("pod--b--c", {**mine, "cluster": "other", "cluster_uid": "u"})
    found = await findings(lab)
    assert found["services"].detail == "1 ours, 3 of others"
    assert "pod--a--old" in found["adoption"].detail
    assert found["look-alikes"].outcome is Result.WARN
    assert "node--192.0.2.1" in found["look-alikes"].detail
    assert "other 1" in found["other registrars"].detail
    assert "managed_by, node, team" in found["meta keys"].detail
    assert "cluster name" not in found
    found = await findings(lab, INSTANCE="second")
    assert found["adoption"].outcome is Result.WARN


async def test_namespaces_and_election_ask_for_their_own_rights(lab: Lab) -> None:
    """With NAMESPACES Pods are asked for namespace by namespace and Nodes not at all; a leader needs its Lease."""
    found = await findings(
        lab,
        NAMESPACES="shop,bank",
        LEADER_ELECTION="true",
        CONSUL_BACKEND="catalog",
        LEASE_NAMESPACE="ops",
        LEASE_NAME="l",
    )
    assert {"list pods in shop", "watch pods in shop", "list pods in bank", "watch pods in bank"} <= set(
        found
    )
    assert {"list nodes", "node port", "list pods", "consul agent"}.isdisjoint(found)
    leases = {f"{verb} leases in ops" for verb in ("create", "get", "update")}
    assert outcomes(found, Result.FAIL) == leases
    assert "Role in ops" in found["get leases in ops"].hint
    assert lab.consul.writes == []


async def test_without_consul_none_is_asked_for(lab: Lab) -> None:
    """With CONSUL_BACKEND=none Consul is said to be unused, whatever its address."""
    found = await findings(
        lab, CONSUL_BACKEND="none", HTTP_SD_PORT="0", SHARD_STRATEGY="hash", CONSUL_ADDRESS="127.0.0.1:1"
    )
    assert found["consul"].outcome is Result.OK
    assert "consul token" not in found


async def test_another_cluster_under_our_name_fails(lab: Lab) -> None:
    """Services of our name with another cluster's UID mean that two clusters share a CLUSTER_NAME."""
    await lab.seed(
        "pod--a--b", {"managed_by": "k8s-consul-registrar", "cluster": "lab", "cluster_uid": "another-uid"}
    )
    found = await findings(lab)
    assert found["cluster name"].outcome is Result.FAIL
    assert "another-uid" in found["cluster name"].detail
    assert "CLUSTER_NAME" in found["cluster name"].hint


@pytest.mark.parametrize(
    ("certificate", "cure", "setting"),
    [
        (KubeletCertificate.SELF_SIGNED, "KUBELET_CA_FILE", {"KUBELET_INSECURE_SKIP_TLS_VERIFY": "true"}),
        (KubeletCertificate.NAME_ONLY, "KUBELET_TLS_SERVER_NAME=node", {"KUBELET_TLS_SERVER_NAME": "node"}),
    ],
)
async def test_unverifiable_kubelet_names_the_setting_that_cures_it(
    lab: Lab, certificate: KubeletCertificate, cure: str, setting: dict[str, str]
) -> None:
    """The hint names a setting, the token stays here, and with the setting the check passes."""
    kubelet = await lab.cluster.start_kubelet("n1", "127.0.0.2", certificate)
    await lab.cluster.add_node("n1", ("InternalIP", "127.0.0.2"), kubelet_port=kubelet.port)
    found = await findings(lab, "proxy")
    assert found["kubelet n1"].outcome is Result.FAIL
    assert cure in found["kubelet n1"].hint
    assert kubelet.request_count == 0
    found = await findings(lab, "proxy", **setting)
    assert is_passed(found.values())
    is_skipped = "KUBELET_INSECURE_SKIP_TLS_VERIFY" in setting
    assert found["kubelet n1"].outcome is (Result.WARN if is_skipped else Result.OK)


async def test_node_names_asked_for_where_certificates_name_addresses(lab: Lab) -> None:
    """With KUBELET_TLS_SERVER_NAME=node the hint for a Node of another name is to go back to `ip`."""
    kubelet = await lab.cluster.start_kubelet("n1", "127.0.0.2")
    await lab.cluster.add_node("renamed", ("InternalIP", "127.0.0.2"), kubelet_port=kubelet.port)
    found = await findings(lab, "proxy", KUBELET_TLS_SERVER_NAME="node")
    assert "KUBELET_TLS_SERVER_NAME=ip" in found["kubelet renamed"].hint


async def test_kubelets_that_are_not_there_or_not_dialled(lab: Lab) -> None:
    """A refused connection is reported as one; addresses that are never dialled are reported without trying."""
    (port,) = reserve_ports(1)
    await lab.cluster.add_node("n1", ("InternalIP", "127.0.0.2"), kubelet_port=port)
    found = await findings(lab, "proxy")
    assert "connection refused" in found["kubelet n1"].detail
    found = await findings(lab, "proxy", PROXY_ALLOW_LOOPBACK="false")
    assert "PROXY_ALLOW_LOOPBACK" in found["kubelets"].hint


async def test_client_certificate_without_key_is_reported(lab: Lab) -> None:
    """Kubelets are shown a token, so a kubeconfig without one is a warning beside their 401."""
    kubelet = await lab.cluster.start_kubelet("n1", "127.0.0.2")
    await lab.cluster.add_node("n1", ("InternalIP", "127.0.0.2"), kubelet_port=kubelet.port)
    authority = lab.cluster.endpoint.authority
    if os.environ.get("KUBEBUILDER_ASSETS"):
        pytest.skip("the sandbox alone makes users of certificates")
    lab.cluster.access.grant("shown")
    shown = authority.client("shown")
    certificate, key = lab.folder / "crt", lab.folder / "key"
    certificate.write_bytes(shown.certificate)
    key.write_bytes(shown.key)
    user = {"client-certificate": str(certificate), "client-key": str(key)}
    lab.kubeconfig.write_text(kubeconfig(lab.api_door.address, authority, user))
    found = await findings(lab, "proxy")
    assert found["kubelet token"].outcome is Result.WARN
    assert "401" in found["kubelet n1"].detail


async def test_node_port_without_answer_fails(lab: Lab) -> None:
    """Silence and a stranger on the port both fail; one Node of two that answers is a warning."""
    (port,) = reserve_ports(1)
    await lab.cluster.add_kubelet("n1", "127.0.0.1")
    found = await findings(lab, PROXY_NODE_PORT=str(port))
    assert found["node port"].outcome is Result.FAIL
    assert "PROXY_NODE_PORT" in found["node port"].hint
    stranger = lab.consul.address.rpartition(":")[2]
    found = await findings(lab, PROXY_NODE_PORT=stranger)
    assert "not as the proxy does" in found["node port"].detail
    async with await lab.proxy() as proxy:
        await proxy.ready()
        served = str((await proxy.until_said("proxy starts"))["port"])
        await lab.cluster.add_node("n2", ("InternalIP", "203.0.113.9"))
        found = await findings(lab, PROXY_NODE_PORT=served)
    assert found["node port"].outcome is Result.WARN
    assert "203.0.113.9" in found["node port"].detail


@pytest.mark.parametrize(
    ("body", "outcome"), [(METRICS, Result.WARN), (b"<html>a page for every path</html>", Result.FAIL)]
)
async def test_another_program_on_the_node_port_warns_only_where_it_relays_kubelets(
    lab: Lab, body: bytes, outcome: Result
) -> None:
    """The original program's proxy does while an upgrade replaces it; a stranger that answers anything does not."""
    kubelet = await lab.cluster.add_kubelet("n1", LOOPBACK)
    async with Kubelet(always(answer(body)), is_secure=False).serving() as other:
        found = await findings(lab, PROXY_NODE_PORT=str(other.port))
    assert found["node port"].outcome is outcome
    assert ("deployment-svc.yaml" in found["node port"].hint) is (outcome is Result.WARN)
    asked = {request.split()[1].decode() for request in other.requests}
    assert f"/api/v1/nodes/{LOOPBACK}:{kubelet.port}/metrics/cadvisor" in asked


async def test_node_port_is_asked_by_the_scheme_that_prometheus_uses(lab: Lab, tmp_path: Path) -> None:
    """PROXY_SCHEME=https reaches a proxy that speaks TLS, its Pods and paths included, and http does not."""
    files = Files(tmp_path, trustme.CA())
    await lab.cluster.add_kubelet("n1", LOOPBACK)
    lab.token_file.write_text(await lab.cluster.token([*PROXY_RULES, rule("list watch", "pods")]))
    secure = {"TLS_CERT_FILE": str(files.certificate), "TLS_KEY_FILE": str(files.key)}
    async with await lab.proxy(PROXY_PODS="true", PROXY_PODS_ANONYMOUS="true", **secure) as proxy:
        await proxy.ready()
        asked = {
            "PROXY_NODE_PORT": str(await proxy.port("port")),
            "POD_ADDRESS": "proxy",
            "NODE_PATHS": "/metrics/cadvisor,/metrics/resource",
        }
        found = await findings(lab, **asked, PROXY_SCHEME="https")
        assert found["node port"].outcome is Result.OK
        assert found["pods through the proxy"].outcome is Result.OK
        assert "does not relay /metrics/resource" in found["node paths"].detail
        found = await findings(lab, **asked)
        assert found["node port"].outcome is Result.FAIL


async def test_paths_that_the_proxy_does_not_relay_are_named(lab: Lab) -> None:
    """NODE_PATHS against the proxy's PROXY_PATHS, which the remedy spells out."""
    await lab.cluster.add_kubelet("n1", "127.0.0.2")
    async with await lab.proxy(PROXY_PATHS="/metrics/resource") as proxy:
        await proxy.ready()
        port = str((await proxy.until_said("proxy starts"))["port"])
        found = await findings(lab, PROXY_NODE_PORT=port)
        assert "node paths" not in found
        paths = "/metrics/cadvisor,/metrics/resource"
        found = await findings(lab, PROXY_NODE_PORT=port, NODE_PATHS=paths)
        assert found["node paths"].outcome is Result.OK
        found = await findings(lab, PROXY_NODE_PORT=port, NODE_PATHS=f"{paths},/metrics/probes")
    assert found["node paths"].outcome is Result.FAIL
    assert found["node paths"].detail.endswith(" /metrics/probes")
    assert found["node paths"].hint == "PROXY_PATHS=/metrics/probes,/metrics/resource"


class Command:
    """One run of `k8s-consul-registrar check` as a process."""

    def __init__(self, lab: Lab, *arguments: str, **environment: str) -> None:
        self.program = Program(
            [sys.executable, "-m", "k8s_consul_registrar", "check", *arguments],
            lab.folder / "check.log",
            environment={
                "PATH": os.environ["PATH"],
                "HOME": str(lab.folder),
                "KUBECONFIG": str(lab.kubeconfig),
                **environment,
            },
        )

    async def run(self) -> tuple[int, str]:
        """Run it to its end; return the exit code and what it said."""
        self.program.launch()
        try:
            return await self.program.ended(PATIENCE), self.program.log.read_text()
        finally:
            await self.program.stop(signal.SIGKILL)


async def test_command_shows_a_table_and_says_by_its_code(lab: Lab) -> None:
    """Exit 1 with every failure and its hint, aligned, without colours in a file; MODE chooses the mode."""
    lab.token_file.write_text(await lab.cluster.token([]))
    environment = {"CONSUL_ADDRESS": lab.consul.address, "CLUSTER_NAME": "lab", "MODE": "registrar"}
    code, shown = await Command(lab, **environment).run()
    assert code == 1
    assert "\x1b" not in shown
    assert "Traceback" not in shown
    lines = shown.splitlines()
    (failed,) = [number for number, line in enumerate(lines) if line.startswith("fail     list pods ")]
    assert lines[failed].endswith("not allowed")
    assert lines[failed + 1].index(">") == lines[failed].index("not allowed")
    assert lines[-1].startswith("4 failed, ")
    assert "get nodes/metrics" not in shown


async def test_command_speaks_json(lab: Lab) -> None:
    """`--output json` is one object, and 0 is the code where nothing fails."""
    lab.token_file.write_text(await lab.cluster.token())
    environment = {"CONSUL_ADDRESS": lab.consul.address, "CLUSTER_NAME": "lab"}
    code, shown = await Command(lab, "registrar", "--output", "json", **environment).run()
    answer = json.loads(shown)
    assert (code, answer["passed"]) == (0, True)
    assert {"name", "outcome", "detail", "hint"} == answer["findings"][0].keys()


async def test_wrong_settings_are_exit_2(lab: Lab) -> None:
    """Mistakes of both modes are reported together before anything is asked."""
    code, shown = await Command(lab, "all", PORT="x", PROXY_NODE_PORT="y").run()
    assert code == 2
    assert "PORT: 'x'" in shown
    assert "PROXY_NODE_PORT: 'y'" in shown


async def test_ctrl_c_is_quiet(lab: Lab) -> None:
    """An interrupt in the middle ends it with 130 and not a word."""
    lab.token_file.write_text(await lab.cluster.token())
    lab.api_door.stall()
    command = Command(lab, "registrar", CONSUL_ADDRESS=lab.consul.address)
    command.program.launch()
    try:
        await until(lab.api_door.holds)
        command.program.send(signal.SIGINT)
        assert await command.program.ended(PATIENCE) == 130
        assert command.program.tail() == ""
    finally:
        await command.program.stop(signal.SIGKILL)


async def test_server_in_place_of_an_agent_is_warned_of() -> None:
    """The agent backend works with it, and its services would belong to the server's node."""
    async with running_lab(ConsulOptions(is_server=True)) as server:
        found = (await findings(server))["consul agent"]
    assert (found.outcome, "this is a server" in found.detail) == (Result.WARN, True)
    assert "CONSUL_BACKEND=catalog" in found.hint
