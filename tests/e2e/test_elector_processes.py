"""Replicas that are processes of their own: killed, stopped, continued and terminated while they lead."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from itertools import groupby
from pathlib import Path

import pytest

from k8s_consul_registrar.registrar.election import ElectionTiming
from support.contender import LONG, TIMING
from support.election import NAME, RETRY, Polls, running_polls
from support.files import TESTS
from support.processes import Program
from support.waiting import PATIENCE, SLACK, until


@pytest.fixture
async def polls(tmp_path: Path) -> AsyncIterator[Polls]:
    """Run a cluster with a namespace for one election."""
    async with running_polls(tmp_path) as polls:
        yield polls


class Processes:
    """Replicas that are processes, and the record of what each wrote when."""

    def __init__(self, polls: Polls, folder: Path) -> None:
        self._polls = polls
        self._folder = folder
        self._record = folder / "record"
        self._programs: list[Program] = []

    async def start(self, identity: str, timing: ElectionTiming = TIMING) -> Program:
        """Start a replica."""
        path = await self._polls.kubeconfig()
        script = str(TESTS / "support" / "contender.py")
        times = map(str, (timing.lease_duration, timing.renew_deadline, timing.retry_period))
        arguments = (str(path), self._polls.namespace, NAME, identity, str(self._record), *times)
        program = Program([sys.executable, script, *arguments], self._folder / f"{identity}.log")
        program.launch()
        self._programs.append(program)
        return program

    async def stop(self) -> None:
        """Kill what still runs."""
        for program in self._programs:
            await program.stop(signal.SIGKILL)

    def writes(self) -> list[tuple[str, float]]:
        """Return who wrote when, in the order it was written."""
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        return [(who, float(at)) for who, _, at in (line.partition(" ") for line in lines)]

    def writers(self) -> list[str]:
        """Return the writers in the order of their writes."""
        return [who for who, _ in groupby(who for who, _ in self.writes())]

    async def until(self, *writers: str) -> None:
        """Wait until these wrote, one after the other."""

        async def have_written() -> bool:
            return self.writers() == list(writers)

        def logs() -> str:
            return f"{self.writers()}\n" + "\n".join(program.tail() for program in self._programs)

        await until(have_written, f"writes by {writers}", context=logs)


@pytest.fixture
async def processes(polls: Polls, tmp_path: Path) -> AsyncIterator[Processes]:
    """Let a test start replicas, and kill them after it."""
    processes = Processes(polls, tmp_path)
    yield processes
    await processes.stop()


def gap(processes: Processes, before: str, after: str) -> float:
    """Return the seconds between one's last write and the other's first."""
    last = max(at for who, at in processes.writes() if who == before)
    return min(at for who, at in processes.writes() if who == after) - last


async def test_killed_leader_is_replaced(processes: Processes) -> None:
    """After kill -9 the other takes over when the lease has run out, and not before."""
    first = await processes.start("a")
    await processes.until("a")
    await processes.start("b")
    await asyncio.sleep(2)
    first.send(signal.SIGKILL)
    await processes.until("a", "b")
    assert TIMING.lease_duration - TIMING.renew_deadline <= gap(processes, "a", "b")
    assert gap(processes, "a", "b") <= TIMING.lease_duration + RETRY + SLACK


async def test_stopped_leader_wakes_up_and_writes_nothing(processes: Processes) -> None:
    """SIGSTOP past the lease: not one write comes from the old leader after it is continued."""
    first = await processes.start("a")
    await processes.until("a")
    await processes.start("b")
    await asyncio.sleep(2)
    first.send(signal.SIGSTOP)
    await processes.until("a", "b")
    first.send(signal.SIGCONT)
    await asyncio.sleep(TIMING.lease_duration)
    assert processes.writers() == ["a", "b"]
    assert first.is_running


async def test_leader_stopped_shortly_goes_on(processes: Processes) -> None:
    """SIGSTOP for less than the deadline hands nothing over."""
    first = await processes.start("a", LONG)
    await processes.until("a")
    await processes.start("b", LONG)
    await asyncio.sleep(2)
    first.send(signal.SIGSTOP)
    await asyncio.sleep(0.5)
    first.send(signal.SIGCONT)
    await asyncio.sleep(LONG.lease_duration)
    assert processes.writers() == ["a"]


async def test_terminated_leader_hands_over(processes: Processes) -> None:
    """SIGTERM gives the lease back before the process ends."""
    first = await processes.start("a")
    await processes.until("a")
    await processes.start("b")
    await asyncio.sleep(2)
    first.send(signal.SIGTERM)
    assert await first.ended(PATIENCE) == 0
    await processes.until("a", "b")
    assert gap(processes, "a", "b") <= RETRY + SLACK
