"""Audit: every removal is noted with its proof, and there is no way around it."""

import ast
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache

import pytest
from structlog.testing import capture_logs

from k8s_consul_registrar.errors import ConsulUnreachable
from k8s_consul_registrar.model import Service, WriteFailure, Written
from k8s_consul_registrar.registrar.audit import Audit
from k8s_consul_registrar.registrar.brake import Ground, Proof
from k8s_consul_registrar.registrar.status import MOST_REMOVALS, RegistrarStatus
from support.builders import make_pod, our_pod_service
from support.files import PACKAGE

KEY = make_pod("a").key
PROOF = Proof(Ground.EVENT, 7, key=KEY)
# Modules that remove records from Consul themselves: what they offer is called by the audit only. A rename replaces a
# record; a node is removed by purge once nothing is on it.
REMOVERS = {
    "consul/agent.py",
    "consul/catalog.py",
    "consul/ghosts.py",
    "consul/lost_agents.py",
    "consul/node.py",
    "consul/renames.py",
    "consul/transactions.py",
}


async def test_audit_notes_what_was_removed_and_nothing_else() -> None:
    """Refused and stale services stay, and have no line."""

    async def write(services: Sequence[Service]) -> Written:
        return Written(1, (WriteFailure(services[1].id, "no"),), stale=(services[2].id,))

    audit = Audit(leader="lab-1", clock=lambda: 1000.0)
    services = [our_pod_service(name) for name in "abc"]
    with capture_logs() as logs:
        written = await audit.remove(write, services, dict.fromkeys((one.id for one in services), PROOF))
    assert written.done == 1
    (line,) = logs
    assert line == {
        "event": "service deregistered",
        "log_level": "info",
        "part": "audit",
        "service": "pod--shop--a",
        "object": "pod shop/a",
        "proof": "event",
        "generation": 7,
        "brake": "not asked",
        "leader": "lab-1",
    }
    (removal,) = audit.removals
    assert (removal.at, removal.id, removal.proof, removal.leader) == (1000.0, "pod--shop--a", PROOF, "lab-1")


async def test_audit_notes_a_removal_without_an_answer_once_until_one_is_answered() -> None:
    """It may have been made, and is tried again."""

    async def fail(_: Sequence[Service]) -> Written:
        raise ConsulUnreachable("gone")

    async def write(services: Sequence[Service]) -> Written:
        return Written(len(services))

    audit, services = Audit(), [our_pod_service("a")]
    with capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(ConsulUnreachable):
                await audit.remove(fail, services, PROOF)
        await audit.remover(PROOF, place="node old")(write, services)
    assert [(line["event"], line.get("place")) for line in logs] == [
        ("service may be deregistered", None),
        ("service deregistered", "node old"),
    ]
    assert [one.is_answered for one in audit.removals] == [True, False]


async def test_audit_remembers_a_bounded_number_in_little_memory() -> None:
    """The latest thousand, the newest first, in less than a megabyte."""

    async def write(services: Sequence[Service]) -> Written:
        return Written(len(services))

    status = RegistrarStatus()
    audit = Audit(status.removals, leader="k8s-consul-registrar-5d4f8b7c9-abcde")
    for number in range(3 * MOST_REMOVALS):
        service = our_pod_service(f"web-{number}-{'x' * 40}")
        proof = Proof(Ground.ABSENCE, number, "held for 600 s", make_pod(f"web-{number}").key)
        await audit.remove(write, [service], {service.id: proof})
    assert len(status.removals) == MOST_REMOVALS
    assert status.removals[0].proof.generation == 3 * MOST_REMOVALS - 1
    parts = [
        part for one in status.removals for part in (one, one.id, one.proof, one.proof.key, one.proof.brake)
    ]
    assert sum(map(sys.getsizeof, parts)) < 1_000_000


Reference = tuple[str, ast.Attribute, ast.AST]


@cache
def all_references() -> Mapping[str, Sequence[Reference]]:
    """Return where the package names each attribute: module, expression and what it is part of."""
    found: dict[str, list[Reference]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        module = str(path.relative_to(PACKAGE))
        if module.startswith("sandbox/"):
            continue
        for parent in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for child in ast.iter_child_nodes(parent):
                if isinstance(child, ast.Attribute):
                    found[child.attr].append((module, child, parent))
    return found


def test_nothing_deregisters_but_through_the_audit() -> None:
    """Each way to remove services is passed to something, and called by the audit; none is called where it is named."""
    found = all_references()["deregister"]
    called = [module for module, one, parent in found if isinstance(parent, ast.Call) and parent.func is one]
    assert called == []
    assert {module for module, *_ in found} == {"consul/previous_location.py", "registrar/reconciler.py"}


def test_ways_to_remove_a_record_are_known() -> None:
    """A new module that removes records itself must be listed, and its callers must go through the audit."""
    texts = {
        str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
        if "sandbox" not in path.parts
    }
    ways = ("operations.remove", "/service/deregister/", "def remove_node", "catalog/deregister", '"delete')
    assert {name for name, text in texts.items() if any(way in text for way in ways)} == REMOVERS
    # What the ghosts' `remove` offers beside `deregister` is passed to the audit as well.
    assert [m for m, one, _ in all_references()["remove"] if ast.unparse(one.value) == "self._agent"] == [
        "registrar/ghosts.py"
    ]
    assert "self._audit.remove(remove, services" in texts["registrar/ghosts.py"]
    clears = [m for m, one, _ in all_references()["clear"] if ast.unparse(one.value) in ("place", "location")]
    assert set(clears) == {
        "commands/purge.py",
        "consul/previous_location.py",
        "registrar/orphan_collector.py",
    }
