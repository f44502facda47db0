"""Shard paths are read, given out and kept."""

import random
from collections import Counter

import pytest

from k8s_consul_registrar.targets.sharding import Shards, parse_shard_paths


@pytest.mark.parametrize(
    ("text", "paths"), [("", ()), (" , ,", ()), ("a, b,,a ,c", ("a", "b", "c")), ("one", ("one",))]
)
def test_parse(text: str, paths: tuple[str, ...]) -> None:
    """Spaces, empty entries and repeats are dropped."""
    assert parse_shard_paths(text) == paths


def test_new_services_are_spread() -> None:
    """A service without a shard gets one at random."""
    shards = Shards(("a", "b", "c"), random.Random(1))
    assert min(Counter(shards.choose("") for _ in range(300)).values()) > 60


def test_a_shard_on_offer_is_kept_and_a_retired_one_is_not() -> None:
    """A service keeps its shard while it is on offer."""
    shards = Shards(("a", "b"))
    assert {shards.choose("b") for _ in range(50)} == {"b"}
    assert shards.choose("gone") in ("a", "b")


def test_without_paths_there_is_no_shard() -> None:
    """Without shard paths a service carries none, whatever it had."""
    assert Shards().choose("a") == ""
