"""Transactions: what is sent, how it is packed, and how answers are read."""

import json
from functools import partial

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.consul.transactions import (
    MOST_BYTES,
    MOST_OPERATIONS,
    Operations,
    body_of,
    decode_read,
    decode_written,
    operations_allowed,
    pack,
)
from k8s_consul_registrar.errors import ConsulRefused
from k8s_consul_registrar.model import UNSYNCED, Service
from support.builders import make_service, our_pod_service
from support.files import SAMPLES

ON_NODE = Operations("k8s-lab")


def answer(sample: str) -> bytes:
    """Return the body of a recorded answer."""
    body: str = json.loads((SAMPLES / f"{sample}.json").read_text())["response"]["body"]
    return body.encode()


def test_write_names_the_record_it_replaces() -> None:
    """A service is written by compare-and-set; without an index, or with that of an agent's, it creates."""
    service = our_pod_service("a")
    for index, sent in ((0, None), (7, 7), (UNSYNCED, None)):
        (operation,) = ON_NODE.put(replace(service, index=index), has_check=False).operations
        body = json.loads(operation)["Service"]
        assert (body["Verb"], body["Node"]) == ("cas", "k8s-lab")
        assert body["Service"].get("ModifyIndex") == sent
        assert body["Service"]["Meta"] == dict(service.meta)


def test_delete_names_id_name_and_index() -> None:
    """Nothing is removed by an ID alone, and no service without one can be made."""
    (operation,) = ON_NODE.remove(replace(our_pod_service("a"), name="n", index=7)).operations
    body = json.loads(operation)["Service"]
    assert body["Verb"] == "delete-cas"
    assert body["Service"] == {"ID": "pod--shop--a", "Service": "n", "ModifyIndex": 7}
    with pytest.raises(ValueError, match="needs an ID"):
        Service("", "n", "a", 1)


@pytest.mark.parametrize(
    ("ready", "has_check", "sent"),
    [(None, False, None), (None, True, "delete"), (True, False, "passing"), (False, True, "critical")],
)
def test_readiness_goes_with_its_service(ready: bool | None, has_check: bool, sent: str | None) -> None:
    """A target with a check is two operations; a check no longer wanted is removed."""
    unit = ON_NODE.put(replace(our_pod_service("a"), ready=ready), has_check=has_check)
    checks = [json.loads(operation)["Check"] for operation in unit.operations[1:]]
    assert [one["Check"].get("Status", one["Verb"]) for one in checks] == ([sent] if sent else [])
    for one in checks:
        assert one["Check"]["CheckID"] == "pod--shop--a/ready"
        assert one["Check"]["ServiceName"] == "pod--shop--a"


def test_namespace_and_partition_are_named_in_each_operation() -> None:
    """Consul Enterprise reads them off the operations."""
    scoped = Operations("n", "ns1", "p1")
    service = replace(our_pod_service("a"), ready=True)
    for operation in (*scoped.put(service, has_check=True).operations, *scoped.remove(service).operations):
        ((kind, body),) = json.loads(operation).items()
        assert (body[kind]["Namespace"], body[kind]["Partition"]) == ("ns1", "p1")
    assert json.loads(scoped.put_node("127.0.0.1", {}))["Node"]["Node"]["Partition"] == "p1"


def test_packing_keeps_units_whole_and_within_both_limits() -> None:
    """Two operations a target never part; batches are as full as count and size allow, in order."""
    two = [ON_NODE.put(replace(our_pod_service(f"p{n}"), ready=True), has_check=False) for n in range(33)]
    one = [ON_NODE.put(our_pod_service(f"q{n}"), has_check=False) for n in range(64)]
    for most, expected in ((64, [63, 64, 3]), (MOST_OPERATIONS, [128, 2])):
        packed = pack([one[0], *two, *one[1:]], partial(int, most))
        assert [sum(len(unit.operations) for unit in batch) for batch in packed] == expected
    meta = {f"k{number:02}": "x" * 512 for number in range(64)}
    large = [ON_NODE.put(make_service(f"s{n}", meta), has_check=False) for n in range(40)]
    batches = list(pack(large))
    assert [unit for batch in batches for unit in batch] == large
    bodies = [body_of(operation for unit in batch for operation in unit.operations) for batch in batches]
    assert len(bodies) == 3
    assert all(len(body) <= MOST_BYTES for body in bodies)
    assert len(json.loads(bodies[0])) == len(batches[0])
    assert list(pack([])) == []


@pytest.mark.parametrize(
    ("problem", "allowed"),
    [
        ("Consul answers 413 to /v1/txn: Transaction contains too many operations (128 > 64)", 64),
        ("Transaction contains too many operations (128 > 100)", 100),
        ("Transaction contains too many operations", 64),
        ("Request body(9000 bytes) too large, max size: 6000 bytes.", 0),
        ("Transaction contains too many operations (1 > 0)", 1),
    ],
)
def test_refusal_tells_how_many_operations_consul_takes(problem: str, allowed: int) -> None:
    """Its number is believed, and never below one."""
    assert operations_allowed(problem) == allowed


def test_recorded_answers() -> None:
    """A real Consul's answer is read for its indexes, or for the operations that failed."""
    indexes, errors = decode_written(answer("consul-txn-set"))
    assert (indexes, errors) == ({"pod--shop--cart-7d9f8c6b5-abcde": 24}, ())
    assert decode_written(answer("consul-txn-delete")) == ({}, ())
    for sample, kind in (("cas-stale", "is_stale"), ("unknown-node", "is_node_missing")):
        indexes, (error,) = decode_written(answer(f"consul-txn-{sample}"))
        assert (indexes, error.op_index) == ({}, 0)
        assert [getattr(error, name) for name in ("is_stale", "is_node_missing", "is_absent")] == [
            name == kind for name in ("is_stale", "is_node_missing", "is_absent")
        ]


@pytest.mark.parametrize("body", [b"", b"[]", b"true", b'{"Results":[{"Service":{"ID":1}}]}', b"\xff"])
def test_another_answer_is_refused(body: bytes) -> None:
    """An answer of no transaction is neither a success nor a list of errors."""
    with pytest.raises(ConsulRefused, match="not what Consul sends"):
        decode_written(body)


def test_read_takes_each_kind_apart() -> None:
    """Services stay as they were sent; checks and nodes are read."""
    body = (
        b'{"Results":[{"Service":{"ID":"a","X":[1]}},{"Node":{"Node":"n","Meta":null}},'
        b'{"Check":{"CheckID":"a/ready","ServiceID":"a","Status":"passing"}}],"Errors":null,"Index":0}'
    )
    (service, node, check), errors, is_filtered = decode_read(body)
    assert (errors, is_filtered) == ((), False)
    assert decode_read(body[:-1] + b',"ResultsFilteredByACLs":true}').is_filtered
    assert bytes(service.service) == b'{"ID":"a","X":[1]}'
    assert node.node is not None
    assert node.node.node == "n"
    assert check.check is not None
    assert (check.check.is_readiness, check.check.is_passing) == (True, True)
