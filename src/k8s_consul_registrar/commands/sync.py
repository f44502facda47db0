"""The command sync: makes one resync and ends, for a CronJob."""

import argparse
import time
from collections.abc import Mapping

from k8s_consul_registrar.commands import settings_for_consul
from k8s_consul_registrar.commands.plan import confirmed, listed, source_problems
from k8s_consul_registrar.registrar.status import Counts
from k8s_consul_registrar.runner import EXIT_CHANGES, EXIT_FAILURE, EXIT_OK, run_loop
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.wiring.registrar import RegistrarParts

# Services that are reconciled at once.
BATCH = 512


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Make one resync: exit 0 done, 3 the brake holds a removal or the policy withholds a write, 1 failure."""
    del parsed
    return run_loop(_sync(settings_for_consul("sync", environment)))


async def _sync(settings: RegistrarSettings) -> int:
    async with listed(settings) as parts:
        await confirmed(parts)
        found = await parts.resync.run()
        done = await _drained(parts)
        problems = source_problems(parts)
        withheld = len(parts.core.status.withheld)
        rejected = len(parts.core.desired.rejections) + len(parts.core.status.lost_rejections())
    unchanged = found.unchanged + done.unchanged
    print(
        f"registered {done.registered}, updated {done.updated}, deregistered {done.deregistered}, "
        f"unchanged {unchanged}, refused {done.refused}, rejected {rejected}"
        + (f", withheld by POLICY={settings.policy} {withheld}" if withheld else "")
    )
    if done.refused or problems:
        return EXIT_FAILURE
    return EXIT_CHANGES if found.judged.held or withheld else EXIT_OK


async def _drained(parts: RegistrarParts) -> Counts:
    """Reconcile until only refused writes are left, which nothing waits for; raises a `ConsulError`."""
    total = Counts()
    while (batch := parts.core.queue.take(BATCH, time.monotonic())) is not None:
        if batch.is_retry:
            break
        total += await parts.reconciler.reconcile(batch)
    return total
