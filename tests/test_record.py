"""The registry of our own."""

import asyncio
from collections.abc import Iterator

from builders import our_pod_service
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.registrar.record import SLICE, OwnRecord


async def test_others_get_their_turn_while_much_is_taken_in() -> None:
    """What is planned as it is taken must not hold up health checks and events."""
    longest = turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def services() -> Iterator[Service]:
        nonlocal longest, turns
        for number in range(10 * SLICE):
            longest = 0 if turns else longest + 1
            turns = 0
            assert longest <= SLICE
            yield our_pod_service(f"p{number}")

    others = asyncio.create_task(count_turns())
    record = OwnRecord()
    try:
        await asyncio.sleep(0)
        assert (await record.register(services())).done == 10 * SLICE
    finally:
        others.cancel()
    assert len([one async for one in record.services()]) == 10 * SLICE
    assert (await record.register([])).done == 0
