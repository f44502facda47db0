"""One call that compares everything at once, for tests of what a plan says."""

from collections.abc import Iterable

from k8s_consul_registrar.model import Service
from k8s_consul_registrar.registrar.brake import BrakeRules, Memory
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.plan import Plan
from k8s_consul_registrar.registrar.planner import Planner
from k8s_consul_registrar.targets.sharding import RandomShards, Shards
from k8s_consul_registrar.targets.wanted import Wanted


def plan(
    wanted: Wanted,
    services: Iterable[Service],
    identity: Identity,
    *,
    shards: Shards | None = None,
    rules: BrakeRules | None = None,
    memory: Memory | None = None,
) -> Plan:
    """Return the plan of a full comparison."""
    planner = Planner(wanted, identity, shards or RandomShards())
    for service in services:
        planner.consider(service)
    for _ in planner.complete():
        pass
    held, remembered = planner.brake(rules or BrakeRules(), memory or {})
    return planner.plan(held, remembered)
