"""Former places are cleared once everything is at the new one, and never the other way round."""

import asyncio
from collections.abc import AsyncIterator

from builders import make_pod
from fake_consul import QUICK
from k8s_consul_registrar.errors import ConsulBusy, ConsulError, ConsulForbidden, ConsulUnreachable
from k8s_consul_registrar.model import Service, Written
from k8s_consul_registrar.registrar.relocation import leave
from passes_lab import Lab


class Place:
    """A former place that notes when it is cleared, after it failed as a test says."""

    def __init__(self, name: str = "old", *problems: ConsulError) -> None:
        self.name = name
        self.problems = list(problems)
        self.clearings = 0

    async def services(self) -> AsyncIterator[Service]:
        """Yield nothing: what goes is the place's own to know."""
        for one in list[Service]():
            yield one

    async def clear(self) -> Written:
        """Clear it, or fail."""
        self.clearings += 1
        if self.problems:
            raise self.problems.pop(0)
        return Written(1)


async def a_while() -> None:
    """Give whoever waits for something more than enough turns."""
    await asyncio.sleep(10 * QUICK.retry_first)


async def test_the_old_place_keeps_everything_until_all_is_at_the_new_one() -> None:
    """The first comparison, every write that was refused, and the lead are waited for."""
    lab, place = Lab(checks_versions=True), Place()
    leads = False
    lab.cluster.put_list([make_pod(name) for name in "abc"])
    lab.consul.refused = {"pod--shop--b"}
    leaving = asyncio.create_task(leave([place], lab.passes, lambda: leads, QUICK))
    await a_while()
    assert place.clearings == 0, "before anything is written"
    await lab.passes.full()
    leads = True
    await a_while()
    assert place.clearings == 0, "while one is refused"
    leads = False
    lab.consul.refused = set()
    await lab.passes.partial(retries_refused=True)
    await a_while()
    assert place.clearings == 0, "while another leads"
    leads = True
    async with asyncio.timeout(5):
        await leaving
    assert place.clearings == 1


async def test_a_place_that_cannot_be_cleared_holds_up_no_other() -> None:
    """While Consul cannot be used it is tried again; one that is refused is left as it is."""
    lab = Lab(checks_versions=True)
    lab.cluster.put_list([make_pod("a")])
    await lab.passes.full()
    slow = Place("slow", ConsulUnreachable("gone"), ConsulBusy("busy"))
    denied, last = Place("denied", ConsulForbidden("no")), Place("last")
    async with asyncio.timeout(5):
        await leave([slow, denied, last], lab.passes, lambda: True, QUICK)
    assert [one.clearings for one in (slow, denied, last)] == [3, 1, 1]
