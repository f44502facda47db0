"""The registrar as a process that writes Kubernetes Events: what `kubectl describe` would show of an object."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.commands.registrar import run_registrar
from k8s_consul_registrar.runner import Stop
from k8s_consul_registrar.sandbox import objects
from k8s_consul_registrar.sandbox.resources import EVENTS
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from k8s_consul_registrar.settings.reading import read_registrar
from support.cluster import REGISTRAR_RULES, Cluster, rule
from support.daemon import Daemon
from support.doors import ApiDoor, Hang
from support.lab import SandboxLab, running_lab
from support.processes import LOOPBACK
from support.waiting import until

EVENT_RIGHTS = rule("create patch", "events", group="events.k8s.io")
LEASES = rule("get create update", "leases", group="coordination.k8s.io")
PATH = "/apis/events.k8s.io/v1/namespaces/shop/events"
WEB = "pod--shop--web-1"
SCRAPED = {"prometheus.io/scrape": "true", "prometheus.io/port": "9102"}
UNPORTED = {"prometheus.io/scrape": "true"}
ELECTION = {
    "CONSUL_BACKEND": "catalog",
    "LEADER_ELECTION": "true",
    "LEASE_NAMESPACE": "default",
    "LEASE_DURATION": "30",
    "LEASE_RENEW_DEADLINE": "20",
    "LEASE_RETRY_PERIOD": "0.3",
}


@contextlib.asynccontextmanager
async def event_lab(*rights: Any) -> AsyncIterator[SandboxLab]:
    """Run a lab whose registrar may do what the overlay `emit-events` grants, unless it has other rights."""
    async with running_lab() as lab:
        rules = [*REGISTRAR_RULES, *(rights or (EVENT_RIGHTS,))]
        lab.token_file.write_text(await lab.cluster.token(rules))
        yield lab


async def events_about(cluster: Cluster, pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the registrar's Events that `kubectl describe` finds for an object: by its UID."""
    found = (await cluster.request("GET", PATH))["items"]
    return [one for one in found if one["regarding"].get("uid") == pod["metadata"]["uid"]]


async def until_events(
    daemon: Daemon, cluster: Cluster, pod: dict[str, Any], count: int
) -> list[dict[str, Any]]:
    """Wait for this many Events about a Pod."""

    async def are_there() -> bool:
        return len(await events_about(cluster, pod)) == count

    await daemon.until(are_there, f"{count} Events")
    return await events_about(cluster, pod)


async def written(daemon: Daemon, *outcomes: str) -> float:
    """Return how many Events had one of these outcomes."""
    return sum([await daemon.metric(f'kubernetes_events_total{{outcome="{one}"}}') or 0 for one in outcomes])


async def test_rejected_pod_has_one_event_that_says_why() -> None:
    """At the start and in an event alike, with the words of the log, and never twice."""
    async with event_lab() as lab, await lab.registrar(EMIT_EVENTS="problems") as daemon:
        first = await lab.cluster.add_pod(annotations=UNPORTED)
        await daemon.ready()
        (event,) = await until_events(daemon, lab.cluster, first, 1)
        assert (event["type"], event["reason"], event["action"]) == ("Warning", "ScrapeRejected", "Resolve")
        assert event["note"] == (await daemon.until_said("rejected"))["reason"]
        assert event["note"].startswith("no_port: ")
        assert event["reportingController"] == "k8s-consul-registrar"
        second = await lab.cluster.add_pod("web-2", annotations=UNPORTED)
        await until_events(daemon, lab.cluster, second, 1)
        await daemon.passes(3)
        await lab.cluster.annotate_pod({"prometheus.io/port": "9102"})
        await daemon.until(lambda: lab.has(WEB))
        assert len(await events_about(lab.cluster, first)) == 1
        await daemon.measures('kubernetes_events_total{outcome="created"}', 2)


async def test_pod_that_flaps_is_no_flood() -> None:
    """Rejected and repaired again and again within the hour: one Event."""
    async with event_lab() as lab, await lab.registrar(EMIT_EVENTS="all") as daemon:
        await daemon.ready()
        pod = await lab.cluster.add_pod(annotations=UNPORTED)
        for _ in range(10):
            await lab.cluster.annotate_pod({"prometheus.io/port": "9102"})
            await daemon.until(lambda: lab.has(WEB))
            await lab.cluster.annotate_pod({"prometheus.io/port": None})
            await daemon.measures('rejections{reason="no_port"}', 1)
        reasons = sorted(one["reason"] for one in await until_events(daemon, lab.cluster, pod, 2))
        assert reasons == ["ScrapeRegistered", "ScrapeRejected"]
        await daemon.measures('kubernetes_events_total{outcome="created"}', 2)
        assert await written(daemon, "created", "repeated", "known") == 2


async def test_rejection_that_stands_becomes_a_series(tmp_path: Path) -> None:
    """With a short hour: it is written again, as a series of the one Event that there is."""
    async with Sandbox() as sandbox:
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_bytes(msgspec.json.encode(sandbox.kubeconfig()))
        environment = {
            "KUBECONFIG": str(kubeconfig),
            "CONSUL_ADDRESS": sandbox.consul.address,
            "CLUSTER_NAME": "lab",
            "ADMIN_PORT": "0",
            "SYNC_PERIOD": "1",
            "EMIT_EVENTS": "problems",
        }
        sandbox.kube.create(objects.pod("web-1", namespace="shop", ip="198.51.100.1", annotations=UNPORTED))
        running = asyncio.create_task(
            run_registrar(read_registrar(environment), Stop(), Timing(event_interval=1.0))
        )

        def count() -> int:
            events = [one.decode() for one in sandbox.kube.store.select(EVENTS)]
            assert len(events) <= 1
            return events[0].get("series", {}).get("count", 0) if events else 0

        try:
            await until(lambda: count() >= 3)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_only_the_leader_writes_events() -> None:
    """Both replicas see the Pod; the next leader finds the Event there and writes of what is new."""
    async with event_lab(EVENT_RIGHTS, LEASES) as lab:
        settings = {**ELECTION, "EMIT_EVENTS": "problems"}
        pod = await lab.cluster.add_pod(annotations=UNPORTED)
        async with await lab.registrar(**settings) as first:
            await first.ready()
            await until_events(first, lab.cluster, pod, 1)
            async with await lab.registrar(**settings) as second:
                await second.ready()
                other = await lab.cluster.add_pod("web-2", annotations=UNPORTED)
                await until_events(first, lab.cluster, other, 1)
                await second.measures('rejections{reason="no_port"}', 2)
                outcomes = ("created", "known", "repeated", "dropped")
                assert await written(second, *outcomes) == 0
                assert await first.terminate() == 0
                await second.until_said("became leader")
                await second.measures('kubernetes_events_total{outcome="known"}', 2)
                third = await lab.cluster.add_pod("web-3", annotations=UNPORTED)
                await until_events(second, lab.cluster, third, 1)
                assert len(await events_about(lab.cluster, pod)) == 1
                await second.measures('kubernetes_events_total{outcome="created"}', 1)


async def test_events_that_hang_delay_no_write_to_consul() -> None:
    """While the API server holds an Event back for half a minute, Pods are registered as ever."""
    async with event_lab() as lab:
        authority = lab.cluster.endpoint.authority
        trust = ssl.create_default_context(cadata=authority.pem.decode())
        url = f"https://{LOOPBACK}:{lab.cluster.endpoint.port}"
        tls = authority.api_server(LOOPBACK)
        async with ApiDoor(url, server_tls=tls, client_tls=trust) as door:
            door.fault = lambda request: Hang(30) if request.path.endswith("/events") else None
            lab.api_door.lead_to(door.port)
            await lab.cluster.add_pod("bad", annotations=UNPORTED)
            async with await lab.registrar(EMIT_EVENTS="problems") as daemon:
                await daemon.until(lambda: door.hanging == 1, "an Event that hangs")
                for number in range(20):
                    name, ip = f"web-{number}", f"198.51.100.{number + 1}"
                    await lab.cluster.add_pod(name, ips=[ip], annotations=SCRAPED)
                    await daemon.until(lambda name=name: f"pod--shop--{name}" in lab.services)  # type: ignore[misc]
                assert door.hanging == 1
                assert await written(daemon, "created", "failed") == 0


async def test_missing_right_is_logged_once_and_nothing_else_suffers() -> None:
    """The log names the overlay; everything is registered, and the metric counts what was forbidden."""
    async with event_lab(LEASES) as lab, await lab.registrar(EMIT_EVENTS="problems") as daemon:
        await lab.cluster.add_pod(annotations=UNPORTED)
        line = await daemon.until_said("Kubernetes Events may not be written")
        assert "grant create on events.events.k8s.io" in line["problem"]
        assert "overlay emit-events" in line["remedy"]
        await lab.cluster.add_pod("web-2", ips=["198.51.100.11"], annotations=SCRAPED)
        await daemon.until(lambda: lab.has("pod--shop--web-2"))
        await lab.cluster.add_pod("web-3", annotations=UNPORTED)
        await daemon.passes(3)
        assert len(daemon.said("Kubernetes Events may not be written")) == 1
        await daemon.measures('kubernetes_events_total{outcome="forbidden"}', 1)


async def test_nothing_is_written_by_default() -> None:
    """Without the setting no Event is even tried: the registrar has no right to it."""
    async with running_lab() as lab, await lab.registrar() as daemon:
        await lab.cluster.add_pod(annotations=UNPORTED)
        await daemon.until_said("rejected")
        await daemon.passes(2)
        assert await written(daemon, "created", "forbidden") == 0
        assert not daemon.said("Kubernetes Events may not be written")
