"""The command explain: why an object is a target or is not, condition by condition, and what Consul has of it."""

import argparse
import ipaddress
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from k8s_consul_registrar.admin.target_groups import GroupEncoder
from k8s_consul_registrar.admin.view import TargetRow, TargetState
from k8s_consul_registrar.commands import settings_for_consul
from k8s_consul_registrar.commands.plan import action_for, confirmed, differences, listed
from k8s_consul_registrar.errors import ClusterError, SettingsError
from k8s_consul_registrar.model import Kind, ObjectKey, Pod
from k8s_consul_registrar.registrar.decide import Action, Conflict, InSync, Register, Reject, Update
from k8s_consul_registrar.runner import EXIT_CHANGES, EXIT_OK, run_loop
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.targets.annotations import asks_for_scrapes
from k8s_consul_registrar.targets.scrape_config import SCRAPED_PHASES
from k8s_consul_registrar.wiring.registrar import RegistrarParts


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


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Explain an object or address: exit 0 if it is a target, 3 if it is not."""
    key, address = _asked(parsed.what)
    return run_loop(_explained(settings_for_consul("explain", environment), key, address, parsed.output))


def _asked(words: Sequence[str]) -> tuple[ObjectKey | None, str]:
    """Return the object or the address of the command line; raises a `SettingsError`."""
    match words:
        case ["node", name] if name and "/" not in name:
            return ObjectKey(Kind.NODE, "", name), ""
        case ["pod", name] if name.count("/") == 1 and all(name.split("/")):
            return ObjectKey(Kind.POD, *name.split("/")), ""
        case [address]:
            try:
                return None, str(ipaddress.ip_address(address.strip("[]")))
            except ValueError:
                pass
    usage = "explain pod NAMESPACE/NAME, explain node NAME, or explain ADDRESS"
    raise SettingsError([f"explain: {' '.join(words)!r} is none of these: {usage}"])


async def _explained(settings: RegistrarSettings, key: ObjectKey | None, address: str, output: str) -> int:
    async with listed(settings) as parts:
        await confirmed(parts)
        keys = _at(parts, address) if key is None else [key]
        explanations = [await _explain(parts, settings, one) for one in keys]
    if output == "json":
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(explanations)) + b"\n")
    elif not explanations:
        print(f"no target has the address {address}: name the Pod or Node that should")
    else:
        print("\n\n".join(_text(one) for one in explanations))
    return EXIT_OK if explanations and all(one.is_target for one in explanations) else EXIT_CHANGES


def _at(parts: RegistrarParts, address: str) -> list[ObjectKey]:
    """Return the objects that have a target at an address, or a Node whose kubelet is there."""
    claims = parts.core.desired.claims
    found = {
        target.key
        for targets in claims.values()
        for target in targets
        if address in (target.address, target.id.partition("node--")[2])
    }
    return sorted(found)


async def _explain(parts: RegistrarParts, settings: RegistrarSettings, key: ObjectKey) -> ExplainedObject:
    """Go through the conditions in order; the first one that is not met ends it."""
    conditions: list[Condition] = []
    async for condition in _conditions(parts, settings, key):
        conditions.append(condition)
        if not condition.is_met:
            return ExplainedObject(str(key), tuple(conditions))
    targets = parts.core.desired.store.get(key)
    ids = [target.id for target in targets] if isinstance(targets, tuple) else []
    return ExplainedObject(
        str(key), tuple(conditions), tuple([await _service(parts, settings, key, one) for one in ids])
    )


async def _conditions(
    parts: RegistrarParts, settings: RegistrarSettings, key: ObjectKey
) -> AsyncIterator[Condition]:
    desired, selection = parts.core.desired, settings.selection
    source = desired.store.source_of(key)
    if source is None:
        yield Condition("watched", "DISCOVER or NAMESPACES leaves it out", is_met=False)
        return
    problem = desired.store.status(source).problem
    yield Condition("watched", problem or f"as {source}", is_met=not problem)
    try:
        item = await parts.cluster.read_object(key)
        is_selected = item is not None and await parts.cluster.is_selected(key)
    except ClusterError as error:
        yield Condition("exists", str(error), is_met=False)
        return
    yield Condition(
        "exists", "yes" if item is not None else "the API server has no such object", is_met=item is not None
    )
    selector = selection.selectors.get(key.kind, "")
    matches = f"{selector!r} {'matches' if is_selected else 'does not match'}"
    yield Condition("selected", matches if selector else "no selector", is_met=is_selected)
    if isinstance(item, Pod):
        scrape = item.annotations.get(f"{selection.annotation_prefix}scrape")
        said = "is absent" if scrape is None else f"is {scrape[:40]!r}"
        is_asking = asks_for_scrapes(item.annotations, selection.annotation_prefix)
        ask = "" if is_asking else '; it must be the text "true"'
        yield Condition("annotated", f"{selection.annotation_prefix}scrape {said}{ask}", is_met=is_asking)
        is_running = item.phase in SCRAPED_PHASES
        ask = "" if is_running else f"; it must be {' or '.join(sorted(SCRAPED_PHASES))}"
        yield Condition("phase", f"{item.phase or 'none yet'}{ask}", is_met=is_running)
    rejection, targets = desired.rejections.get(key), desired.store.get(key)
    if rejection is not None:
        yield Condition("accepted", f"rejected: {rejection.reason}: {rejection.detail}", is_met=False)
    elif isinstance(targets, tuple):
        yield Condition("accepted", f"{len(targets)} target{'s' if len(targets) != 1 else ''}")
    else:
        yield Condition("accepted", "the list does not have it yet; ask again", is_met=False)


async def _service(
    parts: RegistrarParts, settings: RegistrarSettings, key: ObjectKey, service_id: str
) -> ServiceState:
    """Decide one service ID as a sync would, and compare the service with what Consul has."""
    action = await action_for(parts, service_id)
    if not isinstance(action, Register | Update | InSync) or action.entry.target.key != key:
        return ServiceState(service_id, (Condition("owner", _closed(action, key), is_met=False),))
    after = action.entry.service(parts.core.rules.identity)
    before = [service async for service in parts.core.registry.lookup([service_id])]
    if not before:
        state = "not there yet; the registrar writes it"
    else:
        changed = differences(before[0], after)
        state = f"differs; the registrar writes {changed}" if changed else "as it should be"
    row = TargetRow(after, key, TargetState.REGISTERED if before else TargetState.PENDING)
    group = bytearray()
    GroupEncoder(settings.naming.meta_keys).append(row, group)
    labels: dict[str, str] = msgspec.json.decode(bytes(group[:-1]))["labels"]
    conditions = (
        Condition("name", after.name),
        Condition("owner", "this registrar"),
        Condition("in Consul", state),
    )
    return ServiceState(service_id, conditions, f"{after.address}:{after.port}", labels)


def _closed(action: Action, key: ObjectKey) -> str:
    """Say why an object does not get a service ID that it asks for."""
    losers = getattr(action, "losers", ())
    match action:
        case Conflict():
            return f"conflict: {action.holder} holds the service ID"
        case Reject():
            return f"rejected: {action.rejection.reason}: {action.rejection.detail}"
    for loser in losers:
        if loser.key == key:
            return f"rejected: {loser.reason}: {loser.detail}"
    return "it gives way to another object with the same address and port"


def _text(explanation: ExplainedObject) -> str:
    lines = [explanation.object, *_lines(explanation.conditions)]
    for service in explanation.services:
        lines += ["", f"  {service.id}  {service.address}".rstrip(), *_lines(service.conditions)]
        lines += [f"      {name}={value!r}" for name, value in sorted(service.labels.items())]
    return "\n".join([*lines, "", "it is a target" if explanation.is_target else "it is not a target"])


def _lines(conditions: Sequence[Condition]) -> list[str]:
    return [
        f"  {'ok' if condition.is_met else 'NO'}  {condition.name:<10} {condition.detail}"
        for condition in conditions
    ]
