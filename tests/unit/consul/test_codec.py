"""Consul's JSON, read off recorded answers and odd ones."""

import json

import msgspec
import pytest

from k8s_consul_registrar.consul.codec import decode_agent_services, decode_service, encode_registration
from k8s_consul_registrar.errors import ConsulRefused
from k8s_consul_registrar.model import Service
from support.builders import our_pod_service
from support.files import SAMPLES


def test_recorded_agent_services() -> None:
    """The services a real agent showed are read with meta and tags sorted, null and absent alike."""
    sample = json.loads((SAMPLES / "consul-agent-services.json").read_text())
    services = {service.id: service for service in decode_agent_services(sample["response"]["body"].encode())}
    assert services["node--2001:db8:1::5"] == Service(
        "node--2001:db8:1::5", "node--2001:db8:1::5", "2001:db8:1::5", 31112
    )
    cart = services["pod--shop--cart-7d9f8c6b5-abcde"]
    assert (cart.address, cart.port, cart.tags) == ("198.51.100.11", 9102, ("cluster=lab",))
    assert cart.meta == tuple(sorted(cart.meta))
    assert cart.value("shard_path") == "shard-1"


def test_null_meta_and_tags() -> None:
    """Go's null is an empty map or list."""
    assert decode_service("x", b'{"Service":"n","Address":"a","Port":1,"Meta":null,"Tags":null}') == Service(
        "x", "n", "a", 1
    )


def test_catalogs_index_is_kept_apart_from_equality() -> None:
    """ModifyIndex is carried along but two records that differ only in it are equal, and not unequal."""
    one, two = (decode_service("x", b'{"Service":"n","ModifyIndex":%d}' % index) for index in (1, 2))
    assert (one.index, two.index) == (1, 2)
    assert (one == two, one != two) == (True, False)


@pytest.mark.parametrize("raw", [b'{"Port":"x"}', b"[]", b'{"Meta":{"a":1}}', b'{"Service":"\xff"}'])
def test_unreadable_record_still_holds_its_id(raw: bytes) -> None:
    """A record that cannot be read is not ours, but its ID is taken."""
    assert decode_service("x", raw) == Service("x", "", "", 0)


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b"\xff\xfe", b"null"])
def test_answer_that_is_no_map_of_services_is_refused(body: bytes) -> None:
    """An answer of another shape is an error, never an empty Consul."""
    with pytest.raises(ConsulRefused, match="not what Consul sends"):
        list(decode_agent_services(body))


def test_empty_agent() -> None:
    """An agent without services is an empty map."""
    assert list(decode_agent_services(b"{}")) == []


def test_registration_round_trip() -> None:
    """A later read of a written service compares equal."""
    service = our_pod_service("a", shard_path="s1")
    written = msgspec.json.decode(encode_registration(service))
    assert written["Meta"] == dict(service.meta)
    shown = {"Service": written["Name"], **{key: written[key] for key in ("Address", "Port", "Meta")}}
    assert decode_service(written["ID"], msgspec.json.encode(shown)) == service


def test_service_without_an_id_cannot_be_made() -> None:
    """An empty ID is unrepresentable: a catalog deregister without one removes the whole node."""
    with pytest.raises(ValueError, match="needs an ID"):
        Service("", "n", "a", 1)
