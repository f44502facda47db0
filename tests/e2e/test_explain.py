"""The command explain: each condition that can be unmet, and a target with its labels."""

import json
from typing import Any

import pytest

from support.cluster import REGISTRAR_RULES, SCRAPED
from support.lab import SandboxLab, running_lab

WEB = "pod--shop--web-1"


async def explained(lab: SandboxLab, *what: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """Run the command and return its exit code and the explanations."""
    if not lab.token_file.exists():
        lab.token_file.write_text(await lab.cluster.token(REGISTRAR_RULES))
    settings = {"CLUSTER_NAME": "lab", "CONSUL_ADDRESS": lab.consul_door.address, "LOG_LEVEL": "error"}
    async with lab.daemon("explain", *what, "--output", "json", **settings, **environment) as command:
        code = await command.ended()
    return code, json.loads(command.output)


def last_condition(explanation: dict[str, Any]) -> tuple[str, bool]:
    """Return the name of the last condition, and whether it is met."""
    condition = explanation["conditions"][-1]
    return condition["name"], condition["is_met"]


async def test_target_is_explained_to_its_labels() -> None:
    """Before and after it is in Consul, by its name and by its address."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        code, (found,) = await explained(lab, "pod", "shop/web-1")
        assert (code, last_condition(found)) == (0, ("accepted", True))
        (service,) = found["services"]
        assert service["id"] == WEB
        assert [condition["name"] for condition in service["conditions"]] == ["name", "owner", "in Consul"]
        assert service["conditions"][-1]["detail"].startswith("not there yet")
        assert service["labels"]["__meta_consul_service_metadata_cluster"] == "lab"
        assert lab.writes == []
        address = service["address"].rpartition(":")[0]
        code, (by_address,) = await explained(lab, address)
        assert (code, by_address["object"]) == (0, found["object"])


@pytest.mark.parametrize(
    ("annotations", "environment", "condition"),
    [
        ({}, {}, "annotated"),
        ({"prometheus.io/scrape": "True"}, {}, "annotated"),
        ({**SCRAPED, "prometheus.io/port": "0"}, {}, "accepted"),
        (SCRAPED, {"NAMESPACES": "other"}, "watched"),
        (SCRAPED, {"DISCOVER": "nodes"}, "watched"),
        (SCRAPED, {"POD_LABEL_SELECTOR": "app=no", "INSTANCE": "one"}, "selected"),
    ],
)
async def test_first_unmet_condition_is_named(
    annotations: dict[str, str], environment: dict[str, str], condition: str
) -> None:
    """And nothing after it; the exit code is 3."""
    async with running_lab() as lab:
        await lab.cluster.add_pod(annotations=annotations)
        code, (found,) = await explained(lab, "pod", "shop/web-1", **environment)
        assert (code, last_condition(found), found["services"]) == (3, (condition, False), [])


async def test_what_others_hold_or_nothing_has_is_no_target() -> None:
    """A conflict names the holder; a missing object and an unknown address say so."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        await lab.seed(WEB, {"cluster": "other"})
        code, (found,) = await explained(lab, "pod", "shop/web-1")
        (condition,) = found["services"][0]["conditions"]
        assert (code, condition["name"], condition["is_met"]) == (3, "owner", False)
        assert "conflict" in condition["detail"]
        code, (missing,) = await explained(lab, "pod", "shop/none")
        assert (code, last_condition(missing)) == (3, ("exists", False))
        code, nothing = await explained(lab, "203.0.113.200")
        assert (code, nothing) == (3, [])
