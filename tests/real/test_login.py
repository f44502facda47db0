"""A login at a real Consul by an auth method of the type `jwt`, through the whole life of a registrar."""

from pathlib import Path
from typing import Any

import pytest

from support.auth_method import Signer, set_up_method
from support.lab import running_lab_with
from support.real_servers import REAL, RealConsul, real_consul

pytestmark = [REAL, pytest.mark.long]


async def tokens_of_logins(consul: RealConsul) -> list[dict[str, Any]]:
    """Return the tokens that logins made."""
    _, tokens = await consul.request("GET", "/v1/acl/tokens")
    return [one for one in tokens if one.get("AuthMethod")]


async def names(consul: RealConsul) -> set[str]:
    """Return the IDs at the registrar's node."""
    _, node = await consul.request("GET", "/v1/catalog/node/k8s-lab")
    return set((node or {}).get("Services") or {})


async def test_registrar_logs_in_again_and_out(tmp_path: Path) -> None:
    """A deleted token is replaced; after SIGTERM no token of a login is left."""
    signer = Signer()
    bearer = tmp_path / "bearer"
    async with real_consul(acl=True) as consul, running_lab_with(consul.address) as lab:
        await set_up_method(consul, signer)
        bearer.write_text(signer.token(3600, team="metrics"))
        await lab.cluster.add_pod()
        settings = {
            "CONSUL_BACKEND": "catalog",
            "CONSUL_LOGIN_AUTH_METHOD": "jwt",
            "CONSUL_LOGIN_BEARER_TOKEN_FILE": str(bearer),
            "CONSUL_LOGIN_META": "component=registrar",
        }
        async with await lab.registrar(**settings) as daemon:

            async def has(*expected: str) -> bool:
                return await names(consul) == set(expected)

            await daemon.until(lambda: has("pod--shop--web-1"))
            (token,) = await tokens_of_logins(consul)
            assert 'token created via login: {"component":"registrar"}' in token["Description"]
            await consul.request("DELETE", f"/v1/acl/token/{token['AccessorID']}")
            await lab.cluster.add_pod("web-2")
            await daemon.until(lambda: has("pod--shop--web-1", "pod--shop--web-2"))
            (second,) = await tokens_of_logins(consul)
            assert second["AccessorID"] != token["AccessorID"]
            assert await daemon.terminate() == 0
            assert daemon.said("logged out of Consul")
        assert await tokens_of_logins(consul) == []
