"""The largest meta that the registrar writes, on a real Consul."""

from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.model import Namespace
from support.builders import SCRAPED, make_node, make_pod
from support.meta_limits import NAMES, cluster_of, services_of
from support.real_servers import REAL, connected, real_consul

pytestmark = REAL


async def test_consul_takes_the_largest_meta_that_is_written() -> None:
    """64 pairs, most of them of 512 bytes, of a Pod and of an endpoint."""
    labels = {**dict.fromkeys(NAMES, "v" * 512), "topology.kubernetes.io/zone": "z" * 512}
    pod = make_pod(
        labels=dict.fromkeys(NAMES, "v" * 512), annotations=SCRAPED | labels, owner="w", owner_kind="Job"
    )
    services = services_of(cluster_of(pod, Namespace("shop", labels), make_node(labels=labels)))
    assert max(len(one.meta) for one in services) == 64
    async with real_consul() as consul, connected(consul) as client:
        written = await CatalogRegistry(client, "k8s-lab").register(services)
        assert (written.done, written.failures) == (len(services), ())
