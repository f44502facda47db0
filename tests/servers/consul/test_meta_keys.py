"""Our meta keys under other names in Consul, and back."""

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.codec import (
    FIXED_KEYS,
    MetaKeys,
    decode_service,
    encode_registration,
    parse_meta_keys,
)
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.registrar.ownership import Claim, Identity, object_of
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.targets.meta import OWN_KEYS
from support.builders import make_service, our_pod_service
from support.scripted import client_of

LAB = Identity("lab")
PLAIN = MetaKeys()
RENAMED = parse_meta_keys(["metrics_path=path", "cluster=cluster_name"])
OTHER = parse_meta_keys(["cluster=k8s"])
OURS = our_pod_service("a", shard_path="s1", param_x="y", label_app="web")


def test_renamed_keys_in_consul() -> None:
    """Consul holds the new names alone, and which they are; nothing else changes."""
    meta = dict(RENAMED.encode(OURS).meta)
    assert (meta["cluster_name"], meta["path"]) == ("lab", "/metrics")
    assert meta["meta_keys"] == "cluster=cluster_name,metrics_path=path"
    assert not {"cluster", "metrics_path"} & meta.keys()
    assert meta["param_x"] == "y"
    assert RENAMED.wire("cluster") == "cluster_name"
    assert RENAMED.wire("node") == "node"


def test_without_renaming_nothing_is_touched() -> None:
    """The usual case costs nothing and adds nothing."""
    assert PLAIN.encode(OURS) is OURS
    assert PLAIN.decode(OURS) is OURS


@pytest.mark.parametrize("keys", [PLAIN, RENAMED, OTHER], ids=lambda keys: keys.text or "plain")
@pytest.mark.parametrize("wrote", [PLAIN, RENAMED, OTHER], ids=lambda keys: keys.text or "plain")
def test_records_of_any_setting_are_ours_and_equal_only_under_the_same(
    wrote: MetaKeys, keys: MetaKeys
) -> None:
    """Whatever META_KEYS was when a service was written, it is ours; where it was another, it is rewritten."""
    read = keys.decode(wrote.encode(OURS))
    assert LAB.claim(read, "") is Claim.OURS
    assert object_of(read) == object_of(OURS)
    assert (read.value("shard_path"), read.value("metrics_path")) == ("s1", "/metrics")
    assert (read == OURS) is (wrote == keys)


@pytest.mark.parametrize("value", ["a", "z"])
def test_key_that_was_renamed_away_is_not_taken_for_ours(value: str) -> None:
    """Beside the renamed key our own name means nothing, and is cleared away."""
    written = RENAMED.encode(OURS)
    edited = make_service(OURS.id, {**dict(written.meta), "cluster": value})
    read = RENAMED.decode(edited)
    assert read.value("cluster") == "lab"
    assert read != OURS
    assert "cluster" not in dict(RENAMED.encode(read).meta)


def test_key_that_is_not_renamed_now_is_no_key_of_ours() -> None:
    """A hand-made service with the new names is as foreign as before."""
    foreign = make_service("web", {"cluster_name": "lab", "path": "/x"})
    assert LAB.claim(RENAMED.decode(foreign), "") is Claim.FOREIGN
    liar = make_service("web", {"meta_keys": "nonsense", "cluster": "lab"})
    assert RENAMED.decode(liar).value("cluster") == "lab"
    assert PLAIN.decode(liar).value("cluster") == "lab"


def test_original_programs_service_is_known() -> None:
    """The original's services have our own key names, whatever these are renamed to."""
    legacy = make_service("pod--shop--a", {"cluster": "lab", "namespace": "shop", "shard_path": "s2"})
    read = RENAMED.decode(legacy)
    assert LAB.claim(read, "") is Claim.LEGACY
    assert read.value("shard_path") == "s2"


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (["cluster"], "cannot be ''"),
        (["=x"], "the key is none of"),
        (["label_app=app"], "is none of"),
        (["managed_by=x"], "cannot be renamed"),
        (["cluster=a b"], "cannot be 'a b'"),
        (["cluster=" + "x" * 129], "cannot be"),
        (["cluster=consul-x"], "cannot be 'consul-x'"),
        (["cluster=namespace"], "which is one of the registrar's own keys"),
        (["cluster=cluster"], "which is one of the registrar's own keys"),
        (["cluster=managed_by"], "which is one of the registrar's own keys"),
        (["cluster=meta_keys"], "which is one of the registrar's own keys"),
        (["cluster=label_app"], "come from Pods"),
        (["cluster=param_x"], "come from Pods"),
        (["cluster=x", "node=x"], "as another key already is"),
        (["cluster=x", "cluster=y"], "is renamed twice"),
        ([f"{key}={key * 8}x" for key in sorted(OWN_KEYS - FIXED_KEYS)], "is over the 512"),
    ],
)
def test_wrong_renamings(entries: list[str], problem: str) -> None:
    """Keys that collide, or that Consul does not accept, are refused with a reason."""
    with pytest.raises(ValueError, match=re.escape(problem)):
        parse_meta_keys(entries)


_RENAMINGS = st.dictionaries(
    st.sampled_from(sorted(OWN_KEYS - FIXED_KEYS)), st.sampled_from([f"k{n}" for n in range(20)])
).filter(lambda renamed: len(set(renamed.values())) == len(renamed))


@given(_RENAMINGS, _RENAMINGS, st.dictionaries(st.sampled_from(sorted(OWN_KEYS)), st.text(max_size=5)))
def test_round_trips(first: dict[str, str], second: dict[str, str], meta: dict[str, str]) -> None:
    """Reading gives back what was written, under the same setting exactly and under another one key by key."""
    wrote, keys = (
        parse_meta_keys(f"{ours}={theirs}" for ours, theirs in one.items()) for one in (first, second)
    )
    service = make_service("x", meta)
    assert wrote.decode(wrote.encode(service)) == service
    read = keys.decode(wrote.encode(service))
    assert {key: read.value(key) for key in OWN_KEYS} == {key: service.value(key) for key in OWN_KEYS}
    assert (read == service) is (wrote == keys)
    assert keys.encode(read) == keys.encode(service)


def test_through_consuls_json() -> None:
    """The index and everything beside meta survive the way to Consul and back."""
    body = msgspec.json.decode(encode_registration(RENAMED.encode(OURS)))
    shown = {"Service": body["Name"], "ModifyIndex": 7, **{k: body[k] for k in ("Address", "Port", "Meta")}}
    read = RENAMED.decode(decode_service(body["ID"], msgspec.json.encode(shown)))
    assert (read, read.index) == (OURS, 7)


async def test_registry_of_an_agent_renames() -> None:
    """The agent holds the new names; what is read back is what was written."""
    async with Consul() as consul, client_of(consul.url) as client:
        registry = AgentRegistry(client, meta_keys=RENAMED)
        await registry.register([OURS])
        assert (consul.agent.services[OURS.id].meta or {})["cluster_name"] == "lab"
        found: list[Service] = [service async for service in registry.services()]
        assert found == [OURS]
        (raw,) = [service async for service in AgentRegistry(client).services()]
        assert raw != OURS
