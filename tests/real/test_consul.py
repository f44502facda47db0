"""The registrar as a process on a real Consul, through its whole life."""

import signal
from typing import Any

from hypothesis import HealthCheck, given, settings

from support.lab import Lab, running_lab_with
from support.odd_inputs import OddPod, add_odd_pods, odd_pods
from support.real_servers import REAL, RealConsul, real_consul

pytestmark = REAL

WEB = "pod--shop--web-1"
NODE = "node--192.0.2.10"
SIX = "node--2001:db8::1"
JsonObject = dict[str, Any]


async def services(consul: RealConsul) -> dict[str, JsonObject]:
    """Return what the agent holds, by ID."""
    status, found = await consul.request("GET", "/v1/agent/services")
    assert status == 200, found
    return dict(found)


async def catalog(consul: RealConsul) -> dict[str, tuple[str, int, int, int]]:
    """Return address, port, CreateIndex and ModifyIndex of what the catalog has of the agent, by ID."""
    status, found = await consul.request("GET", f"/v1/catalog/node/{consul.node}")
    assert status == 200, found
    return {
        key: (each["Address"], each["Port"], each["CreateIndex"], each["ModifyIndex"])
        for key, each in found["Services"].items()
        if key != "consul"
    }


async def register(consul: RealConsul, service_id: str, meta: JsonObject | None = None) -> None:
    """Register a service as another tool would."""
    body = {"ID": service_id, "Name": service_id, "Address": "203.0.113.9", "Port": 99, "Meta": meta or {}}
    status, answer = await consul.request("PUT", "/v1/agent/service/register", body)
    assert status == 200, answer


async def holds(consul: RealConsul, *service_ids: str) -> bool:
    """Return True if agent and catalog hold just these services."""
    return set(await services(consul)) == set(await catalog(consul)) == set(service_ids)


async def test_whole_life_on_a_real_consul() -> None:
    """Registered once, never written again while equal, moved in place, removed; what is not ours stays."""
    async with real_consul() as consul, running_lab_with(consul.address) as lab:
        await register(consul, "db", {"owner": "dba"})
        theirs = {"managed_by": "k8s-consul-registrar", "cluster": "other", "kind": "pod"}
        await register(consul, "pod--shop--theirs", theirs)
        others = ("db", "pod--shop--theirs")
        foreign = {key: (await services(consul))[key] for key in others}
        await lab.cluster.add_pod()
        await lab.cluster.add_node("node-a", ("InternalIP", "192.0.2.10"))
        await lab.cluster.add_node("node-b", ("InternalIP", "2001:db8::1"))
        async with await lab.registrar(SHARD_PATHS="one,two,three") as daemon:
            await daemon.until(lambda: holds(consul, WEB, NODE, SIX, *others))
            shard = (await services(consul))[WEB]["Meta"]["shard_path"]
            before = await catalog(consul)
            assert before[WEB][:2] == ("198.51.100.10", 9102)
            assert before[SIX][:2] == ("2001:db8::1", 31112)

            line = await daemon.passes(3)
            assert (line["unchanged"], line["registered"], line["updated"]) == (3, 0, 0)
            assert await catalog(consul) == before, "CreateIndex and ModifyIndex are as they were"

            await lab.cluster.set_pod_status(phase="Running", ips=["198.51.100.77"])
            await daemon.until(lambda: has_moved(consul, WEB, "198.51.100.77"))
            after = await catalog(consul)
            assert after[WEB][2] == before[WEB][2], "changed in place, not removed and created"
            assert (await services(consul))[WEB]["Meta"]["shard_path"] == shard
            assert {**after, WEB: None} == {**before, WEB: None}

            await lab.cluster.delete_pod()
            await lab.cluster.delete_node("node-b")
            await daemon.until(lambda: holds(consul, NODE, *others))
            assert await daemon.terminate() == 0
        assert await holds(consul, NODE, *others), "what is registered stays when the daemon ends"
        assert {key: (await services(consul))[key] for key in others} == foreign

        async with await lab.registrar(SHARD_PATHS="one,two,three") as daemon:
            await daemon.passes(2)
            assert (await catalog(consul))[NODE] == before[NODE], "a second run writes nothing either"


async def has_moved(consul: RealConsul, service_id: str, address: str) -> bool:
    """Return True if the catalog has a service at this address."""
    return (await catalog(consul))[service_id][0] == address


async def test_odd_pods_are_rejected_by_us_or_taken_by_consul() -> None:
    """Odd Pods and meta over Consul's limits: each is registered or rejected by us, none refused by Consul."""
    pods: list[OddPod] = []

    @settings(max_examples=300, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(odd_pods())
    def collect(pod: OddPod) -> None:
        pods.append(pod)

    collect()
    # A value of exactly 512 bytes, the longest Consul takes, and one of a byte more, in two-byte letters.
    longest = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": "80",
        "prometheus.io/path": "/" + "x" * 511,
    }
    too_long = {**longest, "prometheus.io/path": "/x" + "é" * 255 + "x"}
    too_many = {**longest, **{f"prometheus.io/param-p{number}": "x" for number in range(65)}}
    many = {**longest, **{f"prometheus.io/param-p{number}": "x" for number in range(50)}}
    async with real_consul() as consul, running_lab_with(consul.address) as lab:
        wanted = await add_odd_pods(lab.cluster, pods)
        for name, annotations in (
            ("longest", longest), ("too-long", too_long), ("too-many", too_many), ("many", many),
        ):  # fmt: skip
            await lab.cluster.add_pod(name, annotations=annotations)
        settings_with_much_meta = {"INSTANCE": "i" * 50, "SHARD_PATHS": "s" * 512}
        async with await lab.registrar(**settings_with_much_meta) as daemon:
            await daemon.ready()
            line = await daemon.passes()
            found = set(await services(consul))
            assert not daemon.said("Consul refuses a service")
            assert {"pod--shop--longest", "pod--shop--many"} <= found
            assert not found & {"pod--shop--too-long", "pod--shop--too-many"}
            assert line["rejected"] == len(wanted) + 4 - len(found)
            assert line["rejected"] > 2, "odd ones are among them"


async def token(consul: RealConsul, rules: str) -> str:
    """Make a token that may do just this."""
    policy = {"Name": f"policy-{abs(hash(rules))}", "Rules": rules}
    status, answer = await consul.request("PUT", "/v1/acl/policy", policy)
    assert status == 200, answer
    status, answer = await consul.request("PUT", "/v1/acl/token", {"Policies": [{"Name": policy["Name"]}]})
    assert status == 200, answer
    return str(answer["SecretID"])


FULL = 'service_prefix "" { policy = "write" } node_prefix "" { policy = "read" }'
PART = 'service_prefix "pod--" { policy = "write" } service_prefix "node--" { policy = "read" }'


async def _world(lab: Lab) -> None:
    await lab.cluster.add_pod()
    await lab.cluster.add_node("node-a", ("InternalIP", "192.0.2.10"))


async def test_token_with_a_part_of_the_rights() -> None:
    """Permitted services are written; each refused one is logged once, and nothing else is held up."""
    async with real_consul(acl=True) as consul, running_lab_with(consul.address) as lab:
        await _world(lab)
        secret = await token(consul, PART)
        async with await lab.registrar(CONSUL_HTTP_TOKEN=secret) as daemon:
            await daemon.until(lambda: holds(consul, WEB))
            line = await daemon.until_said("Consul refuses a service")
            assert line["service"] == NODE
            assert "Consul answers 403" in line["problem"]
            await lab.cluster.add_pod("web-2")
            await daemon.until(lambda: holds(consul, WEB, "pod--shop--web-2"))
            assert len(daemon.said("Consul refuses a service")) == 1
            assert secret not in daemon.output


async def test_token_consul_does_not_know() -> None:
    """It is logged, nothing is written, and the right token in its file mends it without a restart."""
    async with real_consul(acl=True) as consul, running_lab_with(consul.address) as lab:
        await _world(lab)
        right = await token(consul, FULL)
        token_file = lab.folder / "consul-token"
        token_file.write_text("5d2b9a3c-0000-4000-8000-00000000dead")
        async with await lab.registrar(CONSUL_HTTP_TOKEN_FILE=str(token_file)) as daemon:
            line = await daemon.until_said("Consul cannot be used; trying again")
            assert "Consul answers 403" in line["problem"]
            assert (await daemon.admin("/readyz"))[0] == 503
            token_file.write_text(right)
            await daemon.until(lambda: holds(consul, WEB, NODE))
            assert right not in daemon.output


async def test_token_that_sees_nothing_makes_nothing_vanish() -> None:
    """A read that ACLs filter shows an empty agent; services are never taken for gone, nor rewritten forever."""
    async with real_consul(acl=True) as consul, running_lab_with(consul.address) as lab:
        await _world(lab)
        async with await lab.registrar(CONSUL_HTTP_TOKEN=await token(consul, FULL)) as daemon:
            await daemon.until(lambda: holds(consul, WEB, NODE))
        before = await catalog(consul)
        await register(consul, "db")
        async with await lab.registrar(CONSUL_HTTP_TOKEN="") as daemon:
            await daemon.until_said("conflict: the service ID is not ours to write", "may not see")
            assert await holds(consul, WEB, NODE, "db")
            assert {key: value for key, value in (await catalog(consul)).items() if key != "db"} == before


async def test_consul_that_dies_and_comes_back() -> None:
    """While it is away nothing is lost; when it is back what changed meanwhile is done."""
    async with real_consul() as consul, running_lab_with(consul.address) as lab:
        await _world(lab)
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: holds(consul, WEB, NODE))
            await daemon.ready()
            before = await catalog(consul)
            await consul.program.stop(signal.SIGKILL)
            await daemon.until_said("Consul cannot be used; trying again")
            await lab.cluster.delete_pod()
            assert await daemon.is_ready()
            await consul.start()
            await daemon.until(lambda: holds(consul, NODE))
            assert (await catalog(consul))[NODE] == before[NODE]
