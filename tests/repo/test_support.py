"""What all tests stand on: waiting for a condition, and ports that no other test is given."""

import asyncio
import socket
import subprocess
import sys

import pytest

from support import processes as ports
from support.files import TESTS
from support.processes import reserve_block, reserve_ports
from support.waiting import until

RESERVE_AND_WAIT = "import sys; from support.processes import reserve_ports; print(*reserve_ports(100), flush=True); sys.stdin.read()"


async def test_until_waits_for_plain_and_async_conditions() -> None:
    """Either kind is asked again until it is true of it."""
    asked: list[int] = []

    def is_third() -> bool:
        asked.append(0)
        return len(asked) == 3

    async def is_sixth() -> bool:
        asked.append(0)
        return len(asked) == 6

    await until(is_third)
    await until(is_sixth)
    assert len(asked) == 6


async def test_until_fails_with_its_context() -> None:
    """The error names what was waited for and shows what there was instead."""
    with pytest.raises(TimeoutError, match=r"not within 0\.05 s: a miracle\nnothing happened"):
        await until(lambda: False, "a miracle", within=0.05, context=lambda: "nothing happened")


async def test_until_ends_a_condition_that_hangs() -> None:
    """The bound holds for one look as well as for many."""
    with pytest.raises(TimeoutError, match=r"not within 0\.05 s"):
        await until(lambda: asyncio.sleep(60), within=0.05)


def test_ports_are_distinct_free_and_not_handed_out_by_the_system() -> None:
    """Each can be bound, whatever connections the machine has open."""
    found = reserve_ports(40)
    assert len({*found, *reserve_ports(40)}) == 80
    if ports._EPHEMERAL.exists():
        first, last = map(int, ports._EPHEMERAL.read_text().split())
        assert not any(first <= port <= last for port in found)
    for port in found:
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_ports_of_a_process_are_no_others() -> None:
    """Several processes at once are given ports of their own, and a block is free again after its process."""
    running = [
        subprocess.Popen(
            (sys.executable, "-c", RESERVE_AND_WAIT),
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        given = [
            [int(port) for port in process.stdout.readline().split()] for process in running if process.stdout
        ]
        assert len({port for each in given for port in each} | set(reserve_ports(100))) == 400
        first = given[0][0] - (given[0][0] - ports._candidates().start) % ports._BLOCK
        assert reserve_block(first) is None
    finally:
        for process in running:
            process.communicate()
    reservation = reserve_block(first)
    assert reservation is not None
    reservation.close()
