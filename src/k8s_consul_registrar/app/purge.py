"""Uninstalls: removes every service of one cluster and instance from Consul, after showing them."""

import asyncio
import sys
from collections.abc import Sequence

import uvloop

from k8s_consul_registrar.app.lifecycle import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, complain
from k8s_consul_registrar.app.parts import consul_access, consul_registry, identity
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.errors import AccessError, OperationalError
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.registrar.ownership import Claim
from k8s_consul_registrar.settings.modes import RegistrarSettings

# Of many services this many are shown; the rest is a count.
MOST_SHOWN = 50


def run_purge(settings: RegistrarSettings, *, is_agreed: bool) -> int:
    """Remove what is ours: exit 0 done or nothing there, 1 refused, not agreed to, or failed."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_purge(settings, is_agreed=is_agreed))
    except AccessError as error:
        return complain(error)
    except OperationalError as error:
        print(f"k8s-consul-registrar: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except (KeyboardInterrupt, EOFError):
        return EXIT_INTERRUPTED


async def _purge(settings: RegistrarSettings, *, is_agreed: bool) -> int:
    timing = Timing()
    who = identity(settings)
    async with ConsulClient(consul_access(settings.consul), timing) as client:
        registry = consul_registry(settings, client, timing)
        # The original program's services have no mark but the cluster's name: they are not taken for ours.
        ours = [one async for one in registry.services() if who.claim(one, "") is Claim.OURS]
        _show(ours, settings)
        if not ours:
            return EXIT_OK
        if not is_agreed and not await asyncio.to_thread(_agrees, len(ours)):
            print("nothing was removed")
            return EXIT_FAILURE
        written = await registry.deregister(ours)
    left = [*written.failures]
    print(f"removed {written.done}, refused {len(left)}, changed meanwhile by others {len(written.stale)}")
    for failure in left[:MOST_SHOWN]:
        print(f"  {failure.id}: {failure.problem}", file=sys.stderr)
    return EXIT_FAILURE if left or written.stale else EXIT_OK


def _show(services: Sequence[Service], settings: RegistrarSettings) -> None:
    where = settings.consul.socket or settings.consul.url
    instance = f", instance {settings.instance}" if settings.instance else ""
    print(
        f"{len(services)} services of cluster {settings.cluster_name}{instance} at {where} "
        f"({settings.backend.backend})"
    )
    for service in services[:MOST_SHOWN]:
        print(f"- {service.id}  {service.address}:{service.port}")
    if len(services) > MOST_SHOWN:
        print(f"  and {len(services) - MOST_SHOWN} more")


def _agrees(count: int) -> bool:
    """Ask on the terminal; without one the answer is no."""
    if not sys.stdin.isatty():
        print("not a terminal: --yes says that they are to be removed", file=sys.stderr)
        return False
    return input(f"Remove these {count} services? Type yes: ").strip() == "yes"
