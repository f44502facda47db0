"""The command explain: each condition that can be unmet, and a target with its labels."""

import json
from typing import Any

import aiohttp
import pytest

from e2e.test_services import DISCOVER, ONE, POINTS, SLICES, TWO, add_service, allow, slice_body
from support.cluster import NAMESPACE, REGISTRAR_RULES, SCRAPED
from support.daemon import Daemon
from support.lab import SandboxLab, running_lab
from support.waiting import until

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


async def test_service_is_explained_by_its_name_and_by_the_address_of_an_endpoint() -> None:
    """Each endpoint with its labels, or with the Pod that is scraped in its place."""
    async with running_lab() as lab:
        await lab.cluster.add_namespace(NAMESPACE)
        await allow(lab)
        await add_service(lab, path="/stats")
        await lab.cluster.request("POST", SLICES, slice_body("web-a", POINTS))
        code, (found,) = await explained(lab, "service", "shop/web", **DISCOVER)
        assert (code, found["object"]) == (0, "service shop/web")
        assert [one["name"] for one in found["conditions"]] == [
            "watched", "exists", "selected", "annotated", "accepted",
        ]  # fmt: skip
        assert [one["id"] for one in found["services"]] == [ONE, TWO]
        assert found["services"][0]["labels"]["__metrics_path__"] == "/stats"
        code, (by_address,) = await explained(lab, POINTS[1]["ip"], **DISCOVER)
        assert (code, [one["id"] for one in by_address["services"]]) == (0, [TWO])
        await lab.cluster.add_pod(
            annotations={**SCRAPED, "prometheus.io/path": "/stats"}
        )  # at the first address
        code, explanations = await explained(lab, POINTS[0]["ip"], **DISCOVER)
        assert (code, [one["object"] for one in explanations]) == (3, ["service shop/web", "pod shop/web-1"])
        (condition,) = explanations[0]["services"][0]["conditions"]
        assert (condition["name"], condition["is_met"]) == ("owner", False)
        assert condition["detail"].startswith("it gives way to pod shop/web-1")


@pytest.mark.parametrize(
    ("annotations", "environment", "condition"),
    [
        ({"scrape": "yes"}, {}, "annotated"),
        ({"port": "none"}, {}, "accepted"),
        ({}, {"DISCOVER": "pods,nodes"}, "watched"),
        ({}, {"NAMESPACES": "other"}, "watched"),
        ({}, {"SERVICE_LABEL_SELECTOR": "app=no", "INSTANCE": "one"}, "selected"),
    ],
)
async def test_first_unmet_condition_of_a_service_is_named(
    annotations: dict[str, str], environment: dict[str, str], condition: str
) -> None:
    """As for a Pod: nothing after it, and exit code 3."""
    async with running_lab() as lab:
        await lab.cluster.add_namespace(NAMESPACE)
        await allow(lab)
        await add_service(lab, **annotations)
        await lab.cluster.request("POST", SLICES, slice_body("web-a", POINTS))
        code, (found,) = await explained(lab, "service", "shop/web", **{**DISCOVER, **environment})
        assert (code, last_condition(found), found["services"]) == (3, (condition, False), [])


async def test_service_without_endpoints_that_count_is_no_target() -> None:
    """Neither one that has none, nor one that is not there."""
    async with running_lab() as lab:
        await lab.cluster.add_namespace(NAMESPACE)
        await allow(lab)
        await add_service(lab)
        code, (found,) = await explained(lab, "service", "shop/web", **DISCOVER)
        assert (code, last_condition(found)) == (3, ("accepted", False))
        assert found["conditions"][-1]["detail"] == "no endpoint is ready or serving"
        code, (missing,) = await explained(lab, "service", "shop/none", **DISCOVER)
        assert (code, last_condition(missing)) == (3, ("exists", False))


async def _explained_by_page(registrar: Daemon, what: str) -> dict[str, Any]:
    """Return what the page says of an object, once it does not ask to be asked again."""
    url = f"http://127.0.0.1:{await registrar.port('admin_port')}/api/v1/explain"
    answers: list[dict[str, Any]] = []

    async def is_told() -> bool:
        async with aiohttp.ClientSession() as session, session.get(url, params={"what": what}) as answer:
            answers[:] = (await answer.json())["objects"]
        return "ask again" not in str(answers)

    await until(is_told)
    (shown,) = answers
    return shown


async def test_page_of_the_daemon_says_what_the_command_says() -> None:
    """A target in Consul, a rejected Pod and one that is no target, byte for byte."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        await lab.cluster.add_pod("web-2", annotations={**SCRAPED, "prometheus.io/port": "0"})
        await lab.cluster.add_pod("web-3", annotations={})
        async with await lab.registrar() as registrar:
            await registrar.ready()  # everything in Consul was looked at
            assert lab.has(WEB)
            for name in ("web-1", "web-2", "web-3"):
                what = f"pod shop/{name}"
                shown = await _explained_by_page(registrar, what)
                code, (told,) = await explained(lab, *what.split())
                assert shown.pop("is_target") is (code == 0)
                assert shown == told
