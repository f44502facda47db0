"""Following one source: lists, watches, and everything that can end a watch, on servers that do it."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from k8s_consul_registrar.backoff import Backoff, Timing
from k8s_consul_registrar.errors import ClusterError, ClusterUnreachable
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.client import PAGE_SIZE, KubeClient
from k8s_consul_registrar.kube.cluster import ClusterUid
from k8s_consul_registrar.kube.credentials import ClientIdentity, StoredCredentials
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.reflector import Following, Reflector
from k8s_consul_registrar.kube.source_state import (
    CatchingUp,
    Failed,
    Listing,
    SourceStatus,
    Synced,
    WatchStats,
)
from k8s_consul_registrar.kube.store import Evidence, Store
from k8s_consul_registrar.model import EVERY_OBJECT, Kind, ObjectKey, Pod, Selector, Source, Undecodable
from support.scripted import (
    Always,
    ApiAnswer,
    ScriptedApi,
    Stream,
    Watch,
    bookmark_object,
    cuts,
    ends,
    holds,
    list_answer,
    pod_object,
    serving_api,
    status_object,
)
from support.waiting import SLACK, slept, unless_late, until

PODS = Source(Kind.POD)
TIMING = Timing(
    retry_first=0.02,
    retry_cap=0.08,
    connect_timeout=20.0,
    read_timeout=20.0,
    watch_timeout=30.0,
    watch_silence=5.0,
    watch_settle=0.1,
    relist_opaque=5.0,
    catch_up=20.0,
)
AHEAD = ApiAnswer(504, status_object(504, causes=[{"reason": "ResourceVersionTooLarge"}]))
EXPIRED = status_object(410)


def address(item: Item) -> str | None:
    """Resolve a Pod to its address, and one that cannot be read to its problem."""
    if isinstance(item, Undecodable):
        return f"unreadable: {item.problem}"
    return item.ip if isinstance(item, Pod) else None


@dataclass
class Seen:
    """An observer that records."""

    evidence: list[tuple[str, Evidence]] = field(default_factory=list)
    states: list[object] = field(default_factory=list)

    def on_object(
        self,
        key: ObjectKey,
        before: str | None,
        after: str | None,
        evidence: Evidence,
        heard_at: float | None,
    ) -> None:
        """Record it."""
        self.evidence.append((key.name, evidence))

    def on_source(self, source: Source, status: SourceStatus) -> None:
        """Record it."""
        self.states.append(status.state)


@dataclass
class Followed:
    """A source that is followed on a scripted server."""

    api: ScriptedApi
    store: Store[str]
    seen: Seen
    cluster_uid: ClusterUid
    reflector: Reflector

    @property
    def status(self) -> SourceStatus:
        """The source's status."""
        return self.store.status(PODS)

    @property
    def stats(self) -> WatchStats:
        """The source's counts."""
        return self.reflector.stats()

    @property
    def restarts(self) -> dict[str, int]:
        """The restarts that happened."""
        return {cause: count for cause, count in self.stats.restarts.items() if count}

    @property
    def pods(self) -> set[str]:
        """The Pods that are there now."""
        return {key.name for key, _ in self.store.items()}

    @property
    def gone(self) -> set[str]:
        """The Pods that an inference took away."""
        return {name for name, evidence in self.seen.evidence if evidence is Evidence.ABSENT}

    async def settled(self, *names: str) -> None:
        """Wait until exactly these Pods are there and the source is synced."""
        await until(lambda: self.pods == set(names) and self.status.proves_absence)


@asynccontextmanager
async def following(
    api: ScriptedApi,
    *,
    timing: Timing = TIMING,
    watches: bool = True,
    period: float = 600.0,
    selector: Selector = EVERY_OBJECT,
    resolve: Callable[[Item], str | None] = address,
    seen: Seen | None = None,
) -> AsyncIterator[Followed]:
    """Follow the Pods of a scripted server."""
    async with (
        serving_api(api),
        KubeClient(Access(api.url, StoredCredentials(ClientIdentity())), timing) as client,
    ):
        seen = seen or Seen()
        store: Store[str] = Store((PODS,), resolve, seen)
        cluster_uid = ClusterUid(client)
        following = Following(
            client, timing, period, watches=watches, selectors={Kind.POD: selector}, cluster_uid=cluster_uid
        )
        reflector = Reflector(PODS, store, following)
        task = asyncio.create_task(reflector.run())
        try:
            yield Followed(api, store, seen, cluster_uid, reflector)
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_list_then_events_from_its_version() -> None:
    """A watch begins where the list ended, and its events are what changes."""
    api = ScriptedApi(pods=[pod_object("a"), pod_object("b")])
    api.watches.append(
        holds(
            ("ADDED", pod_object("c", 101)),
            ("DELETED", pod_object("a", 102)),
            ("MODIFIED", pod_object("b", 103)),
        )
    )
    async with following(api, selector=Selector("app=x")) as followed:
        await followed.settled("b", "c")
        assert followed.gone == set()
        assert ("a", Evidence.EVENT) in followed.seen.evidence
    (query,) = api.queries("watch")
    assert query["resourceVersion"] == "100"
    assert query["allowWatchBookmarks"] == "true"
    assert 30 <= int(query["timeoutSeconds"]) <= 60
    assert [one["labelSelector"] for one in api.queries("list") + api.queries("watch")] == ["app=x"] * 2
    assert (api.count("list"), api.count("probe"), followed.stats.lists) == (1, 0, 1)


async def test_many_events_at_once_are_taken_over_in_several_turns() -> None:
    """A mass deletion must not hold up what is on its way to Consul."""
    turn, turns = 0, Counter[int]()

    async def take_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def resolve(item: Item) -> str | None:
        turns[turn] += 1
        return address(item)

    names = [f"p{number}" for number in range(100)]
    api = ScriptedApi()
    api.watches.append(holds(*(("ADDED", pod_object(name, 101)) for name in names)))
    async with following(api, resolve=resolve) as followed:
        turning = asyncio.create_task(take_turns())
        await followed.settled(*names)
        turning.cancel()
    assert turns.total() == 100
    assert max(turns.values()) <= 30


async def test_drop_is_probed_and_resumed_from_the_last_event() -> None:
    """No second list; in between absence proves nothing."""
    states: list[bool] = []
    api = ScriptedApi(pods=[pod_object("a")])
    resumed = asyncio.Event()

    async def wait(stream: Stream) -> None:
        await resumed.wait()
        await stream.hold()

    api.watches.extend([cuts(("ADDED", pod_object("b", 101)), ("BOOKMARK", bookmark_object(107))), wait])
    api.probes.append(ApiAnswer(503, status_object(503)))
    async with following(api) as followed:
        await until(lambda: not followed.status.is_followed and followed.status.listed_at is not None)
        states.append(followed.status.proves_absence)
        assert followed.pods == {"a", "b"}
        resumed.set()
        await followed.settled("a", "b")
    assert states == [False]
    assert api.count("list") == 1
    assert api.queries("probe") == [{"limit": "1"}] * 2
    assert [query["resourceVersion"] for query in api.queries("watch")] == ["100", "107"]
    assert followed.restarts == {"unreachable": 1, "busy": 1}


async def test_watch_the_server_ends_in_time_stays_followed() -> None:
    """The regular end of a watch is no failure."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([ends(("BOOKMARK", bookmark_object(105)))] * 3)
    async with following(api) as followed:
        await followed.settled("a")
        await until(lambda: api.count("watch") == 4)
        assert followed.status.is_followed
        assert not any(isinstance(state, Failed) for state in followed.seen.states)
    assert (api.count("list"), followed.restarts) == (1, {"ended": 3})
    assert api.count("probe") == 3


@pytest.mark.parametrize("form", ["status", "event"])
async def test_expired_version_leads_to_a_list_in_either_form(form: str) -> None:
    """410 as an HTTP status and as an ERROR event mean the same."""
    api = ScriptedApi(pods=[pod_object("a")])
    gone: ApiAnswer | Watch = ApiAnswer(410, EXPIRED) if form == "status" else ends(("ERROR", EXPIRED))
    api.watches.append(gone)
    async with following(api) as followed:
        await until(lambda: api.count("watch") == 2)
        await followed.settled("a")
    assert api.count("list") == 2
    assert api.count("probe") == 0
    assert followed.restarts == {"expired": 1}


async def test_versions_that_expire_again_and_again_are_not_listed_in_a_rush() -> None:
    """A list is dear: a server whose watches all expire at once is asked ever more seldom."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([ApiAnswer(410, EXPIRED)] * 100)
    async with following(api, timing=replace(TIMING, retry_first=0.1, retry_cap=1.0)):
        longer = await slept(1.0)
        assert api.count("list") <= 6 * longer
        await until(lambda: api.count("list") >= 2)


async def test_history_restored_lower_is_noticed_before_resuming() -> None:
    """A watch from the future would be silent; the server's own version tells, and the list is the truth."""
    api = ScriptedApi(pods=[pod_object("a"), pod_object("b")], version=5000)
    api.watches.append(cuts(("ADDED", pod_object("c", 5001))))
    async with following(api) as followed:
        await until(lambda: followed.pods == {"a", "b", "c"})
        api.restore(pod_object("a"), version=40)
        await followed.settled("a")
        await until(lambda: api.count("watch") == 2)
    assert [query["resourceVersion"] for query in api.queries("watch")] == ["5000", "40"]
    assert followed.restarts == {"unreachable": 1, "ahead": 1}


async def test_silent_watch_is_ended_and_resumed() -> None:
    """Neither event nor bookmark for too long: the connection may be dead; blank lines are no sign of life."""

    async def blank(stream: Stream) -> None:
        await stream.send(("BOOKMARK", bookmark_object(130)))
        while True:
            await stream.write(b"\n")
            await asyncio.sleep(0.02)

    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(blank)
    async with following(api, timing=replace(TIMING, watch_silence=0.3)) as followed:
        await until(lambda: api.count("watch") == 2)
        await followed.settled("a")
    assert followed.stats.restarts["silent"] >= 1
    assert api.queries("watch")[1]["resourceVersion"] == "130"
    assert api.count("list") == 1


async def test_bookmarks_keep_a_quiet_watch_alive() -> None:
    """A quiet cluster is not a dead one."""

    async def quiet(stream: Stream) -> None:
        for version in itertools.count(101):
            await stream.send(("BOOKMARK", bookmark_object(version)))
            await asyncio.sleep(0.05)

    async def attempt(stretch: int) -> None:
        api = ScriptedApi(pods=[pod_object("a")])
        api.watches.append(quiet)
        async with following(api, timing=replace(TIMING, watch_silence=2.0 * stretch)) as followed:
            await asyncio.sleep(3.0 * stretch)
            assert followed.status.is_followed
            assert followed.stats.heard_at is not None
        assert api.count("watch") == 1

    await unless_late(attempt, by=1.0)


@pytest.mark.parametrize(
    ("answer", "cause", "words"),
    [
        (ApiAnswer(401, status_object(401)), "unauthorized", "not accepted"),
        (ApiAnswer(403, status_object(403)), "forbidden", "grant watch on pods"),
        (ApiAnswer(500, status_object(500)), "busy", "500"),
        (ApiAnswer(504, status_object(504)), "busy", "504"),
    ],
)
async def test_refused_watch_fails_its_source_by_name_and_is_tried_again(
    answer: ApiAnswer, cause: str, words: str
) -> None:
    """The known objects stay; the version stays good."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([answer] * (4 if cause == "unauthorized" else 2))
    async with following(api) as followed:
        await until(lambda: words in followed.status.problem)
        assert followed.pods == {"a"}
        await followed.settled("a")
        assert followed.status.problem == ""
    assert followed.stats.restarts[cause] == 2
    assert api.count("list") == 1


async def test_denied_list_is_retried_until_granted() -> None:
    """403 on the list names the permission; nothing else is touched."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.lists.extend([ApiAnswer(403, status_object(403))] * 3)
    async with following(api) as followed:
        await until(lambda: "grant list and watch on pods" in followed.status.problem)
        assert followed.status.listed_at is None
        await followed.settled("a")
    assert api.count("list") == 4


async def test_error_event_of_another_kind_is_a_failure() -> None:
    """An ERROR of 500 in the stream is a failure; what came before it counts, and the watch resumes there."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(ends(("ADDED", pod_object("b", 101)), ("ERROR", status_object(500))))
    async with following(api) as followed:
        await until(lambda: api.count("watch") == 2)
        await followed.settled("a", "b")
    assert followed.restarts == {"busy": 1}
    assert api.queries("watch")[1]["resourceVersion"] == "101"


async def test_stream_that_makes_no_sense_leads_to_a_list() -> None:
    """Garbage would come again from the same version."""

    async def garbage(stream: Stream) -> None:
        await stream.write(b"<html>\n")

    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(garbage)
    async with following(api) as followed:
        await until(lambda: api.count("list") == 2)
        await followed.settled("a")
    assert followed.restarts == {"refused": 1}


async def test_retry_after_is_honoured_in_watch_and_list() -> None:
    """A second named by the server is waited for, though our own wait is a fiftieth of it."""
    loop = asyncio.get_running_loop()
    busy = ApiAnswer(429, status_object(429), {"Retry-After": "1"})
    api = ScriptedApi(pods=[pod_object("a")])
    api.lists.append(busy)
    api.watches.append(busy)
    began = loop.time()
    async with following(api) as followed:
        await until(lambda: followed.pods == {"a"})
        assert 1.0 <= loop.time() - began < 2.0 + SLACK
        await until(lambda: api.count("watch") == 2)
        assert 2.0 <= loop.time() - began < 4.0 + SLACK


async def test_retry_after_is_honoured_within_reason() -> None:
    """A server that asks for an hour is asked again before that."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.lists.append(ApiAnswer(503, status_object(503), {"Retry-After": "3600"}))
    async with following(api, timing=replace(TIMING, retry_after_cap=0.3)) as followed:
        await followed.settled("a")


async def test_watches_that_end_at_once_are_begun_ever_more_seldom() -> None:
    """A server, or a gateway, that closes each watch at once is not asked in a rush."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([ends()] * 1000)
    async with following(api, timing=replace(TIMING, retry_first=0.05, retry_cap=0.4)):
        longer = await slept(1.2)
        assert api.count("watch") <= 12 * longer
        await until(lambda: api.count("watch") >= 3)


async def test_watches_that_bring_one_event_each_are_not_begun_in_a_rush() -> None:
    """The wait begins small again after each, but there is one."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([ends(("BOOKMARK", bookmark_object(101)))] * 1000)
    async with following(api, timing=replace(TIMING, retry_first=0.1, retry_cap=5.0)):
        longer = await slept(1.0)
        assert api.count("watch") <= 20 * longer
        await until(lambda: api.count("watch") >= 3)


async def test_repeated_history_changes_nothing() -> None:
    """Events told twice, in a batch, leave what they left the first time."""
    history = (
        ("ADDED", pod_object("b", 101)),
        ("MODIFIED", pod_object("b", 102, ip="198.51.100.20")),
        ("DELETED", pod_object("a", 103)),
    )
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(cuts(*history))
    async with following(api) as followed:
        await followed.settled("b")
        before = dict(followed.store.items())
        api.watches.append(holds(*history))
        followed.reflector.relist(0.0)
        api.pods, api.version = [pod_object("b", 102, ip="198.51.100.20")], 103
        await until(lambda: api.count("watch") >= 2)
        await asyncio.sleep(0.1)
        assert dict(followed.store.items()) == before


async def test_object_recreated_under_its_name_is_the_new_one() -> None:
    """Another UID and address under one name: the old departure is taken back."""
    api = ScriptedApi(pods=[pod_object("a", uid="old")])
    api.watches.append(
        holds(
            ("DELETED", pod_object("a", 101, uid="old")),
            ("ADDED", pod_object("a", 102, uid="new", ip="198.51.100.77")),
        )
    )
    async with following(api) as followed:
        await until(lambda: api.count("watch") == 1)
        await until(lambda: list(followed.store.values()) == ["198.51.100.77"])
        assert followed.gone == set()


async def test_relist_interrupts_a_healthy_watch_once() -> None:
    """A second list at the moment asked for, with the source followed all the while."""
    loop = asyncio.get_running_loop()
    api = ScriptedApi(pods=[pod_object("a"), pod_object("b")])
    async with following(api) as followed:
        await followed.settled("a", "b")
        await until(lambda: api.count("watch") == 1)
        asked = loop.time()
        followed.reflector.relist(asked + 0.3)
        followed.reflector.relist(asked + 60.0)
        api.pods, api.version = [pod_object("a")], 200
        await until(lambda: api.count("list") == 2)
        assert loop.time() - asked >= 0.29
        assert followed.status.is_followed
        await followed.settled("a")
        await until(lambda: api.count("watch") == 2)
        await asyncio.sleep(0.2)
    assert (api.count("list"), api.count("watch"), followed.stats.lists) == (2, 2, 2)
    assert api.queries("watch")[1]["resourceVersion"] == "200"
    assert followed.restarts == {"relist": 1}


async def test_another_cluster_behind_the_address_is_listed_afresh() -> None:
    """A version means nothing in another cluster, even where the probe would agree."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(cuts())
    async with following(api) as followed:
        await followed.settled("a")
        api.uid, api.pods = "cluster-2", [pod_object("z")]
        await followed.settled("z")
        assert followed.cluster_uid.uid == "cluster-2"
    assert api.count("probe") == 0


@pytest.mark.parametrize("status", [403, 404])
async def test_hidden_identity_blocks_nothing(status: int) -> None:
    """A registrar that may not read kube-system works without its UID."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.namespaces.extend([ApiAnswer(status, status_object(status))] * 9)
    async with following(api) as followed:
        await followed.settled("a")
        assert followed.cluster_uid.uid == ""


async def test_identity_is_asked_before_the_list_and_after_a_loss_alone() -> None:
    """Not by a timer, and not when a watch ends in time."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.namespaces.append(ApiAnswer(500, status_object(500)))
    api.watches.append(ends(("BOOKMARK", bookmark_object(101))))
    async with following(api) as followed:
        await until(lambda: "get namespaces" in followed.status.problem)
        assert api.count("list") == 0
        await until(lambda: api.count("watch") == 2)
    whats = [asked.what for asked in api.asked]
    assert whats == ["namespace", "namespace", "list", "watch", "probe", "watch"]


async def test_nameless_item_makes_the_source_opaque_until_the_next_list() -> None:
    """An event without a name may be about anything; a list follows by itself."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(holds(("MODIFIED", {"metadata": {"name": 7, "resourceVersion": "101"}})))
    async with following(api, timing=replace(TIMING, relist_opaque=0.3)) as followed:
        await until(lambda: followed.status.has_nameless)
        assert not followed.status.proves_absence
        await followed.settled("a")
    assert api.count("list") == 2


async def test_undecodable_event_protects_what_it_names() -> None:
    """Its value is what `resolve` makes of it; its deletion takes that away as well."""
    odd = pod_object("a", 101)
    odd["spec"]["containers"] = 7
    api = ScriptedApi(pods=[pod_object("a")])
    go = asyncio.Event()

    async def watch(stream: Stream) -> None:
        await stream.send(("MODIFIED", odd))
        await go.wait()
        await stream.send(("DELETED", odd))
        await stream.hold()

    api.watches.append(watch)
    async with following(api) as followed:
        await until(lambda: "unreadable" in "".join(followed.store.values()))
        assert followed.pods == {"a"}
        go.set()
        await until(lambda: not followed.pods)
        assert followed.gone == set()


async def test_resumed_watch_proves_no_absence_before_the_missed_events() -> None:
    """Between the head of the resumed watch and the event that was missed a live Pod would look absent."""
    go = asyncio.Event()

    async def late(stream: Stream) -> None:
        await go.wait()
        await stream.send(("ADDED", pod_object("x", 150)))
        await stream.hold()

    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([cuts(), late])
    api.probes.append(list_answer("150"))
    async with following(api) as followed:
        await until(lambda: followed.status.state == CatchingUp("150"))
        assert api.count("watch") == 2
        await asyncio.sleep(0.1)
        assert followed.status.is_followed
        assert not followed.status.proves_absence
        go.set()
        await followed.settled("a", "x")
    assert api.count("list") == 1


async def test_bookmark_ends_catching_up_and_an_older_one_does_not() -> None:
    """Where other kinds moved the server's version there is no event to wait for."""
    go = asyncio.Event()

    async def bookmarks(stream: Stream) -> None:
        await stream.send(("BOOKMARK", bookmark_object(149)))
        await go.wait()
        await stream.send(("BOOKMARK", bookmark_object(151)))
        await stream.hold()

    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([ends(), bookmarks])
    api.probes.append(list_answer("150"))
    async with following(api) as followed:
        await until(lambda: api.sent_version == 149)
        await asyncio.sleep(0.1)
        assert followed.status.state == CatchingUp("150")
        go.set()
        await followed.settled("a")
    assert api.count("list") == 1


async def test_ended_watch_proves_no_absence_while_the_server_is_asked() -> None:
    """An answer that hangs leaves the source behind, and no one asked for a list."""
    release = asyncio.Event()

    async def end(stream: Stream) -> None:
        await release.wait()

    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(end)
    async with following(api, timing=replace(TIMING, retry_first=60.0, retry_cap=60.0)) as followed:
        await followed.settled("a")
        release.set()
        await until(lambda: followed.status.state == CatchingUp(""))
        assert not followed.status.proves_absence
        assert followed.status.is_followed


async def test_source_that_does_not_catch_up_is_listed_once_a_period() -> None:
    """A server without bookmarks, on which only other kinds change."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.probes = Always([list_answer("5000")])
    go = asyncio.Event()

    async def end(stream: Stream) -> None:
        await go.wait()

    api.watches.extend([ends(), end])
    async with following(api, timing=replace(TIMING, catch_up=0.3)) as followed:
        await until(lambda: followed.stats.lists == 2)
        await followed.settled("a")
        go.set()
        await until(lambda: api.count("watch") == 3)
        await until(lambda: followed.status.state == CatchingUp("5000"))
        await asyncio.sleep(0.6)
        assert followed.status.state == CatchingUp("5000")
    assert api.count("list") == 2
    assert followed.restarts["relist"] == 1


async def test_versions_without_an_order_lead_to_a_list_once_a_period() -> None:
    """Only an equal version proves that nothing was missed."""
    api = ScriptedApi(pods=[pod_object("a", "v1")], version="v1")
    api.watches.extend([ends(), ends(), ends(("BOOKMARK", bookmark_object("v9"))), ends()])
    api.probes.extend(list_answer(version) for version in ("v1", "v2", "v9", "v10"))
    async with following(api) as followed:
        await until(lambda: api.count("watch") == 5)
        await until(lambda: followed.status.state == CatchingUp("v10"))
        await asyncio.sleep(0.1)
    assert api.count("list") == 2
    assert [type(state) for state in followed.seen.states] == [
        Synced, CatchingUp, Synced, CatchingUp, Listing, Synced, CatchingUp, Synced, CatchingUp,
    ]  # fmt: skip


ERROR_EXPIRED: Watch = ends(("BOOKMARK", bookmark_object(101)), ("ERROR", EXPIRED))
TROUBLE: dict[str, dict[str, Any]] = {
    "lists ahead": {"lists": AHEAD},
    "lists expired": {"lists": ApiAnswer(410, EXPIRED)},
    "lists are HTML": {"lists": ApiAnswer(200, "<html>")},
    "lists without a version": {"lists": list_answer("")},
    "lists of absurd versions": {"lists": list_answer("9" * 300)},
    "probes ahead": {"probes": AHEAD, "watches": ends()},
    "probes are older than our version": {"probes": list_answer("40"), "watches": ends()},
    "watches ahead": {"watches": AHEAD},
    "watches ahead in an event": {"watches": ends(("ERROR", AHEAD.body))},
    "watches expired": {"watches": ApiAnswer(410, EXPIRED)},
    "watches expired in an event": {"watches": ends(("ERROR", EXPIRED))},
    "watches expired after a bookmark": {"watches": ERROR_EXPIRED},
    "watches are HTML": {"watches": ends(("<html>", {}))},
    "watches are cut": {"watches": cuts(("ADDED", pod_object("a", 101)), ("ADDED", pod_object("b", 102)))},
    "watches end": {"watches": ends()},
    "namespace expired": {"namespaces": ApiAnswer(410, EXPIRED)},
    "no order, watches end": {"version": "x", "probes": list_answer("y"), "watches": ends()},
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
async def test_endless_trouble_is_not_met_in_a_rush(trouble: dict[str, Any]) -> None:
    """Whichever answer repeats, and in whatever form: progress or a wait between any two requests alike."""
    api = ScriptedApi(pods=[pod_object("a")])
    for name, value in trouble.items():
        setattr(api, name, value if name == "version" else Always([value]))
    async with following(api, timing=replace(TIMING, retry_first=0.2, retry_cap=1.0)):
        longer = await slept(1.5)
        for what in ("list", "watch", "probe", "namespace"):
            assert api.count(what) <= 15 * longer
        await until(lambda: len(api.asked) >= 2)


async def test_watches_that_always_break_leave_the_source_listed() -> None:
    """The list does not depend on a stream that something cuts."""
    api = ScriptedApi(pods=[pod_object("a"), pod_object("b")])
    api.watches = Always([cuts(("MODIFIED", pod_object("a", 101)))])
    async with following(api) as followed:
        await until(lambda: api.count("watch") >= 4)
        assert followed.status.listed_at is not None
        assert followed.pods == {"a", "b"}
    assert api.count("list") == 1


async def test_expired_pages_end_in_one_list_without_pages() -> None:
    """Two lists in a row expired on a continue token; the third cannot, and the next one has pages again."""
    first = list_answer("100", pod_object("a"), continue_token="more")
    api = ScriptedApi(pods=[pod_object("a"), pod_object("b")])
    api.lists.extend([first, ApiAnswer(410, EXPIRED)] * 2)
    async with following(api) as followed:
        await followed.settled("a", "b")
        assert followed.gone == set()
        followed.reflector.relist(0.0)
        await until(lambda: followed.stats.lists == 2)
    limits = [query.get("limit") for query in api.queries("list")]
    paged = str(PAGE_SIZE)
    assert limits == [paged, paged, paged, paged, None, paged]
    assert followed.restarts == {"expired": 2, "relist": 1}


async def test_whole_list_that_fails_is_followed_by_pages() -> None:
    """One list without pages, not all lists from then on."""
    first = list_answer("100", pod_object("a"), continue_token="more")
    api = ScriptedApi(pods=[pod_object("a")])
    api.lists.extend([first, ApiAnswer(410, EXPIRED)] * 2)
    api.lists.append(ApiAnswer(500, status_object(500)))
    async with following(api) as followed:
        await followed.settled("a")
    assert [query.get("limit") for query in api.queries("list")][4:] == [None, str(PAGE_SIZE)]


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), UnicodeError("x"), RecursionError("x")])
async def test_unexpected_exception_fails_the_source_and_not_the_daemon(error: Exception) -> None:
    """It is counted each time, logged once with its traceback, and followed by a wait and a list."""
    left = 3

    def resolve(item: Item) -> str | None:
        nonlocal left
        if left:
            left -= 1
            raise error
        return address(item)

    api = ScriptedApi(pods=[pod_object("a")])
    with capture_logs() as logs:
        async with following(api, resolve=resolve) as followed:
            await followed.settled("a")
    assert (followed.stats.internal_errors, followed.restarts) == (3, {"error": 3})
    (failed,) = [state for state in followed.seen.states if isinstance(state, Failed)]
    assert (failed.problem, failed.cause) == (f"internal error: {type(error).__name__}, see the log", "error")
    (line,) = [entry for entry in logs if entry["event"] == "internal error"]
    assert line["exc_info"] is error
    assert line["source"] == "pods"


async def test_unexpected_exception_in_an_event_leads_to_a_list() -> None:
    """The event is not lost: the version it came with proves nothing any more."""
    left = 1

    def resolve(item: Item) -> str | None:
        nonlocal left
        if isinstance(item, Pod) and item.name == "b" and left:
            left -= 1
            raise KeyError("b")
        return address(item)

    api = ScriptedApi(pods=[pod_object("a"), pod_object("b", 101)])
    api.lists.append(list_answer("100", pod_object("a")))
    api.watches.append(holds(("ADDED", pod_object("b", 101))))
    with capture_logs():
        async with following(api, resolve=resolve) as followed:
            await followed.settled("a", "b")
    assert (followed.stats.internal_errors, api.count("list")) == (1, 2)


async def test_observer_that_raises_does_not_end_the_reflector() -> None:
    """Not even where it cannot be told about the failure."""
    api = ScriptedApi(pods=[pod_object("a")])

    class Raising(Seen):
        """An observer that fails a few times."""

        left = 4

        def on_source(self, source: Source, status: SourceStatus) -> None:
            """Fail, or record."""
            if Raising.left:
                Raising.left -= 1
                raise KeyError(str(source))
            super().on_source(source, status)

    with capture_logs():
        async with following(api, seen=Raising()) as followed:
            await followed.settled("a")
    assert followed.stats.internal_errors == 4


async def test_relist_requested_for_later_is_served_after_an_earlier_one() -> None:
    """A list that began before the moment asked for confirms nothing."""
    loop = asyncio.get_running_loop()
    api = ScriptedApi(pods=[pod_object("a")])
    async with following(api) as followed:
        await followed.settled("a")
        began = loop.time()
        followed.reflector.relist(began + 1.5)
        followed.reflector.relist(began + 0.1)
        followed.reflector.relist(began + 1.0)
        await until(lambda: followed.stats.lists == 3)
        assert loop.time() - began >= 1.4
    assert api.count("list") == 3


async def test_polling_lists_each_period_and_never_watches() -> None:
    """WATCH=false: a list, a rest, a list; absence is an inference each time."""
    api = ScriptedApi(pods=[pod_object("a"), pod_object("b")])
    async with following(api, watches=False, period=0.15) as followed:
        await followed.settled("a", "b")
        api.pods = [pod_object("a")]
        await followed.settled("a")
        assert followed.gone == {"b"}
    assert api.count("watch") == api.count("probe") == 0


async def test_polling_lists_sooner_when_asked_or_after_a_failure() -> None:
    """Neither waits for the period."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.lists.append(ApiAnswer(500, status_object(500)))
    async with following(api, watches=False, period=60.0) as followed:
        await followed.settled("a")
        assert api.count("list") == 2
        followed.reflector.relist(asyncio.get_running_loop().time() + 0.1)
        await until(lambda: api.count("list") == 3)
        await asyncio.sleep(0.2)
    assert api.count("list") == 3
    assert (followed.restarts, followed.stats.lists) == ({"busy": 1}, 2)
    assert followed.stats.heard_at is not None


async def test_polling_waits_shortly_again_after_a_list() -> None:
    """Failures of long ago do not slow down the answer to a new one."""
    loop = asyncio.get_running_loop()

    async def attempt(stretch: int) -> None:
        api = ScriptedApi(pods=[pod_object("a")])
        api.lists.extend([ApiAnswer(500, status_object(500))] * 4)
        timing = replace(TIMING, retry_first=0.2 * stretch, retry_cap=100.0)
        async with following(api, timing=timing, watches=False, period=60.0) as followed:
            await followed.settled("a")
            api.lists.append(ApiAnswer(500, status_object(500)))
            began = loop.time()
            followed.reflector.relist(0.0)
            await until(lambda: followed.stats.lists == 2)
            assert loop.time() - began < 1.5 * stretch

    await unless_late(attempt, by=0.5)


async def test_waits_grow_to_their_cap_and_restart() -> None:
    """The wait doubles, is capped, and is small again after a reset."""
    loop = asyncio.get_running_loop()
    backoff = Backoff(Timing(retry_first=0.02, retry_cap=0.1))
    grown = [backoff.delay() for _ in range(5)]
    assert max(grown) <= 0.1
    assert min(grown[3:]) >= 0.05
    began = loop.time()
    await backoff.wait()
    assert loop.time() - began >= 0.045
    backoff.reset()
    assert backoff.delay() <= 0.02


class SlowNamespace:
    """A server whose answer takes a while, and that counts the questions."""

    def __init__(self, answer: str | ClusterError) -> None:
        self.answer = answer
        self.questions = 0

    async def namespace_uid(self, name: str) -> str | None:
        """ApiAnswer, late."""
        assert name == "kube-system"
        self.questions += 1
        await asyncio.sleep(0.02)
        if isinstance(self.answer, ClusterError):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("answer", ["uid-1", ClusterUnreachable("gone")])
async def test_sources_that_lose_their_connections_together_share_a_question(
    answer: str | ClusterError,
) -> None:
    """A hundred sources ask twice at most; an answer asked for before the loss counts for none of them."""
    server = SlowNamespace(answer)
    identity = ClusterUid(server)
    answers = await asyncio.gather(*(identity.confirm() for _ in range(100)), return_exceptions=True)
    assert set(answers) == {answer}
    assert server.questions <= 2
    before = server.questions
    await asyncio.gather(identity.confirm(), return_exceptions=True)
    assert server.questions == before + 1


async def test_cluster_uid_tells_each_new_one_and_forgets_none() -> None:
    """A UID that is hidden later stays known."""
    server, told = SlowNamespace("uid-1"), list[str]()
    cluster_uid = ClusterUid(server, told.append)
    assert cluster_uid.uid == ""
    for answer in ("uid-1", "uid-1", "", "uid-2"):
        server.answer = answer
        assert await cluster_uid.confirm() == answer
    assert (told, cluster_uid.uid) == (["uid-1", "uid-2"], "uid-2")


async def test_cluster_uid_question_that_was_cancelled_is_asked_again() -> None:
    """Its missing answer does not stand for one."""
    server = SlowNamespace("uid-1")
    cluster_uid = ClusterUid(server)
    impatient = asyncio.create_task(cluster_uid.confirm())
    await asyncio.sleep(0)
    patient = asyncio.create_task(cluster_uid.confirm())
    await asyncio.sleep(0)
    impatient.cancel()
    assert await patient == "uid-1"
    assert server.questions == 2
