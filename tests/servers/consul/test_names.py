"""Names that something other than a registrar uses, looked up in the whole catalog."""

from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.errors import ConsulError, ConsulFiltered, ConsulForbidden, ConsulRefused
from k8s_consul_registrar.model import Service
from support.scripted import client_of, serving

Registry = AgentRegistry | CatalogRegistry
Make = Callable[[ConsulClient], Registry]


def is_original(service: Service) -> bool:
    """Return whether a service is one of a registrar's, by a rule of the test."""
    return bool(service.value("cluster"))


MAKE: list[Make] = [
    lambda client: AgentRegistry(client, is_of_a_registrar=is_original),
    lambda client: CatalogRegistry(client, "n", is_of_a_registrar=is_original),
]
both_backends = pytest.mark.parametrize("make", MAKE, ids=["agent", "catalog"])


def _showing(
    *instances: object, seen: list[web.Request] | None = None, is_filtered: bool = False
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.Response:
        if seen is not None:
            seen.append(request)
        headers = {"X-Consul-Results-Filtered-By-ACLs": "true"} if is_filtered else {}
        return web.json_response(list(instances), headers=headers)

    return answer


def _instance(service_id: str, **meta: str) -> dict[str, object]:
    return {"ServiceID": service_id, "ServiceName": "Web", "ServiceMeta": meta or None}


@both_backends
@pytest.mark.parametrize(
    ("instances", "is_taken"),
    [
        ([], False),
        ([_instance("theirs")], True),
        ([_instance("pod--a", cluster="old")], False),
        ([_instance("pod--a", cluster="old"), _instance("theirs", managed_by="terraform")], True),
    ],
)
async def test_name_is_taken_by_an_instance_that_no_registrar_wrote(
    make: Make, instances: list[dict[str, object]], is_taken: bool
) -> None:
    """Consul leaves out those with our mark; the original program's have none and are recognised by their meta."""
    seen: list[web.Request] = []
    async with serving(_showing(*instances, seen=seen)) as url, client_of(url) as client:
        assert await make(client).is_name_taken("a/b c") is is_taken
    (request,) = seen
    assert request.raw_path.startswith("/v1/catalog/service/a%2Fb%20c?")
    assert "consistent" in request.query
    assert "index" not in request.query
    assert request.query["filter"] == 'not ServiceMeta.managed_by == "k8s-consul-registrar"'


@both_backends
async def test_answer_that_acls_filtered_proves_nothing(make: Make) -> None:
    """Unless it shows a foreign instance all the same."""
    async with serving(_showing(is_filtered=True)) as url, client_of(url) as client:
        with pytest.raises(ConsulFiltered):
            await make(client).is_name_taken("web")
    async with serving(_showing(_instance("x"), is_filtered=True)) as url, client_of(url) as client:
        assert await make(client).is_name_taken("web")


@both_backends
@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (403, "Permission denied", ConsulForbidden),
        (500, "No cluster leader", ConsulError),
        (200, "{}", ConsulRefused),
        (200, '[{"ServiceID":""}]', ConsulRefused),
        (200, '[{"ServiceID":5}]', ConsulRefused),
        (200, '[{"ServiceMeta":{}}]', ConsulRefused),
        (200, '[{"ServiceID":"x","ServiceMeta":[1]}]', ConsulRefused),
        (200, '[{"ServiceID":"x"', ConsulRefused),
        (200, '[{"ServiceID":"x","a":' + "[" * 10**6 + "]" * 10**6 + "}]", ConsulRefused),
        (200, "<html>", ConsulRefused),
    ],
)
async def test_answer_that_makes_no_sense_is_an_error(
    make: Make, status: int, body: str, error: type[ConsulError]
) -> None:
    """No answer is never a free name."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    async with serving(answer) as url, client_of(url) as client:
        with pytest.raises(error):
            await make(client).is_name_taken("web")
