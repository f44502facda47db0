"""`check` on real Consul with ACLs: it reports what each token may do without writing anything."""

from collections.abc import Sequence

import pytest

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands.check.consul import (
    NeededRight,
    check_consul,
    check_token,
    naming_of,
    need_of_catalog,
    needs_of_agent,
    needs_of_services,
)
from k8s_consul_registrar.commands.check.report import Finding, Result
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.targets.service_names import NODE_NAME, POD_NAME
from support.real_servers import REAL, RealConsul, real_consul
from support.waiting import until

pytestmark = REAL

# The policy of docs/deployment.md, line by line.
PODS = 'service_prefix "pod--" { policy = "write" }'
NODES = 'service_prefix "node--" { policy = "write" }'
OTHERS = 'service_prefix "" { policy = "read" }'
AGENT_NODE = 'node_prefix "" { policy = "read" }'
OWN_NODE = 'node "somewhere" { policy = "read" }'
CATALOG_NODE = 'node "k8s-lab" { policy = "write" }'
SERVICES = needs_of_services(
    [naming_of(Kind.POD, POD_NAME, "lab", ""), naming_of(Kind.NODE, NODE_NAME, "lab", "")]
)
NEEDS = (*SERVICES, *needs_of_agent("somewhere"))


async def token(consul: RealConsul, *rules: str) -> str:
    """Create a token with a policy of these rules and return it."""
    policy = {"Name": f"p{abs(hash(rules))}", "Rules": "\n".join(rules)}
    status, _ = await consul.request("PUT", "/v1/acl/policy", policy)
    assert status == 200
    status, made = await consul.request("PUT", "/v1/acl/token", {"Policies": [{"Name": policy["Name"]}]})
    assert status == 200
    return str(made["SecretID"])


async def asked(consul: RealConsul, secret: str, needs: Sequence[NeededRight] = NEEDS) -> list[Finding]:
    """Return what the check of a token finds."""
    access = ConsulAccess(ConsulAddress(consul.url), token=secret)
    async with ConsulClient(access, Timing()) as client:
        return await check_token(client, needs, has_token=bool(secret))


async def index(consul: RealConsul) -> int:
    """Return how many writes Raft has seen."""
    _, answer = await consul.request("GET", "/v1/agent/self")
    return int(answer["Stats"]["raft"]["last_log_index"])


@pytest.mark.parametrize("through", ["server", "client"])
async def test_each_line_of_the_policy_is_asked_for(through: str) -> None:
    """Each line that is left out is the finding; with all of them there is none, and Raft sees no write."""
    async with real_consul(acl=True, node="server") as server:
        secrets = {
            "whole": await token(server, PODS, NODES, OTHERS, AGENT_NODE),
            "no pods": await token(server, NODES, OTHERS, AGENT_NODE),
            "no nodes": await token(server, PODS, OTHERS, AGENT_NODE),
            "no others": await token(server, PODS, NODES, AGENT_NODE),
            "no agent": await token(server, PODS, NODES, OTHERS),
            "own node": await token(server, PODS, NODES, OTHERS, OWN_NODE),
        }
        if through == "client":
            async with real_consul(join=server.serf, acl=True, node="agent") as agent:
                found = {name: await asked(agent, secret) for name, secret in secrets.items()}
        else:
            found = {}

            async def is_without_a_write() -> bool:  # Consul itself writes now and then
                before = await index(server)
                found.update({name: await asked(server, secret) for name, secret in secrets.items()})
                return await index(server) == before

            await until(is_without_a_write, "a look that writes nothing")
    assert [one.outcome for one in found["whole"]] == [Result.OK]
    assert "an agent that is gone" not in found["no agent"][0].detail
    assert "the node of an agent that is gone" in found["own node"][0].detail
    for name, outcome, line in (
        ("no pods", Result.FAIL, PODS),
        ("no nodes", Result.FAIL, NODES),
        ("no others", Result.WARN, OTHERS),
        ("no agent", Result.WARN, AGENT_NODE),
        ("own node", Result.WARN, AGENT_NODE),
    ):
        (finding,) = found[name]
        assert (finding.outcome, finding.hint) == (outcome, f"add to the token's policy: {line}")


async def test_catalog_needs_its_node() -> None:
    """Without write on the synthetic node the catalog backend fails, with the line that grants it."""
    needs = (*SERVICES, need_of_catalog("k8s-lab"))
    async with real_consul(acl=True) as consul:
        (whole,) = await asked(consul, await token(consul, PODS, NODES, OTHERS, CATALOG_NODE), needs)
        (without,) = await asked(consul, await token(consul, PODS, NODES, OTHERS), needs)
    assert whole.outcome is Result.OK
    assert (without.outcome, CATALOG_NODE in without.hint) == (Result.FAIL, True)


async def test_tokens_that_are_none() -> None:
    """An unknown token and the anonymous one are distinguished, and neither secret is shown."""
    unknown = "5d7c6d0e-8f5b-4a52-9d3c-0b7a52a1c9e4"
    async with real_consul(acl=True) as consul:
        (of_unknown,) = await asked(consul, unknown)
        of_none = await asked(consul, "")
        access = ConsulAccess(ConsulAddress(consul.url), token=unknown)
        async with ConsulClient(access, Timing()) as client:
            (reached,), _ = await check_consul(client, consul.address, is_catalog=False)
    assert of_unknown.outcome is Result.FAIL
    assert "ACL not found" in of_unknown.detail
    assert unknown not in str(of_unknown)
    assert {one.outcome for one in of_none} == {Result.FAIL, Result.WARN}
    assert "no token is set" in of_none[0].hint
    assert reached.outcome is Result.OK


async def test_consul_without_acls() -> None:
    """Without ACLs there is nothing to ask, and version and leader are reported."""
    async with real_consul() as consul:
        (finding,) = await asked(consul, "")
        async with ConsulClient(ConsulAccess(ConsulAddress(consul.url)), Timing()) as client:
            (reached, server), node = await check_consul(client, consul.address, is_catalog=False)
            (alone,), _ = await check_consul(client, consul.address, is_catalog=True)
    assert (finding.outcome, finding.detail) == (Result.OK, "Consul runs without ACLs")
    assert ".".join(map(str, consul.version)) in reached.detail
    assert server.outcome is Result.WARN
    assert (alone, node) == (reached, consul.node)


async def test_agent_that_joined_no_server_is_explained() -> None:
    """A client agent alone answers and knows no leader, which is a failure with the likely cause."""
    async with real_consul(node="server") as server:
        serf = server.serf
        async with real_consul(join=serf, node="agent") as agent:
            await server.program.stop(9)
            access = ConsulAccess(ConsulAddress(agent.url))
            async with ConsulClient(access, Timing(read_timeout=5)) as client:
                (finding,), _ = await check_consul(client, agent.address, is_catalog=False)
    assert finding.outcome is Result.FAIL
    assert "leader" in finding.detail or "Consul answers 500" in finding.detail
