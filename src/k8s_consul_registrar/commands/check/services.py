"""Checks of the services that Consul holds already, by owner. Pure: values in, findings out."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from k8s_consul_registrar.commands.check.report import Finding, fail, ok, warn
from k8s_consul_registrar.model import MANAGED_BY, Service
from k8s_consul_registrar.registrar.ownership import Claim, Identity
from k8s_consul_registrar.targets.meta import OWN_KEYS
from k8s_consul_registrar.targets.service_names import kind_of_id

MOST_NAMED = 3  # examples shown of each sort
SAME_NAME = (
    "two clusters share one CLUSTER_NAME: rename one (or this is the kubeconfig of another cluster; or the "
    "cluster was rebuilt, and its old services must be removed by hand)"
)
ALIKE = (
    "if this cluster wants such an ID it is a conflict, and the service stays as it is; after a change of name or "
    "instance set PREVIOUS_CLUSTER_NAMES or PREVIOUS_INSTANCES"
)


@dataclass(slots=True)
class Holdings:
    """The services of one Consul agent by owner; lists hold IDs."""

    ours: list[str] = field(default_factory=list)
    legacy: list[str] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)
    other_uids: Counter[str] = field(default_factory=Counter)
    other_clusters: Counter[str] = field(default_factory=Counter)
    meta_keys: Counter[str] = field(default_factory=Counter)
    others: int = 0


def holdings(services: Iterable[Service], identity: Identity, cluster_uid: str) -> Holdings:
    """Sort services by owner."""
    found = Holdings()
    for service in services:
        claim = identity.claim(service, cluster_uid)
        if claim is Claim.OURS:
            found.ours.append(service.id)
            continue
        if claim is Claim.LEGACY:
            found.legacy.append(service.id)
            continue
        found.others += 1
        if _is_of_our_name(service, identity) and service.value("cluster_uid"):
            found.other_uids[service.value("cluster_uid")] += 1
        elif service.value("managed_by") == MANAGED_BY:
            instance = service.value("instance")
            found.other_clusters[f"{service.value('cluster')}{f' ({instance})' if instance else ''}"] += 1
        else:
            found.meta_keys.update(key for key, _ in service.meta)
            if kind_of_id(service.id) is not None:
                found.alike.append(service.id)
    return found


def _is_of_our_name(service: Service, identity: Identity) -> bool:
    return (
        service.value("managed_by") == MANAGED_BY
        and service.value("cluster") == identity.cluster
        and service.value("instance") == identity.instance
    )


def judge_holdings(found: Holdings, identity: Identity, *, sees_all: bool = True) -> list[Finding]:
    """Return findings about the services that a registrar finds when it starts here."""
    name = "services"
    aside = "" if sees_all else ", as far as the token sees"
    findings = [ok(name, f"{len(found.ours)} ours, {found.others} of others{aside}")]
    if found.legacy:
        findings.append(_legacy(found.legacy, identity))
    if found.other_uids:
        uids = ", ".join(uid for uid, _ in found.other_uids.most_common(MOST_NAMED))
        detail = f"{found.other_uids.total()} services have this cluster's name, {identity.cluster!r}, and another UID ({uids})"
        findings.append(fail("cluster name", detail, SAME_NAME))
    if found.other_clusters:
        named = ", ".join(
            f"{cluster} {count}" for cluster, count in found.other_clusters.most_common(MOST_NAMED)
        )
        findings.append(ok("other registrars", f"services of other clusters or instances: {named}"))
    if found.alike:
        detail = f"{len(found.alike)} services of others have IDs like this registrar's: {some(found.alike)}"
        findings.append(warn("look-alikes", detail, ALIKE))
    if found.meta_keys:
        findings.append(_meta_keys(found.meta_keys))
    return findings


def _legacy(ids: Sequence[str], identity: Identity) -> Finding:
    detail = f"{len(ids)} of the original program for {identity.cluster!r}: {some(ids)}"
    if identity.covers_cluster:
        return ok("adoption", f"{detail}; taken over in place when wanted, else removed")
    return warn(
        "adoption",
        f"{detail}; taken over in place when wanted, else left",
        "a registrar with an INSTANCE removes none of them: run one without it, or remove them by hand",
    )


def _meta_keys(keys: Counter[str]) -> Finding:
    shared = sorted(keys.keys() & OWN_KEYS)
    others = ", ".join(sorted(keys)[:10]) + (", …" if len(keys) > 10 else "")
    detail = f"services of other programs use the meta keys {others}"
    if not shared:
        return ok("meta keys", detail)
    return warn(
        "meta keys",
        f"{detail}, of which the registrar uses {', '.join(shared)} itself",
        "if Prometheus relabels by these keys, keep its rule on managed_by (deploy/prometheus.yml)",
    )


def judge_catalog(names: Iterable[str], held: Iterable[str], prefixes: tuple[str, ...]) -> list[Finding]:
    """Return a finding if other nodes have services whose names begin with `prefixes`, as this registrar's do."""
    elsewhere = sorted({name for name in names if name.startswith(prefixes)} - set(held))
    if not elsewhere:
        return []
    detail = (
        f"{len(elsewhere)} services with names like this registrar's belong to other nodes: {some(elsewhere)}"
    )
    why = "another registrar's, or of a replaced agent, whose services go with its node"
    return [ok("rest of the catalog", f"{detail}: {why}")]


def some(ids: Sequence[str]) -> str:
    """Return some of these IDs for a line."""
    shown = ", ".join(text[:80] for text in ids[:MOST_NAMED])
    return shown + (", …" if len(ids) > MOST_NAMED else "")
