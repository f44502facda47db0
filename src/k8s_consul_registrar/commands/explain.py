"""The command explain: why an object is a target or is not, condition by condition, and what Consul has of it."""

import argparse
import sys
from collections.abc import Mapping, Sequence

import msgspec

from k8s_consul_registrar.admin.explain import Condition, ExplainedObject, parse_question
from k8s_consul_registrar.admin.target_groups import BadQuery
from k8s_consul_registrar.commands import settings_for_consul
from k8s_consul_registrar.commands.plan import confirmed, listed
from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.model import ObjectKey
from k8s_consul_registrar.runner import EXIT_CHANGES, EXIT_OK, run_loop
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.wiring.registrar import Wiring


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Explain an object or address: exit 0 if it is a target, 3 if it is not."""
    try:
        asked = parse_question(parsed.what)
    except BadQuery as error:
        raise SettingsError([f"explain: {error}"]) from None
    return run_loop(_explained(settings_for_consul("explain", environment), asked, parsed.output))


async def _explained(settings: RegistrarSettings, asked: ObjectKey | str, output: str) -> int:
    async with listed(settings) as parts:
        await confirmed(parts)
        explanations = await Wiring(settings).explainer(parts).explain(asked)
    if output == "json":
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(explanations)) + b"\n")
    elif not explanations:
        print(f"no target has the address {asked}: name the Pod or Node that should")
    else:
        print("\n\n".join(_text(one) for one in explanations))
    return EXIT_OK if explanations and all(one.is_target for one in explanations) else EXIT_CHANGES


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
