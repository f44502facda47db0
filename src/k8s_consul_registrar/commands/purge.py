"""The command purge: removes every service of one cluster and instance from Consul, after showing them."""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.commands import settings_for_consul
from k8s_consul_registrar.consul.agent import SYNC_TIME, AgentRegistry
from k8s_consul_registrar.consul.batches import Transactions
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.ghosts import AgentGhosts
from k8s_consul_registrar.consul.lost_agents import LostAgents
from k8s_consul_registrar.consul.node import NodeRemoval
from k8s_consul_registrar.consul.previous_location import PreviousLocation
from k8s_consul_registrar.errors import (
    AccessError,
    ClusterError,
    ConsulFiltered,
    ConsulForbidden,
    ConsulRefused,
    SettingsError,
)
from k8s_consul_registrar.kube.cluster import IDENTITY_NAMESPACE
from k8s_consul_registrar.model import Service, Written
from k8s_consul_registrar.registrar.audit import Audit
from k8s_consul_registrar.registrar.brake import Ground, Proof
from k8s_consul_registrar.registrar.interfaces import Registry
from k8s_consul_registrar.registrar.orphans import observe_agents
from k8s_consul_registrar.registrar.ownership import Claim, Identity
from k8s_consul_registrar.runner import EXIT_FAILURE, EXIT_OK, run_loop
from k8s_consul_registrar.settings.consul import CATALOG, default_node
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.targets.scrape_config import socket_address
from k8s_consul_registrar.wiring.backend import decided
from k8s_consul_registrar.wiring.registrar import Wiring

# Services that are shown; the rest is a count.
MOST_SHOWN = 50
# Looks at the catalog while the agent brings its removals there.
LOOKS = 10

_AUDIT, _ASKED = Audit(), Proof(Ground.PURGE)
MayGo = Callable[[Service], bool]


class _Found(NamedTuple):
    """The services of this name in one place; `place` makes the location that is cleared of those that may go."""

    where: str
    place: Callable[[MayGo], PreviousLocation]
    services: Sequence[Service]

    def only(self, is_chosen: MayGo) -> "_Found":
        """Return the same place with fewer services."""
        return self._replace(services=[one for one in self.services if is_chosen(one)])


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Remove the registrar's services: exit 0 done or nothing there, 1 refused, not agreed to, or failed."""
    settings = settings_for_consul("purge", environment)
    if settings.has_default_name:
        raise SettingsError(["purge: name the cluster by CLUSTER_NAME or --cluster-name"])
    if not settings.policy.removes:
        raise SettingsError([f"purge: POLICY={settings.policy} allows no removals; add --policy sync"])
    return run_loop(_purge(Wiring(settings), is_agreed=parsed.yes, cluster_uid=parsed.cluster_uid))


async def _purge(wiring: Wiring, *, is_agreed: bool, cluster_uid: str) -> int:
    uid = cluster_uid or await _ask_which_cluster(wiring)
    async with wiring.consul() as client:
        wiring = await decided(wiring, client)
        settings, who = wiring.settings, wiring.identity
        registry = wiring.registry(client)
        ghosts = AgentGhosts(registry) if isinstance(registry, AgentRegistry) else None
        every = [await _at_home(wiring, registry), *await _left(ghosts, who), *await _lost(wiring, client)]
        if problem := _ambiguity(every, uid):
            print(f"purge: {problem}", file=sys.stderr)
            return EXIT_FAILURE
        found = [one.only(lambda service: who.claim(service, uid) is Claim.OURS) for one in every]
        _show(found, settings)
        _show_others(every, found)
        node = _node(settings, client)
        count = sum(len(one.services) for one in found)
        obstacle = "" if node is None else await node.obstacle()
        goes = node is not None and not obstacle and bool(count or not await node.is_used())
        if goes:
            print(f"node {settings.backend.node_name} goes too, once nothing is left on it")
        if not count and not goes:
            return EXIT_OK
        if not is_agreed and not await asyncio.to_thread(_agrees, count):
            print("nothing was removed")
            return EXIT_FAILURE
        written = [await _clear(one, who, uid) for one in found if one.services]
        if ghosts is not None:
            shown = {service.id for service in found[0].services}
            written += await _clear_left(
                ghosts, lambda one: one.id in shown and who.claim(one, uid) is Claim.OURS
            )
        if node is not None:
            stays = obstacle or await node.remove()
            print(f"node {settings.backend.node_name} " + (f"stays: {stays}" if stays else "is removed"))
    return _tell(written)


async def _ask_which_cluster(wiring: Wiring) -> str:
    """Return the UID of the cluster of the kubeconfig or the Pod, empty if it cannot be read."""
    try:
        async with wiring.kube() as kube:
            return await kube.namespace_uid(IDENTITY_NAMESPACE) or ""
    except (AccessError, ClusterError) as error:
        print(f"purge: the cluster cannot be asked for its UID: {error}", file=sys.stderr)
        return ""


async def _at_home(wiring: Wiring, registry: Registry) -> _Found:
    """Find the services at the place that the settings name."""
    settings = wiring.settings
    where = f"at {settings.consul.socket or settings.consul.url} ({settings.backend.backend})"
    return await _found(where, lambda may_go: PreviousLocation(where, registry, may_go), wiring.identity)


async def _left(ghosts: AgentGhosts | None, who: Identity) -> list[_Found]:
    """Find the services that the agent left in the catalog."""
    if ghosts is None:
        return []
    where = "in the catalog at the agent's node, which the agent does not hold"
    try:
        found = await _found(where, lambda may_go: PreviousLocation(where, ghosts, may_go), who)
    except (ConsulForbidden, ConsulRefused, ConsulFiltered) as error:
        print(f"purge: what the agent left in the catalog is not looked at: {error}", file=sys.stderr)
        return []
    return [found] if found.services else []


async def _clear_left(ghosts: AgentGhosts, may_go: MayGo) -> list[Written]:
    """Remove from the catalog what the agent still leaves there after some seconds."""
    place = PreviousLocation("agent's node", ghosts, may_go)
    try:
        for _ in range(LOOKS):
            if not [one async for one in place.services()]:
                return []
            await asyncio.sleep(SYNC_TIME / LOOKS)
        cleared = await place.clear(_AUDIT.remover(_ASKED, place=place.name))
    except (ConsulForbidden, ConsulRefused, ConsulFiltered) as error:
        print(f"purge: what the agent leaves in the catalog is not looked at: {error}", file=sys.stderr)
        return []
    print(f"the agent left {cleared.done + len(cleared.failures)} of them in the catalog")
    return [msgspec.structs.replace(cleared, done=0)]


async def _lost(wiring: Wiring, client: ConsulClient) -> list[_Found]:
    """Find the services at nodes of agents that are gone now, except at the one we talk to."""
    agents, who = LostAgents(client, wiring.settings.naming.meta_keys), wiring.identity
    try:
        watched = observe_agents({}, await agents.failing(), await agents.own_node(), 0.0)
        found = [
            await _found(f"at node {name}, whose agent is gone", partial(agents.location, one.health), who)
            for name, one in sorted(watched.items())
        ]
    except (ConsulForbidden, ConsulRefused) as error:
        print(f"purge: nodes of lost agents are not checked: {error}", file=sys.stderr)
        return []
    return [one for one in found if one.services]


async def _found(where: str, place: Callable[[MayGo], PreviousLocation], who: Identity) -> _Found:
    # The original program's services have only the cluster's name, which does not prove whose they are.
    by_name = place(lambda service: who.claim(service, "") is Claim.OURS)
    return _Found(where, place, [one async for one in by_name.services()])


def _ambiguity(found: Sequence[_Found], uid: str) -> str:
    """Return why removing by name only would be wrong, empty if it is not."""
    counts = _uids(found)
    if uid or len(counts) < 2:
        return ""
    named = ", ".join(f"{one} ({count} services)" for one, count in counts.most_common())
    return (
        f"several clusters have this name, by their UIDs {named}: choose one by --cluster-uid, or give a "
        "kubeconfig of the right one"
    )


def _uids(found: Sequence[_Found]) -> Counter[str]:
    uids = Counter(service.value("cluster_uid") for one in found for service in one.services)
    del uids[""]
    return uids


def _node(settings: RegistrarSettings, client: ConsulClient) -> NodeRemoval | None:
    """Return the removal of the catalog's node, None for an agent's registrar."""
    name = settings.backend.node_name
    if settings.backend.backend != CATALOG:
        return None
    has_our_name = name == default_node(settings.cluster_name, settings.instance)
    return NodeRemoval(client, Transactions(client), name, has_our_name=has_our_name)


async def _clear(found: _Found, who: Identity, uid: str) -> Written:
    """Remove the services that were shown and are still ours."""
    shown = {service.id for service in found.services}
    return await found.place(lambda one: one.id in shown and who.claim(one, uid) is Claim.OURS).clear(
        _AUDIT.remover(_ASKED, place=found.where)
    )


def _tell(written: Sequence[Written]) -> int:
    failures = [failure for one in written for failure in one.failures]
    stale = sum(len(one.stale) for one in written)
    done = sum(one.done for one in written)
    print(f"removed {done}, refused {len(failures)}, changed meanwhile by others {stale}")
    for failure in failures[:MOST_SHOWN]:
        print(f"  {failure.id}: {failure.problem}", file=sys.stderr)
    return EXIT_FAILURE if failures or stale else EXIT_OK


def _show(found: Sequence[_Found], settings: RegistrarSettings) -> None:
    instance = f", instance {settings.instance}" if settings.instance else ""
    for one in found:
        print(f"{len(one.services)} services of cluster {settings.cluster_name}{instance} {one.where}")
        for service in one.services[:MOST_SHOWN]:
            print(f"- {service.id}  {socket_address(service.address, service.port)}")
        if len(one.services) > MOST_SHOWN:
            print(f"  and {len(one.services) - MOST_SHOWN} more")


def _show_others(every: Sequence[_Found], found: Sequence[_Found]) -> None:
    for uid, count in (_uids(every) - _uids(found)).items():
        print(
            f"{count} services of this name are of another cluster and stay; --cluster-uid {uid} chooses them"
        )


def _agrees(count: int) -> bool:
    """Ask on the terminal; without one the answer is no."""
    if not sys.stdin.isatty():
        print("not a terminal: add --yes to remove them", file=sys.stderr)
        return False
    return input(f"Remove these {count} services? Type yes: ").strip() == "yes"
