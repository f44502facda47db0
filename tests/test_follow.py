"""Following one source: lists, watches, and everything that can end a watch, on servers that do it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.errors import ClusterError, ClusterUnreachable
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.activity import ActivityCounter
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.credentials import FixedCredentials, Identity
from k8s_consul_registrar.kube.follow import Following, Patience, Relists
from k8s_consul_registrar.kube.identity import ClusterIdentity
from k8s_consul_registrar.kube.known import Verdict
from k8s_consul_registrar.kube.mirror import Mirror
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.poll import Poller
from k8s_consul_registrar.kube.watcher import Watcher
from k8s_consul_registrar.model import Kind, ObjectKey, Source
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.wanted import SourceState
from scripted_api import (
    Answer,
    ScriptedApi,
    Stream,
    Watch,
    bookmark_object,
    cuts,
    ends,
    hold,
    holds,
    initial,
    pod_object,
    serving,
    status_object,
)

PODS = Source(Kind.POD)
TIMING = Timing(
    retry_first=0.02,
    retry_cap=0.08,
    connect_timeout=1.0,
    read_timeout=1.0,
    watch_timeout=30.0,
    watch_silence=5.0,
    watch_settle=0.1,
    relist_opaque=5.0,
)
AHEAD = Answer(504, status_object(504, causes=[{"reason": "ResourceVersionTooLarge"}]))
EXPIRED = status_object(410)


def verdict(item: Item) -> Verdict | None:
    """Judge as the daemon does."""
    return resolve(item, TargetRules())


@dataclass
class Followed:
    """A source that is followed on a scripted server."""

    api: ScriptedApi
    mirror: Mirror
    counter: ActivityCounter
    follower: Watcher | Poller

    @property
    def state(self) -> SourceState:
        """How well the source is known."""
        return self.mirror.wanted().sources[PODS]

    @property
    def ids(self) -> set[str]:
        """The Pods that are targets now."""
        return {service_id.removeprefix("pod--shop--") for service_id in self.mirror.wanted().claims}

    async def until(self, condition: Callable[[], bool], within: float = 5.0) -> None:
        """Wait until something holds."""
        async with asyncio.timeout(within):
            while not condition():
                await asyncio.sleep(0.005)

    async def settled(self, *ids: str) -> None:
        """Wait until exactly these Pods are targets of a source that is followed."""
        await self.until(lambda: self.ids == set(ids) and self.state.proves_absence)


@asynccontextmanager
async def following(
    api: ScriptedApi, *, timing: Timing = TIMING, period: float | None = None, selector: str = ""
) -> AsyncIterator[Followed]:
    """Follow the Pods of a scripted server: by watch, or by polling where there is a period."""
    async with serving(api), KubeClient(Access(api.url, FixedCredentials(Identity())), timing) as client:
        mirror = Mirror((PODS,), verdict)
        counter = ActivityCounter()
        work = Following(PODS, mirror, ClusterIdentity(client, mirror), timing, counter, selector)
        follower = Watcher(work, client) if period is None else Poller(work, client, period=period)
        task = asyncio.create_task(follower.run())
        try:
            yield Followed(api, mirror, counter, follower)
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_a_list_then_events_from_its_version() -> None:
    """A watch begins where the list ended, and its events are what changes."""
    api = ScriptedApi(pods=[pod_object("a"), pod_object("b")])
    api.watches.append(
        holds(
            ("ADDED", pod_object("c", 101)),
            ("DELETED", pod_object("a", 102)),
            ("MODIFIED", pod_object("b", 103)),
        )
    )
    async with following(api, selector="app=x") as followed:
        await followed.settled("b", "c")
        assert followed.mirror.wanted().departed == {ObjectKey(Kind.POD, "shop", "a")}
    (query,) = api.queries("watch")
    assert query["resourceVersion"] == "100"
    assert query["allowWatchBookmarks"] == "true"
    assert 30 <= int(query["timeoutSeconds"]) <= 60
    assert "sendInitialEvents" not in query
    assert [one["labelSelector"] for one in api.queries("list") + api.queries("watch")] == ["app=x"] * 2
    assert (api.count("list"), api.count("probe"), followed.counter.lists) == (1, 0, 1)


async def test_streamed_initial_events_are_a_list_and_go_on_as_a_watch() -> None:
    """Where the server offers it one connection does it all; nothing is listed."""
    api = ScriptedApi(streams_lists=True)
    api.watches.append(
        holds(*initial(200, pod_object("a"), pod_object("b")), ("DELETED", pod_object("a", 201)))
    )
    async with following(api) as followed:
        await followed.settled("b")
        assert followed.state.objects == 1
    (query,) = api.queries("watch")
    assert query["sendInitialEvents"] == "true"
    assert query["resourceVersionMatch"] == "NotOlderThan"
    assert "resourceVersion" not in query
    assert (api.count("list"), followed.counter.lists) == (0, 1)


async def test_claims_show_before_the_streamed_list_is_complete() -> None:
    """Registering begins while the list streams; absence waits for its end."""
    complete = asyncio.Event()

    async def slow(stream: Stream) -> None:
        await stream.send(("ADDED", pod_object("a")))
        await complete.wait()
        await stream.send(*initial(200))
        await stream.hold()

    api = ScriptedApi(streams_lists=True)
    api.watches.append(slow)
    async with following(api) as followed:
        await followed.until(lambda: followed.ids == {"a"})
        assert not followed.state.proves_absence
        assert followed.state.listed_at is None
        complete.set()
        await followed.settled("a")


async def test_a_refused_stream_falls_back_to_pages_and_is_remembered() -> None:
    """A server without initial events is asked for them once, and the source has not failed."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([cuts(), Answer(410, EXPIRED)])
    async with following(api) as followed:
        await followed.until(lambda: api.count("list") == 2)
        await followed.settled("a")
    assert api.count("refused") == 1


@pytest.mark.parametrize("noise", [(), (("BOOKMARK", bookmark_object(50)),)])
async def test_initial_events_that_never_end_fall_back_to_pages(noise: tuple[object, ...]) -> None:
    """A server that ignores the option sends no closing bookmark, at most ordinary ones."""

    async def endless(stream: Stream) -> None:
        await stream.send(("ADDED", pod_object("a")))
        while True:
            await asyncio.sleep(0.1)
            await stream.send(*noise)  # type: ignore[arg-type]  # pairs, or none

    api = ScriptedApi(pods=[pod_object("b")], streams_lists=True)
    api.watches.append(endless)
    async with following(api, timing=replace(TIMING, read_timeout=0.3)) as followed:
        await followed.settled("b")
    assert (api.count("list"), api.count("watch")) == (1, 2)


async def test_a_streamed_list_that_breaks_off_proves_nothing() -> None:
    """What came counts as there, what did not come is not absent, and the list begins anew."""
    api = ScriptedApi(streams_lists=True)
    api.watches.extend(
        [
            ends(*initial(200, pod_object("a"), pod_object("b"))),
            Answer(410, EXPIRED),
            ends(("ADDED", pod_object("c"))),
            hold,
        ]
    )
    async with following(api, timing=replace(TIMING, watch_settle=0.0)) as followed:
        await followed.until(lambda: followed.ids == {"a", "b", "c"})
        assert not followed.state.proves_absence
        await followed.until(lambda: "broke off" in followed.state.problem)
        await followed.until(lambda: api.count("watch") == 4)
    assert [("sendInitialEvents" in query) for query in api.queries("watch")] == [True, False, True, True]


async def test_a_drop_is_probed_and_resumed_from_the_last_event() -> None:
    """No second list; in between absence proves nothing."""
    states: list[bool] = []
    api = ScriptedApi(pods=[pod_object("a")])
    resumed = asyncio.Event()

    async def wait(stream: Stream) -> None:
        await resumed.wait()
        await stream.hold()

    api.watches.extend([cuts(("ADDED", pod_object("b", 101)), ("BOOKMARK", bookmark_object(107))), wait])
    api.probes.append(Answer(503, status_object(503)))
    async with following(api) as followed:
        await followed.until(lambda: not followed.state.is_followed and followed.state.listed_at is not None)
        states.append(followed.state.proves_absence)
        assert followed.ids == {"a", "b"}
        await followed.settled("a", "b")
    assert states == [False]
    assert api.count("list") == 1
    assert [query["resourceVersion"] for query in api.queries("probe")] == ["107", "107"]
    assert api.queries("probe")[0]["limit"] == "1"
    assert [query["resourceVersion"] for query in api.queries("watch")] == ["100", "107"]
    assert +followed.counter.restarts == {"unreachable": 1, "busy": 1}


async def test_a_watch_the_server_ends_in_time_stays_followed() -> None:
    """The regular end of a watch is no failure: nobody is woken for a full pass."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([ends(("BOOKMARK", bookmark_object(105)))] * 3)
    async with following(api) as followed:
        await followed.settled("a")
        await followed.until(lambda: api.count("watch") == 4)
        assert not followed.mirror.needs_full_pass()
        assert followed.state.is_followed
    assert (api.count("list"), +followed.counter.restarts) == (1, {"ended": 3})
    assert api.count("probe") == 3


@pytest.mark.parametrize("form", ["status", "event"])
async def test_an_expired_version_leads_to_a_list_in_either_form(form: str) -> None:
    """410 as an HTTP status and as an ERROR event mean the same."""
    api = ScriptedApi(pods=[pod_object("a")])
    gone: Answer | Watch = Answer(410, EXPIRED) if form == "status" else ends(("ERROR", EXPIRED))
    api.watches.append(gone)
    async with following(api) as followed:
        await followed.until(lambda: api.count("watch") == 2)
        await followed.settled("a")
    assert api.count("list") == 2
    assert api.count("probe") == 0
    assert +followed.counter.restarts == {"expired": 1}


async def test_versions_that_expire_again_and_again_are_not_listed_in_a_rush() -> None:
    """A list is dear: a server whose watches all expire at once is asked ever more seldom."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([Answer(410, EXPIRED)] * 100)
    async with following(api, timing=replace(TIMING, retry_first=0.1, retry_cap=1.0)):
        await asyncio.sleep(1.0)
    assert 2 <= api.count("list") <= 6


async def test_a_history_restored_lower_is_noticed_before_resuming() -> None:
    """A watch from the future would be silent for ever; the probe tells, and the list is the truth."""
    api = ScriptedApi(pods=[pod_object("a"), pod_object("b")], version=5000)
    api.watches.append(cuts(("ADDED", pod_object("c", 5001))))
    api.probes.append(AHEAD)
    async with following(api) as followed:
        await followed.until(lambda: followed.ids == {"a", "b", "c"})
        api.pods, api.version = [pod_object("a")], 40
        await followed.settled("a")
        await followed.until(lambda: api.count("watch") == 2)
    assert [query["resourceVersion"] for query in api.queries("watch")] == ["5000", "40"]
    assert +followed.counter.restarts == {"unreachable": 1, "ahead": 1}


async def test_a_silent_watch_is_ended_and_resumed() -> None:
    """Neither event nor bookmark for too long: the connection may be dead; blank lines are no sign of life."""

    async def blank(stream: Stream) -> None:
        await stream.send(("BOOKMARK", bookmark_object(130)))
        while True:
            await stream.write(b"\n")
            await asyncio.sleep(0.02)

    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(blank)
    async with following(api, timing=replace(TIMING, watch_silence=0.3)) as followed:
        await followed.until(lambda: api.count("watch") == 2)
        await followed.settled("a")
    assert followed.counter.restarts["silent"] >= 1
    assert api.queries("watch")[1]["resourceVersion"] == "130"
    assert api.count("list") == 1


async def test_bookmarks_keep_a_quiet_watch_alive() -> None:
    """A quiet cluster is not a dead one."""

    async def quiet(stream: Stream) -> None:
        for version in range(101, 200):
            await stream.send(("BOOKMARK", bookmark_object(version)))
            await asyncio.sleep(0.05)

    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(quiet)
    async with following(api, timing=replace(TIMING, watch_silence=0.3)) as followed:
        await asyncio.sleep(1.0)
        assert followed.state.is_followed
        assert followed.counter.heard_at is not None
    assert api.count("watch") == 1


@pytest.mark.parametrize(
    ("answer", "cause", "words"),
    [
        (Answer(401, status_object(401)), "unauthorized", "not accepted"),
        (Answer(403, status_object(403)), "forbidden", "grant watch on pods"),
        (Answer(500, status_object(500)), "busy", "500"),
        (Answer(504, status_object(504)), "busy", "504"),
    ],
)
async def test_a_refused_watch_fails_its_source_by_name_and_is_tried_again(
    answer: Answer, cause: str, words: str
) -> None:
    """What is known stays; the version stays good."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([answer] * (4 if cause == "unauthorized" else 2))
    async with following(api) as followed:
        await followed.until(lambda: words in followed.state.problem)
        assert followed.ids == {"a"}
        await followed.settled("a")
        assert followed.state.problem == ""
    assert followed.counter.restarts[cause] == 2
    assert api.count("list") == 1


async def test_a_denied_list_is_retried_until_granted() -> None:
    """403 on the list names the permission; nothing else is touched."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.lists.extend([Answer(403, status_object(403))] * 3)
    async with following(api) as followed:
        await followed.until(lambda: "grant list on pods" in followed.state.problem)
        assert followed.state.listed_at is None
        await followed.settled("a")
    assert api.count("list") == 4


async def test_an_error_event_of_another_kind_is_a_failure() -> None:
    """An ERROR of 500 in the stream is a failure; what came before it counts, and the watch resumes there."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(ends(("ADDED", pod_object("b", 101)), ("ERROR", status_object(500))))
    async with following(api) as followed:
        await followed.until(lambda: api.count("watch") == 2)
        await followed.settled("a", "b")
    assert +followed.counter.restarts == {"busy": 1}
    assert api.queries("watch")[1]["resourceVersion"] == "101"


async def test_a_stream_that_makes_no_sense_leads_to_a_list() -> None:
    """Garbage would come again from the same version."""

    async def garbage(stream: Stream) -> None:
        await stream.write(b"<html>\n")

    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(garbage)
    async with following(api) as followed:
        await followed.until(lambda: api.count("list") == 2)
        await followed.settled("a")
    assert +followed.counter.restarts == {"refused": 1}


async def test_retry_after_is_honoured_in_watch_and_list() -> None:
    """A second named by the server is waited for, though our own wait is a fiftieth of it."""
    loop = asyncio.get_running_loop()
    busy = Answer(429, status_object(429), {"Retry-After": "1"})
    api = ScriptedApi(pods=[pod_object("a")])
    api.lists.append(busy)
    api.watches.append(busy)
    began = loop.time()
    async with following(api) as followed:
        await followed.until(lambda: followed.ids == {"a"})
        assert 1.0 <= loop.time() - began < 2.0
        await followed.until(lambda: api.count("watch") == 2)
        assert 2.0 <= loop.time() - began < 4.0


async def test_retry_after_is_honoured_within_reason() -> None:
    """A server that asks for an hour is asked again before that."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.lists.append(Answer(503, status_object(503), {"Retry-After": "3600"}))
    async with following(api, timing=replace(TIMING, retry_after_cap=0.3)) as followed:
        await followed.settled("a")


async def test_watches_that_end_at_once_are_begun_ever_more_seldom() -> None:
    """A server, or a gateway, that closes each watch at once is not asked in a rush."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([ends()] * 1000)
    async with following(api, timing=replace(TIMING, retry_first=0.05, retry_cap=0.4)):
        await asyncio.sleep(1.2)
    assert 3 <= api.count("watch") <= 12


async def test_watches_that_bring_one_event_each_are_not_begun_in_a_rush() -> None:
    """The wait begins small again after each, but there is one."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.extend([ends(("BOOKMARK", bookmark_object(101)))] * 1000)
    async with following(api, timing=replace(TIMING, retry_first=0.1, retry_cap=5.0)):
        await asyncio.sleep(1.0)
    assert 5 <= api.count("watch") <= 20


async def test_a_repeated_history_changes_nothing() -> None:
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
        before = followed.mirror.wanted().claims
        api.watches.append(holds(*history))
        followed.follower.relist(0.0)
        api.pods, api.version = [pod_object("b", 102, ip="198.51.100.20")], 103
        await followed.until(lambda: api.count("watch") >= 2)
        await asyncio.sleep(0.1)
        assert followed.mirror.wanted().claims == before


async def test_an_object_recreated_under_its_name_is_the_new_one() -> None:
    """Another UID and address under one name: the old departure is taken back."""
    api = ScriptedApi(pods=[pod_object("a", uid="old")])
    api.watches.append(
        holds(
            ("DELETED", pod_object("a", 101, uid="old")),
            ("ADDED", pod_object("a", 102, uid="new", ip="198.51.100.77")),
        )
    )
    async with following(api) as followed:
        await followed.until(lambda: api.count("watch") == 1)
        await followed.until(
            lambda: [c[0].address for c in followed.mirror.wanted().claims.values()] == ["198.51.100.77"]
        )
        assert followed.mirror.wanted().departed == frozenset()


async def test_relist_interrupts_a_healthy_watch_once() -> None:
    """A second list at the moment asked for, with the source followed all the while."""
    loop = asyncio.get_running_loop()
    api = ScriptedApi(pods=[pod_object("a"), pod_object("b")])
    async with following(api) as followed:
        await followed.settled("a", "b")
        await followed.until(lambda: api.count("watch") == 1)
        asked = loop.time()
        followed.follower.relist(asked + 0.3)
        followed.follower.relist(asked + 60.0)
        api.pods, api.version = [pod_object("a")], 200
        await followed.until(lambda: api.count("list") == 2)
        assert loop.time() - asked >= 0.29
        assert followed.state.is_followed
        await followed.settled("a")
        await followed.until(lambda: api.count("watch") == 2)
        await asyncio.sleep(0.2)
    assert (api.count("list"), api.count("watch"), followed.counter.lists) == (2, 2, 2)
    assert api.queries("watch")[1]["resourceVersion"] == "200"
    assert +followed.counter.restarts == {"relist": 1}


async def test_relist_streams_where_lists_stream() -> None:
    """The second list comes as initial events too."""
    api = ScriptedApi(streams_lists=True)
    api.watches.extend(
        [holds(*initial(200, pod_object("a"), pod_object("b"))), holds(*initial(300, pod_object("a")))]
    )
    async with following(api) as followed:
        await followed.settled("a", "b")
        followed.follower.relist(0.0)
        await followed.settled("a")
    assert (api.count("watch"), api.count("list")) == (2, 0)


async def test_another_cluster_behind_the_address_is_listed_afresh() -> None:
    """A version means nothing in another cluster, even where the probe would agree."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(cuts())
    async with following(api) as followed:
        await followed.settled("a")
        api.uid, api.pods = "cluster-2", [pod_object("z")]
        await followed.settled("z")
        assert followed.mirror.wanted().cluster_uid == "cluster-2"
    assert api.count("probe") == 0


@pytest.mark.parametrize("status", [403, 404])
async def test_a_hidden_identity_blocks_nothing(status: int) -> None:
    """A registrar that may not read kube-system works without its UID."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.namespaces.extend([Answer(status, status_object(status))] * 9)
    async with following(api) as followed:
        await followed.settled("a")
        assert followed.mirror.wanted().cluster_uid == ""


async def test_the_identity_is_asked_before_the_list_and_after_a_loss_alone() -> None:
    """Not by a timer, and not when a watch ends in time."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.namespaces.append(Answer(500, status_object(500)))
    api.watches.append(ends(("BOOKMARK", bookmark_object(101))))
    async with following(api) as followed:
        await followed.until(lambda: "get namespaces" in followed.state.problem)
        assert api.count("list") == 0
        await followed.until(lambda: api.count("watch") == 2)
    whats = [asked.what for asked in api.asked]
    assert whats[:3] == ["namespace", "namespace", "refused"]
    assert whats[3:] == ["list", "watch", "probe", "watch"]


async def test_a_nameless_item_makes_the_source_opaque_until_the_next_list() -> None:
    """An event without a name may be about anything; a list follows by itself."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.watches.append(holds(("MODIFIED", {"metadata": {"name": 7, "resourceVersion": "101"}})))
    async with following(api, timing=replace(TIMING, relist_opaque=0.3)) as followed:
        await followed.until(lambda: followed.state.is_opaque)
        assert not followed.state.proves_absence
        await followed.settled("a")
    assert api.count("list") == 2


async def test_an_undecodable_event_protects_what_it_names() -> None:
    """The Pod's target goes, and its rejection stands for it; its deletion takes that away as well."""
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
        await followed.until(lambda: len(followed.mirror.wanted().rejections) == 1)
        assert followed.ids == set()
        (rejection,) = followed.mirror.wanted().rejections.values()
        assert rejection.id == "pod--shop--a"
        go.set()
        await followed.until(lambda: not followed.mirror.wanted().rejections)
        assert {key.name for key in followed.mirror.wanted().departed} == {"a"}


async def test_polling_lists_each_period_and_never_watches() -> None:
    """WATCH=false: a list, a rest, a list; absence is an inference each time."""
    api = ScriptedApi(pods=[pod_object("a"), pod_object("b")])
    async with following(api, period=0.15) as followed:
        await followed.settled("a", "b")
        api.pods = [pod_object("a")]
        await followed.settled("a")
        assert followed.mirror.wanted().departed == frozenset()
    assert api.count("watch") == api.count("refused") == api.count("probe") == 0


async def test_polling_lists_sooner_when_asked_or_after_a_failure() -> None:
    """Neither waits for the period."""
    api = ScriptedApi(pods=[pod_object("a")])
    api.lists.append(Answer(500, status_object(500)))
    async with following(api, period=60.0) as followed:
        await followed.settled("a")
        assert api.count("list") == 2
        followed.follower.relist(asyncio.get_running_loop().time() + 0.1)
        await followed.until(lambda: api.count("list") == 3)
        await asyncio.sleep(0.2)
    assert api.count("list") == 3
    assert (+followed.counter.restarts, followed.counter.lists) == ({"busy": 1}, 2)
    assert followed.counter.heard_at is not None


def test_a_list_serves_the_wishes_of_its_past() -> None:
    """One that began before the moment asked for confirms nothing."""
    relists = Relists()
    relists.ask(10.0)
    relists.ask(20.0)
    relists.begin(9.0)
    assert relists.at == 10.0
    relists.begin(10.0)
    assert relists.at is None


async def test_waits_grow_to_their_cap_and_begin_anew() -> None:
    """The wait doubles, is capped, and is small again after a reset."""
    loop = asyncio.get_running_loop()
    patience = Patience(Timing(retry_first=0.02, retry_cap=0.1))

    async def timed() -> float:
        began = loop.time()
        await patience.wait()
        return loop.time() - began

    grown = [await timed() for _ in range(5)]
    assert max(grown) < 0.15
    assert min(grown[3:]) >= 0.045
    patience.reset()
    assert await timed() < 0.04


class SlowNamespace:
    """A server whose answer takes a while, and that counts the questions."""

    def __init__(self, answer: str | ClusterError) -> None:
        self.answer = answer
        self.questions = 0

    async def namespace_uid(self, name: str) -> str | None:
        """Answer, late."""
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
    identity = ClusterIdentity(server, Mirror((PODS,), verdict))
    answers = await asyncio.gather(*(identity.confirm() for _ in range(100)), return_exceptions=True)
    assert set(answers) == {answer}
    assert server.questions <= 2
    before = server.questions
    await asyncio.gather(identity.confirm(), return_exceptions=True)
    assert server.questions == before + 1
