"""Why an object is a target or is not, condition by condition, and what Consul has of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import msgspec
from aiohttp import web
from msgspec.structs import replace

from k8s_consul_registrar.admin.status_api import answer, api_route, check
from k8s_consul_registrar.admin.target_groups import BadQuery, GroupEncoder
from k8s_consul_registrar.admin.view import TargetRow, TargetState
from k8s_consul_registrar.errors import ClusterError, OperationalError
from k8s_consul_registrar.model import (
    Kind,
    KubeService,
    ObjectKey,
    Pod,
    Selector,
    Service,
    ServiceWithSlices,
    Target,
)
from k8s_consul_registrar.registrar.decide import (
    Action,
    CheckName,
    Conflict,
    Deregister,
    InSync,
    LookUp,
    Nothing,
    Register,
    Reject,
    Update,
    Withheld,
    decide,
)
from k8s_consul_registrar.registrar.interfaces import ClusterReader
from k8s_consul_registrar.registrar.reconciler import Core
from k8s_consul_registrar.targets.annotations import asks_for_scrapes
from k8s_consul_registrar.targets.scrape_config import SCRAPED_PHASES, parse_ip, socket_address, url_host

USAGE = "pod NAMESPACE/NAME, node NAME, service NAMESPACE/NAME, or ADDRESS"
# Endpoints of one Service that are compared with Consul, each by a request.
MOST_ENDPOINTS = 20
# For the page: objects of one answer, seconds that it may take, requests that wait, and characters of a question.
MOST_OBJECTS = 20
ANSWER = 15.0
MOST_WAITING = 8
MOST_WORDS = 400


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition for a target, and whether an object meets it."""

    name: str
    detail: str
    is_met: bool = True


@dataclass(frozen=True, slots=True)
class ServiceState:
    """A service that an object asks for; `labels` are those that Prometheus discovers, empty if it gets none."""

    id: str
    conditions: tuple[Condition, ...]
    address: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExplainedObject:
    """The conditions of one object in order, up to the first that is not met, and its services."""

    object: str
    conditions: tuple[Condition, ...]
    services: tuple[ServiceState, ...] = ()

    @property
    def is_target(self) -> bool:
        """True if every condition is met."""
        conditions = (
            *self.conditions,
            *(condition for service in self.services for condition in service.conditions),
        )
        return bool(self.services) and all(condition.is_met for condition in conditions)


def parse_question(words: Sequence[str]) -> ObjectKey | str:
    """Return the object or the address that is asked about; raises BadQuery."""
    match words:
        case ["node", name] if name and "/" not in name:
            return ObjectKey(Kind.NODE, "", name)
        case ["pod" | "service" as kind, name] if name.count("/") == 1 and all(name.split("/")):
            return ObjectKey(Kind.POD if kind == "pod" else Kind.ENDPOINT, *name.split("/"))
        case [text] if (address := parse_ip(text.strip("[]"))) is not None:
            return str(address)
    raise BadQuery(f"{' '.join(words)!r} is none of these: {USAGE}")


@dataclass(frozen=True, slots=True)
class Explainer:
    """Explains objects as a registrar knows them; `selectors` are by kind.

    It reads the object, and what Consul has of its services, and changes nothing.
    """

    core: Core
    cluster: ClusterReader
    encoder: GroupEncoder
    annotation_prefix: str
    selectors: Mapping[Kind, Selector]

    async def explain(self, asked: ObjectKey | str, most: int | None = None) -> list[ExplainedObject]:
        """Explain an object, or the objects with a target at an address; raises a `ConsulError`."""
        if isinstance(asked, ObjectKey):
            return [await self._explain(asked)]
        join = self.core.desired.join
        targets = chain(self.core.desired.claims.values(), join.offers.values() if join else ())
        keys = {target.key for some in targets for target in some if _is_at(target, asked)}
        return [await self._explain(key, asked) for key in sorted(keys)[:most]]

    async def _explain(self, key: ObjectKey, address: str = "") -> ExplainedObject:
        """Go through the conditions in order; the first one that is not met ends it.

        Of a Service, only the endpoints at an address are explained if one is given.
        """
        name = f"service {key.namespace}/{key.name}" if key.kind is Kind.ENDPOINT else str(key)
        targets = self._targets(key)
        conditions: list[Condition] = []
        async for condition in self._conditions(key, len(targets)):
            conditions.append(condition)
            if not condition.is_met:
                return ExplainedObject(name, tuple(conditions))
        if key.kind is Kind.ENDPOINT:
            targets = [one for one in targets if not address or _is_at(one, address)][:MOST_ENDPOINTS]
        return ExplainedObject(
            name, tuple(conditions), tuple([await self._service(key, one.id) for one in targets])
        )

    def _targets(self, key: ObjectKey) -> Sequence[Target]:
        """Return the targets of an object, those of a Service's endpoints that gave way included.

        Endpoints that could only be scraped as Pods, and are none that are, are rejected.
        """
        desired = self.core.desired
        if (join := desired.join) is not None and key.kind is Kind.ENDPOINT:
            found = {one.id: one for some in join.offers.values() for one in some if one.key == key}
            return [
                found[service_id]
                for service_id in sorted(found)
                if found[service_id].address or join.winner_over(service_id, key) is not None
            ]
        targets = desired.store.get(key)
        return targets if isinstance(targets, tuple) else ()

    async def _conditions(self, key: ObjectKey, targets: int) -> AsyncIterator[Condition]:
        desired = self.core.desired
        source = desired.store.source_of(key)
        if source is None:
            yield Condition("watched", "DISCOVER or NAMESPACES leaves it out", is_met=False)
            return
        problem = " ".join(desired.store.status(one).problem for one in source.needed).strip()
        yield Condition("watched", problem or f"as {source}", is_met=not problem)
        try:
            item = await self.cluster.read_object(key)
            is_selected = item is not None and await self.cluster.is_selected(key)
        except ClusterError as error:
            yield Condition("exists", str(error), is_met=False)
            return
        yield Condition(
            "exists",
            "yes" if item is not None else "the API server has no such object",
            is_met=item is not None,
        )
        listed = Kind.SERVICE if key.kind is Kind.ENDPOINT else key.kind
        selector = ", ".join(filter(None, self.selectors.get(listed, ())))
        matches = f"{selector!r} {'matches' if is_selected else 'does not match'}"
        yield Condition("selected", matches if selector else "no selector", is_met=is_selected)
        if isinstance(item, ServiceWithSlices) and isinstance(item.service, KubeService):
            yield self._is_annotated(item.service.annotations)
        if isinstance(item, Pod):
            yield self._is_annotated(item.annotations)
            is_running = item.phase in SCRAPED_PHASES
            ask = "" if is_running else f"; it must be {' or '.join(sorted(SCRAPED_PHASES))}"
            yield Condition("phase", f"{item.phase or 'none yet'}{ask}", is_met=is_running)
        rejection = desired.rejections.get(key)
        why = "" if rejection is None else f"rejected: {rejection.reason}: {rejection.detail}"
        if targets:
            # Some endpoints of a Service can be rejected, and others not.
            rest = f"; others are {why}" if why else ""
            yield Condition("accepted", f"{targets} target{'s' if targets != 1 else ''}{rest}")
        elif why:
            yield Condition("accepted", why, is_met=False)
        elif key.kind is Kind.ENDPOINT and desired.store.get(replace(key, kind=Kind.SERVICE)) is not None:
            yield Condition("accepted", "no endpoint is ready or serving", is_met=False)
        else:
            yield Condition("accepted", "the list does not have it yet; ask again", is_met=False)

    def _is_annotated(self, annotations: Mapping[str, str]) -> Condition:
        scrape = annotations.get(f"{self.annotation_prefix}scrape")
        said = "is absent" if scrape is None else f"is {scrape[:40]!r}"
        is_asking = asks_for_scrapes(annotations, self.annotation_prefix)
        ask = "" if is_asking else '; it must be the text "true"'
        return Condition("annotated", f"{self.annotation_prefix}scrape {said}{ask}", is_met=is_asking)

    async def _service(self, key: ObjectKey, service_id: str) -> ServiceState:
        """Decide one service ID as a sync would, and compare the service with what Consul has."""
        join = self.core.desired.join
        if join is not None and (winner := join.winner_over(service_id, key)) is not None:
            detail = f"it gives way to {winner}, which is scraped at the same address, port and path"
            return ServiceState(service_id, (Condition("owner", detail, is_met=False),))
        action = await action_for(self.core, service_id)
        does = "writes"
        if isinstance(action, Withheld):
            action, does = action.write, f"does not write, as POLICY is {self.core.rules.policy},"
        if not isinstance(action, (Register, Update, InSync)) or action.entry.target.key != key:
            return ServiceState(service_id, (Condition("owner", _closed(action, key), is_met=False),))
        after = action.entry.service(self.core.rules.identity)
        before = [service async for service in self.core.registry.lookup([service_id])]
        if not before:
            state = f"not there yet; the registrar {does} it"
        else:
            changed = differences(before[0], after)
            state = f"differs; the registrar {does} {changed}" if changed else "as it should be"
        row = TargetRow(after, key, TargetState.REGISTERED if before else TargetState.PENDING)
        conditions = (
            Condition("name", after.name),
            Condition("owner", "this registrar"),
            Condition("in Consul", state),
            *self._over_quota(service_id),
        )
        return ServiceState(
            service_id, conditions, socket_address(after.address, after.port), self.encoder.labels(row)
        )

    def _over_quota(self, service_id: str) -> tuple[Condition, ...]:
        quota = self.core.quota
        is_over = quota is not None and service_id in quota.over
        return (
            (Condition("quota", "over MAX_TARGETS_PER_NAMESPACE; the brake holds its removal"),)
            if is_over
            else ()
        )


def _is_at(target: Target, address: str) -> bool:
    """Return True for a target at an address, or of a Node that is known by it or whose kubelet is there."""
    if target.key.kind is not Kind.NODE or target.address == address:
        return target.address == address
    _, _, place = dict(target.meta)["metrics_path"].partition("/nodes/")
    return target.id.endswith(f"node--{address}") or place.startswith(f"{url_host(address)}:")


async def action_for(core: Core, service_id: str) -> Action:
    """Return the decision about one service ID, with its name looked up if that is needed."""
    record = core.observed.get(service_id)
    is_contested = core.contests.is_contested(service_id, time.monotonic())
    asked = core.desired.ask(service_id, record, is_contested=is_contested)
    action = decide(asked, record, core.rules)
    if isinstance(action, CheckName):
        await core.names.check(action.name)
        action = decide(asked, record, core.rules)
    return action if core.quota is None else core.quota.apply(action, asked, record, core.rules)


def _closed(action: Action, key: ObjectKey) -> str:
    """Say why an object does not get a service ID that it asks for."""
    losers = getattr(action, "losers", ())
    match action:
        case Conflict():
            return f"conflict: {action.holder} holds the service ID"
        case Reject():
            return f"rejected: {action.rejection.reason}: {action.rejection.detail}"
        case Deregister():
            return "over MAX_TARGETS_PER_NAMESPACE; the registrar removes it"
        case LookUp() | CheckName() | Nothing():
            return "the registrar has to look into Consul first; ask again"
    for loser in losers:
        if loser.key == key:
            return f"rejected: {loser.reason}: {loser.detail}"
    return "it gives way to another object with the same address and port"


def differences(before: Service, after: Service) -> str:
    """Return the fields that an update changes, with their old and new values; empty if there are none."""
    old = {"name": before.name, "address": before.address, "port": str(before.port), **dict(before.meta)}
    new = {"name": after.name, "address": after.address, "port": str(after.port), **dict(after.meta)}
    old["tags"], new["tags"] = ",".join(before.tags), ",".join(after.tags)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return ", ".join(f"{key}: {old.get(key, '')!r} -> {new.get(key, '')!r}" for key in changed)


def explain_route(explainer: Explainer) -> web.RouteDef:
    """Return `/api/v1/explain`: one answer at a time, since each one reads the API server and Consul."""
    turn = asyncio.Lock()
    waiting = 0

    async def explain(request: web.Request) -> web.Response:
        nonlocal waiting
        check(request, "what")
        text = request.query.get("what", "")
        asked = parse_question(text[:MOST_WORDS].split())
        if waiting >= MOST_WAITING:
            return answer({"error": "others are asking; ask again"}, status=429)
        waiting += 1
        try:
            async with asyncio.timeout(ANSWER), turn:
                found = await explainer.explain(asked, MOST_OBJECTS)
        except (OperationalError, TimeoutError) as error:
            return answer({"error": str(error) or f"no answer in {ANSWER:g} s"}, status=503)
        finally:
            waiting -= 1
        objects = [{**msgspec.to_builtins(one), "is_target": one.is_target} for one in found]
        return answer({"what": text, "objects": objects})

    return api_route(explain)
