"""Shard paths are read, given out and kept."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.targets.service_names import HashShards, RandomShards


def test_new_services_are_spread() -> None:
    """Services without a shard get any, each the same one whenever it is asked for again."""
    shards = RandomShards(("a", "b", "c"))
    given = {service_id: shards.choose(service_id, "") for service_id in IDS}
    assert min(Counter(given.values()).values()) > 150
    assert given == {service_id: shards.choose(service_id, "gone") for service_id in IDS}


def test_shard_on_offer_is_kept_and_a_retired_one_is_not() -> None:
    """A service keeps its shard while it is on offer."""
    shards = RandomShards(("a", "b"))
    assert {shards.choose("x", "b") for _ in range(50)} == {"b"}
    assert shards.choose("x", "gone") in ("a", "b")


def test_without_paths_there_is_no_shard() -> None:
    """Without shard paths a service carries none, whatever it had."""
    assert RandomShards().choose("x", "a") == ""


IDS = [f"pod--shop--web-{number}" for number in range(600)]
PATHS = ("a", "b", "c", "d")


def placed(paths: tuple[str, ...]) -> dict[str, str]:
    """Return the shard that each ID gets by its hash."""
    return {service_id: HashShards(paths).choose(service_id, "") for service_id in IDS}


def test_hash_spreads_and_is_stable() -> None:
    """Every shard gets a fair part, the same in every process and whatever the order of the paths."""
    counts = Counter(placed(PATHS).values())
    assert min(counts.values()) > 100
    assert placed(PATHS) == placed(PATHS[::-1])
    # Fixed: another value would move every service of everybody who upgrades.
    assert [HashShards(PATHS).choose(service_id, "") for service_id in IDS[:8]] == list("bdcbdccc")


def test_hash_heeds_no_shard_but_its_own() -> None:
    """A service that is on another shard is moved to the one its ID decides."""
    for service_id, shard in placed(PATHS).items():
        assert {HashShards(PATHS).choose(service_id, current) for current in ("", "gone", *PATHS)} == {shard}
    assert HashShards().choose("x", "a") == ""


@given(st.sets(st.text(min_size=1, max_size=5), min_size=2, max_size=6), st.data())
def test_shard_that_goes_moves_only_its_own(paths: set[str], data: st.DataObject) -> None:
    """Services on the other paths stay where they were."""
    gone = data.draw(st.sampled_from(sorted(paths)))
    service_id = data.draw(st.text(min_size=1))
    before = HashShards(tuple(paths)).choose(service_id, "")
    after = HashShards(tuple(paths - {gone})).choose(service_id, before)
    assert after == before if before != gone else after in paths - {gone}
