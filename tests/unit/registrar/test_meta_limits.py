"""Meta stays within Consul's limits, whatever Pods, Nodes and Namespaces say."""

from hypothesis import given, settings
from hypothesis import strategies as st

from k8s_consul_registrar.model import Kind, Namespace, Node, Pod
from support.builders import SCRAPED, make_node, make_pod
from support.meta_limits import NAMES, breaches, cluster_of, services_of

_VALUES = st.sampled_from(["", "v", "é" * 256, "é" * 257, "v" * 512, "v" * 513, "a\nb", "\ud800", "\u2028"])
_LABELS = st.dictionaries(st.sampled_from([*NAMES, "topology.kubernetes.io/zone", "other"]), _VALUES)
_ALL = dict.fromkeys(NAMES, "v" * 512)
_PODS = st.builds(
    make_pod,
    labels=_LABELS | st.just(_ALL),
    annotations=(_LABELS | st.just(_ALL)).map(lambda given: SCRAPED | given),
    owner=_VALUES,
    owner_kind=_VALUES,
    uid=_VALUES,
    node=st.sampled_from(["", "node-a"]),
)


@settings(deadline=None)
@given(_PODS, _LABELS | st.just(_ALL), _LABELS | st.just(_ALL), st.booleans())
def test_any_labels_lead_to_meta_that_consul_takes(
    pod: Pod, of_namespace: dict[str, str], of_node: dict[str, str], is_node_first: bool
) -> None:
    """Every object is a target or has one reason, in any order; what is dropped is counted."""
    others: list[Namespace | Node] = [Namespace("shop", of_namespace), make_node(labels=of_node)]
    cluster = cluster_of(pod, *(reversed(others) if is_node_first else others))
    same = cluster_of(pod, *others)
    assert cluster.desired.claims == same.desired.claims
    assert [breaches(one) for one in services_of(cluster) if breaches(one)] == []
    keys = {target.key for claims in cluster.desired.claims.values() for target in claims}
    rejected = cluster.desired.rejections.keys()
    assert not keys & rejected
    assert (pod.key in keys) is not (pod.key in rejected)
    assert (others[1].key in keys) is not (others[1].key in rejected)
    assert all(count >= 0 for count in cluster.desired.notes.values())
    for item in (pod, *others):
        cluster.remove(item)
    assert {key.kind for key in cluster.desired.rejections} <= {Kind.ENDPOINT}
