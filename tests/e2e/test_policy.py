"""POLICY as the daemon and the commands heed it."""

import pytest

from e2e.test_http_sd import served
from e2e.test_once import WEB, run
from support.lab import running_lab


@pytest.mark.parametrize("backend", ["agent", "catalog"])
async def test_observe_sends_consul_no_write(backend: str) -> None:
    """Neither services nor a node or its meta, and nothing at earlier places; targets are served all the same."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        async with await lab.registrar(
            CONSUL_BACKEND="agent" if backend == "catalog" else "catalog"
        ) as daemon:
            await daemon.until(lambda: bool(lab.consul.writes))
            await daemon.ready()
        await lab.seed_pod("gone")
        lab.consul.writes.clear()
        environment = {"POLICY": "observe", "CONSUL_BACKEND": backend, "HTTP_SD_PORT": "0"}
        async with await lab.registrar(**environment) as daemon:
            await daemon.ready()
            assert set(await served(daemon)) == {WEB}
            await daemon.measures('withheld_writes{verb="register"}', 1)
            await lab.cluster.add_pod("web-2")
            await daemon.measures('withheld_writes{verb="register"}', 2)
            await daemon.passes(2)
        assert [write.path for write in lab.consul.writes] == []


async def test_commands_under_a_policy() -> None:
    """Sync obeys it and says what is due, plan shows that, and purge does not run."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        code, output = await run(lab, "sync", POLICY="observe")
        assert (code, "withheld by POLICY=observe 1" in output, lab.has()) == (3, True, True), output
        code, output = await run(lab, "plan", POLICY="observe")
        assert (code, f"! {WEB}  register: withheld, as POLICY is observe" in output) == (3, True), output
        assert (await run(lab, "sync", POLICY="upsert-only"))[0] == 0
        await lab.cluster.delete_pod()
        code, output = await run(lab, "sync", POLICY="upsert-only")
        assert (code, lab.has(WEB)) == (3, True), output
        for policy in ("upsert-only", "observe"):
            code, output = await run(lab, "purge", "--yes", POLICY=policy)
            assert (code, lab.has(WEB)) == (2, True), output
            assert f"POLICY={policy} allows no removals" in output
