"""Equal parts of targets' meta are one object, and what is kept for it is bounded."""

from k8s_consul_registrar.targets.meta import LONGEST_META_VALUE, MOST_META_PAIRS, checked_meta, shared_pair


def test_equal_pairs_are_one_object() -> None:
    """Made of texts that are equal but not the same."""
    first, second = (checked_meta({"node": f"node-{number:d}"}) for number in (17, 17))
    assert first == (("node", "node-17"),)
    assert first[0] is second[0]


def test_shared_meta_is_bounded() -> None:
    """Pairs that never come again do not pile up, and none is longer than Consul takes."""
    most = shared_pair.cache_info().maxsize
    assert most is not None
    for number in range(2 * most):
        checked_meta({"pod": f"p-{number}"})
    assert shared_pair.cache_info().currsize == most


def test_many_short_values_are_looked_at_one_by_one() -> None:
    """Together they are longer than one may be."""
    meta = {f"param_{number:02d}": "x" * (LONGEST_META_VALUE // 2) for number in range(MOST_META_PAIRS)}
    assert dict(checked_meta(meta)) == meta
