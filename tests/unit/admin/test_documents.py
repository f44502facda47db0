"""Documents that follow changes: what is encoded again, and that nothing is missed."""

import gzip
import json
from random import Random

from k8s_consul_registrar.admin.documents import Documents, Groups
from k8s_consul_registrar.admin.target_groups import Group, GroupEncoder, LabelNames, SdQuery
from k8s_consul_registrar.admin.view import TargetRow, View
from support.builders import make_node, make_pod
from support.controller_lab import Seen
from support.memory import NODES, PODS
from support.seen import Registrar, many_targets, pod_target

NAMES = [f"web-{number}" for number in range(12)]


class Counting(GroupEncoder):
    """An encoder that counts."""

    count = 0

    def encode(self, target: TargetRow, names: LabelNames = LabelNames.CONSUL) -> Group:
        """Encode one target."""
        Counting.count += 1
        return super().encode(target, names)


async def texts_of(groups: Groups) -> dict[str, bytes]:
    """Return the groups of this moment by ID."""
    await groups.refresh()
    return {service_id: one.text for service_id, one in groups.by_id.items()}


async def read(view: View) -> dict[str, bytes]:
    """Return the groups of this moment by ID, all encoded now."""
    return await texts_of(Groups(view, GroupEncoder(), LabelNames.CONSUL))


async def step(seen: Seen, dice: Random) -> None:
    """Let something happen in the cluster, in Consul or in the registrar."""
    cluster, consul = seen.lab.cluster, seen.lab.consul
    name = dice.choice(NAMES)
    pod = make_pod(
        name,
        ip=f"198.51.100.{dice.randrange(4)}",
        phase=dice.choice(("Running", "Running", "Running", "Pending", "Succeeded")),
        node=f"node-{dice.randrange(2)}",
    )
    match dice.randrange(12):
        case 0 | 1 | 2:
            cluster.put(pod)
        case 3 | 9:
            cluster.remove(pod)
        case 10 | 11:
            consul.is_down = not consul.is_down
        case 4:
            cluster.put_list(
                [make_pod(one, ip=f"198.51.100.{at}") for at, one in enumerate(NAMES) if dice.random() < 0.7]
            )
        case 5:
            cluster.put(
                make_node(
                    f"node-{dice.randrange(2)}", labels={"topology.kubernetes.io/zone": dice.choice("ab")}
                )
            )
        case 6 if consul.held and not consul.is_down:
            service_id = dice.choice(sorted(consul.held))
            del consul.held[service_id]
            await seen.lab.resynced()
        case 7 if not consul.is_down:
            await seen.lab.resynced()
        case 8:
            seen.lab.controller.on_cluster_uid(f"uid-{dice.randrange(3)}")


async def test_groups_that_follow_changes_are_those_of_a_whole_reading() -> None:
    """Whatever happens: objects that come, change and go, lists that lack some, outages and edits, another UID."""
    seen, dice = Seen(sources=(NODES, PODS)), Random(16)
    followed, documents = (
        Groups(seen.view, GroupEncoder(), LabelNames.CONSUL),
        Documents(seen.view, GroupEncoder()),
    )
    async with seen.lab.running():
        seen.lab.cluster.put_list([make_node("node-0"), make_node("node-1")], NODES)
        seen.lab.cluster.put_list([make_pod(one) for one in NAMES[:6]], PODS)
        for number in range(150):
            await step(seen, dice)
            if dice.random() < 0.5 and not seen.lab.consul.is_down:
                await seen.lab.until_so(lambda: seen.lab.queue.is_drained)
            assert await texts_of(followed) == await read(seen.view), number
            document = await documents.get(SdQuery())
            decoded = json.loads(gzip.decompress(document.packed))
            assert {one["labels"]["__meta_consul_service_id"] for one in decoded} == set(
                await read(seen.view)
            )


async def test_change_of_one_target_encodes_one() -> None:
    """However many there are; one that goes is gone from the next document."""
    seen = Seen()
    pods = [make_pod(f"web-{number}", ip=f"198.51.100.{number}") for number in range(200)]
    seen.lab.cluster.put_list(pods)
    documents = Documents(seen.view, Counting())
    await documents.get(SdQuery())
    assert Counting.count == 200
    seen.lab.cluster.put(make_pod("web-7", ip="198.51.100.207"))
    await documents.get(SdQuery())
    assert Counting.count == 201
    seen.lab.cluster.remove(make_pod("web-7"))
    await documents.groups()
    seen.lab.cluster.put(make_pod("new", ip="198.51.100.207"))
    groups = await documents.groups()
    assert len(groups.by_id) == 200
    assert b'web-7"' not in gzip.decompress((await documents.get(SdQuery())).packed)


async def test_state_of_a_target_in_consul_is_no_change_of_its_group() -> None:
    """Pending or registered: the file is not written twice for one change."""
    seen = Seen()
    async with seen.lab.running():
        await seen.synced([make_pod("a")])
        groups = Groups(seen.view, GroupEncoder(), LabelNames.CONSUL)
        await groups.refresh()
        before = groups.version
        documents = Documents(seen.view, GroupEncoder())
        first = await documents.get(SdQuery())
        await seen.lab.resynced()
        await groups.refresh()
        assert groups.version == before
        seen.lab.observed.changed("pod--shop--a")
        second = await documents.get(SdQuery())
        assert second.packed is first.packed
        assert second.position > first.position


async def test_labels_of_other_names_are_kept_for_the_latest_request_only() -> None:
    """So that requests bound what is held: the names of consul_sd, and one other."""
    documents = Documents(Registrar(many_targets(50)), GroupEncoder())
    for names in (*LabelNames, *LabelNames):
        await documents.get(SdQuery(names=names))
        assert len(documents._groups) <= 2
    assert LabelNames.CONSUL in documents._groups


async def test_document_of_labels_that_were_forgotten_is_rendered_again() -> None:
    """However many changes there were since, among as many targets."""
    registrar = Registrar(many_targets(3))
    documents, query = Documents(registrar, GroupEncoder()), SdQuery(names=LabelNames.KUBERNETES)
    first = await documents.get(query)
    await documents.get(SdQuery(names=LabelNames.BOTH))
    del registrar.held[next(iter(registrar.held))]
    registrar.put(pod_target("newcomer"))
    assert b"newcomer" in gzip.decompress((await documents.get(query)).packed)
    assert b"newcomer" not in gzip.decompress(first.packed)


async def test_document_without_targets_and_with_one_is_json() -> None:
    """The comma that follows each group is not in it."""
    registrar = Registrar()
    documents = Documents(registrar, GroupEncoder())
    for count in range(3):
        document = await documents.get(SdQuery())
        text = gzip.decompress(document.packed)
        assert (len(json.loads(text)), len(text)) == (count, document.size)
        registrar.put(pod_target(f"web-{count}"))
