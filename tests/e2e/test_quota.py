"""MAX_TARGETS_PER_NAMESPACE and QUOTA_REMOVE as the commands show them."""

from e2e.test_explain import explained
from e2e.test_once import run
from support.lab import running_lab

FULL = {"MAX_TARGETS_PER_NAMESPACE": "1"}
REMOVES = {**FULL, "QUOTA_REMOVE": "true"}


async def test_plan_explain_and_sync_agree_about_a_namespace_at_its_limit() -> None:
    """The same Pod is rejected by all of them."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        await lab.cluster.add_pod("web-2", ips=["198.51.100.11"])
        code, output = await run(lab, "plan", **FULL)
        assert (code, "1 to register" in output, "1 rejected" in output) == (3, True, True), output
        names = ("web-1", "web-2")
        (rejected,) = [one for one in names if f"! pod shop/{one}  rejected: namespace_full" in output]
        code, (found,) = await explained(lab, "pod", f"shop/{rejected}", **FULL)
        (owner,) = found["services"][0]["conditions"]
        assert (code, "namespace_full" in owner["detail"]) == (3, True), found
        code, output = await run(lab, "sync", **FULL)
        assert (code, "registered 1" in output) == (0, True), output
        assert f"pod--shop--{rejected}" not in lab.services


async def test_services_beyond_the_limit_are_held_and_shown_before_they_go() -> None:
    """Plan, sync and explain say so; only an operator who skips every wait removes at once."""
    async with running_lab() as lab:
        for number in range(3):
            await lab.cluster.add_pod(f"web-{number}", ips=[f"198.51.100.{number + 1}"])
        assert (await run(lab, "sync"))[0] == 0
        code, output = await run(lab, "sync", **REMOVES)
        assert (code, len(lab.services)) == (3, 3), output
        code, output = await run(lab, "plan", **REMOVES)
        held = [
            line.split()[1] for line in output.splitlines() if "held by the brake: over MAX_TARGETS" in line
        ]
        assert (code, len(held), "2 held" in output) == (3, 2, True), output
        code, (found,) = await explained(lab, "pod", held[0].replace("pod--shop--", "shop/"), **REMOVES)
        condition = found["services"][0]["conditions"][-1]
        assert (code, condition["name"], "the brake holds" in condition["detail"]) == (0, "quota", True)
        allowed = {**REMOVES, "ALLOW_MASS_DEREGISTER": "true"}
        code, output = await run(lab, "plan", **allowed)
        assert (code, "2 to deregister" in output, "1 unchanged" in output) == (3, True, True), output
        code, output = await run(lab, "sync", **allowed)
        assert (code, "deregistered 2" in output) == (0, True), output
        assert lab.services.keys().isdisjoint(held)
