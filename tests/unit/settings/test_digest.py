"""The digest of the selection: equal where the same targets come of it, another one otherwise."""

import os
import subprocess
import sys

import pytest

from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.settings.registrar import selection_digest

BASE = {"CLUSTER_NAME": "lab", "NAMESPACES": "a,b", "SHARD_PATHS": "s1,s2", "HTTP_SD_PORT": "0"}


def digest(**changes: str) -> str:
    """Return the digest of these settings."""
    return selection_digest(read_registrar({**BASE, **changes}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CLUSTER_NAME", "other"),
        ("INSTANCE", "blue"),
        ("DISCOVER", "pods,nodes"),
        ("NAMESPACES", "a"),
        ("NAMESPACES", ""),
        ("POD_LABEL_SELECTOR", "app=web"),
        ("NAMESPACE_LABEL_SELECTOR", "team=web"),
        ("NODE_LABEL_SELECTOR", "role=worker"),
        ("ANNOTATION_PREFIX", "scrape.example/"),
        ("NODE_ADDRESS_TYPES", "ExternalIP,InternalIP"),
        ("SERVICE_ID_PREFIX", "x-"),
        ("POD_SERVICE_NAME", "{cluster}-pods"),
        ("NODE_SERVICE_NAME", "{cluster}-nodes"),
        ("SERVICE_TAGS", "cluster={cluster}"),
        ("POD_LABELS_AS_META", "app"),
        ("NAMESPACE_LABELS_AS_META", "team"),
        ("NODE_LABELS_AS_META", "pool"),
        ("POD_ANNOTATIONS_AS_META", "owner"),
        ("EXTRA_META", "workload"),
        ("POD_IP_FAMILY", "ipv6"),
        ("NODE_IP_FAMILY", "ipv6"),
        ("META_KEYS", "cluster=cluster_name"),
        ("TARGET_LABELS", "__sample_limit__"),
        ("SHARD_PATHS", "s1"),
        ("SHARD_STRATEGY", "hash"),
        ("PROXY_NODE_PORT", "31113"),
        ("PROXY_SCHEME", "https"),
        ("POD_ADDRESS", "proxy"),
        ("POD_ADDRESS", "host"),
        ("NODE_PATHS", "/metrics/cadvisor,/metrics"),
        ("NODE_PATHS_WINDOWS", "/metrics"),
        ("SCRAPE_INTERVAL_MIN", "30s"),
        ("SCRAPE_INTERVAL_DEFAULT", "1m"),
        ("SLOW_INTERVAL", "10m"),
        ("SLOW_TIMEOUT", "1m"),
    ],
)
def test_setting_that_selects_or_shapes_objects_changes_it(name: str, value: str) -> None:
    """Each by itself."""
    assert digest(**{name: value}) != digest()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NAMESPACES", "b, a"),
        ("SHARD_PATHS", "s2,s1"),
        ("DISCOVER", "pods"),
        ("CONSUL_BACKEND", "catalog"),
        ("CONSUL_ADDRESS", "192.0.2.1:8500"),
        ("SYNC_PERIOD", "30"),
        ("BRAKE_CONFIRM", "5"),
        ("HTTP_SD_STATE_FILE", "/var/lib/registrar/state.json"),
        ("LOG_LEVEL", "debug"),
        ("FILE_SD_PATH", "/targets/cluster.json"),
        ("PREVIOUS_INSTANCES", "old"),
        ("SCRAPE_INTERVAL_MIN", "10000ms"),
    ],
)
def test_other_settings_and_spellings_of_the_same_leave_it(name: str, value: str) -> None:
    """Where to write, how long to wait, and the order of a set."""
    assert digest(**{name: value}) == digest()


def test_excluded_namespaces_change_it_where_they_have_an_effect() -> None:
    """In any order; beside NAMESPACES they have none."""
    assert digest(EXCLUDE_NAMESPACES="c") == digest()
    assert digest(NAMESPACES="", EXCLUDE_NAMESPACES="c,d") == digest(NAMESPACES="", EXCLUDE_NAMESPACES="d,c")
    assert digest(NAMESPACES="", EXCLUDE_NAMESPACES="c") != digest(NAMESPACES="")


def test_digest_of_settings_before_there_were_intervals_stays() -> None:
    """An upgrade is no other selection: otherwise it would make the brake wait longer."""
    assert digest() == "7ce0bbbb97ca8c4971e92336"


def test_digest_is_the_same_in_every_process() -> None:
    """Nothing of one interpreter's hashing is in it, and Consul takes it as a value of meta."""
    program = (
        "from k8s_consul_registrar.settings.reading import read_registrar as r;"
        "from k8s_consul_registrar.settings.registrar import selection_digest as d;"
        f"print(d(r({BASE!r})))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": os.environ["PATH"], "PYTHONHASHSEED": seed},
        )
        assert done.stdout.strip() == digest()
    assert len(digest()) == 24
    assert digest().isalnum()
