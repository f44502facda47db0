"""`kube.events` against an API server that keeps Events by the rules of a real one, or refuses and breaks as told."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
from aiohttp import web

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.kube.access import Access, load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.credentials import ClientIdentity, StoredCredentials
from k8s_consul_registrar.kube.events import ATTEMPTS, EventOutcome, EventSender, ObjectEvent
from k8s_consul_registrar.model import Kind, ObjectKey
from k8s_consul_registrar.registrar.events import EventLimits, EventPlan, EventReason
from k8s_consul_registrar.sandbox import objects
from k8s_consul_registrar.sandbox.resources import EVENTS
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from support.scripted import IMPATIENT, QUICK, serving
from support.waiting import until

WALL = 1_790_000_000.0
NAMESPACE = "shop"
TERMINATING = {
    "kind": "Status",
    "message": "unable to create new content in namespace shop because it is being terminated",
    "reason": "Forbidden",
    "details": {"causes": [{"reason": "NamespaceTerminating", "message": "shop"}]},
    "code": 403,
}


def event(name: str = "web-1", namespace: str = NAMESPACE) -> ObjectEvent:
    """Return an Event about a rejected Pod."""
    key = ObjectKey(Kind.POD, namespace, name)
    return ObjectEvent(
        key, f"uid-{name}", EventReason.REJECTED, "Resolve", "no_ip: the Pod has no IP", "no_ip"
    )


class Sending:
    """A sender at work: what it logged, and what became of its Events."""

    def __init__(self, client: KubeClient, timing: Timing, lines: list[Any], limits: EventLimits) -> None:
        self.lines = lines
        self.now = 0.0
        self.leads = True
        self.outcomes = Counter[EventOutcome]()
        self.errors: list[str] = []
        self.plan = EventPlan(limits)
        self.sender = EventSender(
            client,
            self.plan,
            timing=timing,
            may_send=lambda: self.leads,
            count=self.count,
            on_internal_error=lambda where, error: self.errors.append(f"{where}: {error!r}"),
            clock=lambda: self.now,
            wall=lambda: WALL + self.now,
        )

    def count(self, outcome: EventOutcome) -> None:
        """Count an outcome."""
        self.outcomes[outcome] += 1

    def add(self, *events: ObjectEvent) -> None:
        """Have something told."""
        for one in events:
            assert self.plan.add(one, self.now, WALL + self.now)

    async def until(self, **outcomes: int) -> None:
        """Wait for these outcomes, and no others."""
        wanted = {EventOutcome(name): count for name, count in outcomes.items()}
        await until(lambda: self.outcomes == wanted, f"{wanted}", context=lambda: self.outcomes)

    def logged(self, event: str) -> list[Any]:
        """Return the log lines of an event."""
        return [line for line in self.lines if line["event"] == event]


@asynccontextmanager
async def sending(
    access: Access, limits: EventLimits | None = None, timing: Timing = QUICK
) -> AsyncIterator[Sending]:
    """Run a sender."""
    with structlog.testing.capture_logs() as lines:
        async with KubeClient(access, timing) as client:
            sending = Sending(client, timing, lines, limits or EventLimits())
            task = asyncio.create_task(sending.sender.run())
            try:
                yield sending
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
    assert sending.errors == []


@asynccontextmanager
async def answering(*answers: tuple[int, Any]) -> AsyncIterator[tuple[Access, list[str]]]:
    """Serve these answers in turn, the last one forever; yields the access and the requests."""
    requests: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        requests.append(request.method)
        status, body = answers[min(len(requests), len(answers)) - 1]
        if isinstance(body, float):
            await asyncio.sleep(body)
        headers = {"Retry-After": body} if isinstance(body, str) else {}
        content = body if isinstance(body, dict) else {"kind": "Status", "message": "no", "code": status}
        return web.json_response(content, status=status, headers=headers)

    async with serving(answer) as url:
        yield Access(url, StoredCredentials(ClientIdentity())), requests


@asynccontextmanager
async def sandbox_sending(
    folder: Path, *rules: tuple[str, ...], limits: EventLimits | None = None
) -> AsyncIterator[tuple[Sending, Sandbox]]:
    """Run a sender before a sandbox, with the rights that the overlay grants unless it has others."""
    async with Sandbox() as sandbox:
        sandbox.kube.create(objects.namespace(NAMESPACE))
        token = sandbox.token("registrar", *(rules or (("create", "events"), ("patch", "events"))))
        access = load_access({"KUBECONFIG": str(sandbox.write_kubeconfig(folder / "kubeconfig", token))})
        async with sending(access, limits) as running:
            yield running, sandbox


def kept(sandbox: Sandbox) -> list[dict[str, Any]]:
    """Return the Events that the sandbox keeps."""
    return [one.decode() for one in sandbox.kube.store.select(EVENTS)]


async def test_event_is_created_and_its_series_goes_on(tmp_path: Path) -> None:
    """An API server takes both; the second changes nothing but the series."""
    async with sandbox_sending(tmp_path) as (sender, sandbox):
        sender.add(event())
        await sender.until(created=1)
        (first,) = kept(sandbox)
        assert first["regarding"]["uid"] == "uid-web-1"
        for _ in range(2):
            sender.add(event())
        sender.now += 3600
        sender.add(event())
        await sender.until(created=1, repeated=1)
        (second,) = kept(sandbox)
        assert second["series"] == {"count": 4, "lastObservedTime": "2026-09-21T15:13:20.000000Z"}
        assert second["eventTime"] == first["eventTime"]


async def test_event_that_the_api_server_has_forgotten_is_created_again(tmp_path: Path) -> None:
    """It keeps Events for an hour: the series goes on in a new one."""
    async with sandbox_sending(tmp_path) as (sender, sandbox):
        sender.add(event())
        await sender.until(created=1)
        (first,) = kept(sandbox)
        sandbox.kube.delete("Event", first["metadata"]["name"], NAMESPACE)
        sender.now += 3600
        sender.add(event())
        await sender.until(created=2)
        (second,) = kept(sandbox)
        assert second["series"]["count"] == 2
        assert second["eventTime"] == first["eventTime"]


async def test_event_of_an_earlier_leader_is_not_written_twice(tmp_path: Path) -> None:
    """Its name is the same from each process, so the API server refuses a second one."""
    async with sandbox_sending(tmp_path) as (sender, sandbox):
        sender.add(event())
        await sender.until(created=1)
        sender.plan._told.clear()  # as a new process
        sender.add(event())
        await sender.until(created=1, known=1)
        assert len(kept(sandbox)) == 1


async def test_event_without_the_right_is_logged_once_and_tried_after_a_pause(tmp_path: Path) -> None:
    """The log names the overlay; the namespace rests, and once the right is granted all goes on."""
    async with sandbox_sending(tmp_path, ("list", "pods")) as (sender, sandbox):
        sender.add(event(), event("web-2"))
        await sender.until(forbidden=1)
        (line,) = sender.logged("Kubernetes Events may not be written")
        assert "grant create on events.events.k8s.io" in line["problem"]
        assert "overlay emit-events" in line["remedy"]
        sender.now += 600
        sender.add(event())
        await sender.until(forbidden=2)
        assert len(sender.logged("Kubernetes Events may not be written")) == 1
        sandbox.access.grant("registrar", [("create", "events"), ("patch", "events")])
        sender.now += 600
        sender.add(event())
        await sender.until(forbidden=2, created=1)


async def test_event_for_a_namespace_that_is_gone_is_given_up(tmp_path: Path) -> None:
    """The namespace went with its Pods: nothing is tried again, and other namespaces go on."""
    async with sandbox_sending(tmp_path) as (sender, sandbox):
        sender.add(event(namespace="gone"), event())
        await sender.until(refused=1, created=1)
        assert [one["metadata"]["namespace"] for one in kept(sandbox)] == [NAMESPACE]


async def test_namespace_that_is_terminating_is_no_missing_right() -> None:
    """The API server answers 403 to what is created there: that Event is given up, and nothing pauses."""
    async with answering((403, TERMINATING), (201, {})) as (access, _), sending(access) as sender:
        sender.add(event(), event("web-2"))
        await sender.until(refused=1, created=1)
        assert not sender.logged("Kubernetes Events may not be written")


@pytest.mark.parametrize("answer", [(429, "0"), (500, {}), (503, "1"), (401, {}), (200, 60.0)])
async def test_event_is_tried_again_after_a_failure_of_the_moment(answer: tuple[int, Any]) -> None:
    """Busy, broken, unauthorized and hanging servers alike; the end of it is logged."""
    # A 401 is asked again at once with fresh credentials.
    times = 2 if answer[0] == 401 else 1
    timing = IMPATIENT if isinstance(answer[1], float) else QUICK
    async with (
        answering(*[answer] * times, (201, {})) as (access, _),
        sending(access, timing=timing) as sender,
    ):
        sender.add(event())
        await sender.until(created=1)
        assert len(sender.logged("Kubernetes Events cannot be written")) == 1
        assert len(sender.logged("Kubernetes Events can be written again")) == 1


async def test_event_that_always_fails_is_given_up_and_told_later() -> None:
    """A few attempts and no more: others get their turn, and what still holds is reported by a later try."""
    async with answering((500, {})) as (access, requests), sending(access) as sender:
        sender.add(event())
        await sender.until(failed=1)
        assert len(requests) == ATTEMPTS
        sender.plan.stand(iter([event()]))
        await sender.until(failed=2)
        assert len(sender.logged("Kubernetes Events cannot be written")) == 1


async def test_retry_after_is_heeded() -> None:
    """The API server says how long it wants to be left alone."""
    async with answering((429, "1"), (201, {})) as (access, _), sending(access) as sender:
        began = time.monotonic()
        sender.add(event())
        await sender.until(created=1)
        assert time.monotonic() - began >= 1


async def test_sender_that_lost_the_lead_writes_nothing() -> None:
    """Events already taken from the queue are left to the new leader."""
    async with answering((201, {})) as (access, requests), sending(access) as sender:
        sender.leads = False
        sender.add(event())
        await sender.until(dropped=1)
        assert requests == []


async def test_sender_outlives_an_error_of_its_own() -> None:
    """An Event that cannot even be encoded costs itself: it is reported, and the next one is written."""
    async with answering((201, {})) as (access, _), sending(access) as sender:
        broken = msgspec.structs.replace(event("broken"), action=b"\xff".decode("utf-8", "surrogateescape"))
        sender.add(broken, event())
        await sender.until(created=1)
        assert [text.partition(":")[0] for text in sender.errors] == ["Kubernetes Events"]
        sender.errors.clear()
