"""The registrar as a process between an API server and a real Consul: endpoints of Services."""

from typing import Any

import pytest

from e2e.test_services import DISCOVER, ONE, POINTS, SLICES, TWO, add_service, overlay_rules, slice_body
from support.cluster import NAMESPACE, REGISTRAR_RULES
from support.lab import running_lab_with
from support.real_servers import REAL, RealConsul, real_consul

pytestmark = REAL


async def instances(consul: RealConsul, name: str) -> dict[str, dict[str, Any]]:
    """Return the instances of a service in the catalog by ID."""
    _, found = await consul.request("GET", f"/v1/catalog/service/{name}")
    return {one["ServiceID"]: one for one in found}


@pytest.mark.parametrize("backend", ["agent", "catalog"])
async def test_endpoints_are_instances_of_one_service_name(backend: str) -> None:
    """Consul has each endpoint under the Service's name, and loses the one that leaves its slice."""
    async with real_consul() as consul, running_lab_with(consul.address) as lab:
        await lab.cluster.add_namespace(NAMESPACE)
        lab.token_file.write_text(await lab.cluster.token([*REGISTRAR_RULES, *overlay_rules()]))
        await add_service(lab, path="/stats")
        await lab.cluster.request("POST", SLICES, slice_body("web-a", POINTS))
        async with await lab.registrar(CONSUL_BACKEND=backend, SYNC_PERIOD="600", **DISCOVER) as daemon:
            await daemon.ready()
            found = await instances(consul, "svc--shop--web")
            assert found.keys() == {ONE, TWO}
            meta = found[ONE]["ServiceMeta"]
            assert (meta["kind"], meta["service"], meta["metrics_path"]) == ("endpoint", "web", "/stats")
            assert (found[ONE]["ServiceAddress"], found[ONE]["ServicePort"]) == ("198.51.100.10", 9102)
            await lab.cluster.request("PUT", f"{SLICES}/web-a", slice_body("web-a", POINTS[1:]))

            async def is_gone() -> bool:
                return (await instances(consul, "svc--shop--web")).keys() == {TWO}

            await daemon.until(is_gone)
