"""Logins of the whole registrar: what it does with the token, what it shows of it, and which settings it refuses."""

import json

import pytest

from k8s_consul_registrar.sandbox.consul_release import (
    NEWEST,
    AuthMethod,
    Bearer,
    ConsulOptions,
    ConsulRelease,
)
from support.daemon import Daemon
from support.lab import SandboxLab, each_release, running_lab

BEARER = "eyJhbGciOiJSUzI1NiJ9.bearer-of-the-registrar.c2lnbmF0dXJl"
ROOT = "3f1c6d0e-8f5b-4a52-9d3c-0b7a52a1c9e4"
WEB = "pod--shop--web-1"
LOGIN = {"CONSUL_BACKEND": "catalog", "CONSUL_LOGIN_AUTH_METHOD": "kubernetes"}


def options(release: ConsulRelease = NEWEST, *, is_server: bool = True) -> ConsulOptions:
    """Return a Consul with ACLs and an auth method that knows the registrar."""
    method = AuthMethod({BEARER: Bearer.BOUND})
    return ConsulOptions(release, token=ROOT, auth_methods=(method,), is_server=is_server)


async def registrar(lab: SandboxLab, **environment: str) -> Daemon:
    """Return a registrar that logs in, not started yet; its output must not hold the bearer token."""
    bearer = lab.folder / "bearer"
    bearer.write_text(BEARER)
    settings = {**LOGIN, "CONSUL_LOGIN_BEARER_TOKEN_FILE": str(bearer), **environment}
    daemon = await lab.registrar(**settings)
    daemon.keep_secret(BEARER)
    return daemon


def at_node(lab: SandboxLab) -> set[str]:
    """Return the IDs of the services at the registrar's node."""
    return {service.id for service in lab.consul.catalog.services_of("k8s-lab")}


@each_release()
async def test_registrar_works_with_the_token_of_a_login(release: ConsulRelease) -> None:
    """It registers, logs in again when Consul no longer knows the token, and logs out at its end."""
    async with running_lab(options(release)) as lab:
        await lab.cluster.add_pod()
        async with await registrar(lab) as daemon:
            await daemon.until(lambda: at_node(lab) == {WEB})
            (first,) = lab.consul.tokens.logged_in
            daemon.keep_secret(first)
            lab.consul.tokens.revoke(first)
            await lab.cluster.add_pod("web-2")
            await daemon.until(lambda: len(at_node(lab)) == 2)
            await daemon.until(lambda: len(lab.consul.tokens.logged_in) == 1)
            (second,) = lab.consul.tokens.logged_in
            daemon.keep_secret(second)

            async def is_up() -> bool:
                _, page = await daemon.admin("/api/v1/status")
                assert second not in page
                return bool(json.loads(page)["consul"]["is_up"])

            await daemon.until(is_up)
            assert await daemon.terminate() == 0
            assert len(daemon.said("logged out of Consul")) == 1
        assert lab.consul.tokens.logged_in == ()


async def test_auto_asks_with_the_token_of_a_login() -> None:
    """A server answers, so the services are in the catalog."""
    async with running_lab(options()) as lab:
        await lab.cluster.add_pod()
        async with await registrar(lab, CONSUL_BACKEND="auto") as daemon:
            await daemon.until(lambda: at_node(lab) == {WEB})
            assert daemon.said("CONSUL_BACKEND=auto has chosen")[0]["backend"] == "catalog"


@pytest.mark.parametrize("backend", ["agent", "auto"])
async def test_login_needs_the_catalog(backend: str) -> None:
    """An agent keeps the token of a registration, which ends with the login: exit 2 says so."""
    async with running_lab(options(is_server=False)) as lab:
        async with await registrar(lab, CONSUL_BACKEND=backend) as daemon:
            assert await daemon.ended() == 2
            assert "CONSUL_LOGIN_AUTH_METHOD: needs CONSUL_BACKEND=catalog" in daemon.output
        assert lab.consul.tokens.logged_in == ()


async def test_bearer_file_that_is_missing_ends_the_start() -> None:
    """Exit 2 names the setting."""
    async with running_lab(options()) as lab:
        missing = str(lab.folder / "none")
        async with await registrar(lab, CONSUL_LOGIN_BEARER_TOKEN_FILE=missing) as daemon:
            assert await daemon.ended() == 2
            assert "CONSUL_LOGIN_BEARER_TOKEN_FILE" in daemon.output


async def test_unknown_auth_method_is_an_outage_that_can_be_repaired() -> None:
    """Consul counts as down, with the reason, until the method is created; `check` names the setting."""
    async with running_lab(options()) as lab:
        await lab.cluster.add_pod()
        async with await registrar(lab, CONSUL_LOGIN_AUTH_METHOD="nomad") as daemon:
            line = await daemon.until_said("Consul cannot be used; trying again")
            assert "no login by auth method nomad" in line["problem"]
            assert await daemon.metric("consul_up") == 0
            lab.consul.tokens.add_method(AuthMethod({BEARER: Bearer.BOUND}, "nomad"))
            await daemon.until(lambda: at_node(lab) == {WEB})
        settings = {
            **LOGIN,
            "CONSUL_LOGIN_AUTH_METHOD": "gone",
            "CONSUL_ADDRESS": lab.consul_address,
            "CLUSTER_NAME": "lab",
            "CONSUL_LOGIN_BEARER_TOKEN_FILE": str(lab.folder / "bearer"),
        }
        async with lab.daemon("check", "registrar", **settings) as command:
            assert await command.ended() == 1
            assert "CONSUL_LOGIN_AUTH_METHOD must name an auth method" in command.output
