"""Service names that belong to services of others are not joined."""

from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.errors import (
    ConsulBusy,
    ConsulError,
    ConsulFiltered,
    ConsulForbidden,
    ConsulRefused,
    ConsulUnreachable,
)
from k8s_consul_registrar.model import Kind, Service
from k8s_consul_registrar.registrar.decide import NameGuard, NameStatus, comparable_name
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import is_of_a_registrar
from k8s_consul_registrar.registrar.reporter import Reporter
from k8s_consul_registrar.registrar.status import RegistrarStatus
from support.builders import make_service, our_pod_service

PODS_CHECKED = frozenset({Kind.POD})


class Catalog:
    """A whole catalog in which some names are taken; it notes what is looked up, and can fail."""

    def __init__(self, *taken: str) -> None:
        self.taken = set(taken)
        self.asked: list[str] = []
        self.problem: ConsulError | None = None

    async def is_name_taken(self, name: str) -> bool:
        """Return whether a name is taken."""
        self.asked.append(name)
        if self.problem is not None:
            raise self.problem
        return name in self.taken


def resync(guard: NameGuard, *foreign: Service) -> None:
    """Report the foreign services of one complete read."""
    guard.begin()
    for service in foreign:
        guard.saw(service)
    guard.finish()


def foreign(name: str) -> Service:
    """Return a service that was registered by hand."""
    return make_service(f"hand-made-{name}", {"team": "x"}, name=name)


def statuses(guard: NameGuard, *names: str) -> list[NameStatus]:
    """Return what may become of names of Pods."""
    return [guard.names.status(Kind.POD, name) for name in names]


def test_name_of_a_foreign_service_at_our_node_is_taken() -> None:
    """However it is spelt, and for default names too; a later read replaces it."""
    guard = NameGuard()
    resync(guard, foreign("Web"))
    assert statuses(guard, "web", "WEB", "other") == [NameStatus.TAKEN, NameStatus.TAKEN, NameStatus.FREE]
    assert guard.names.status(Kind.NODE, "web") is NameStatus.TAKEN
    resync(guard)
    assert statuses(guard, "web") == [NameStatus.FREE]


def test_name_seen_in_an_unfinished_read_is_not_taken_yet() -> None:
    """And none of the last read is free before its end."""
    guard = NameGuard()
    resync(guard, foreign("old"))
    guard.begin()
    guard.saw(foreign("new"))
    assert statuses(guard, "old", "new") == [NameStatus.TAKEN, NameStatus.FREE]


@pytest.mark.parametrize(
    "service",
    [
        make_service("x", {"managed_by": "k8s-consul-registrar", "cluster": "other"}, name="shared"),
        make_service("y", {**dict(our_pod_service("q").meta), "instance": "blue"}, name="shared"),
        make_service("pod--shop--q", {"cluster": "other"}, name="shared"),
    ],
    ids=["another cluster", "another instance", "original program"],
)
def test_name_of_another_registrar_is_shared(service: Service) -> None:
    """Their services are distinguished by meta."""
    guard = NameGuard()
    resync(guard, service)
    assert is_of_a_registrar(service)
    assert statuses(guard, "shared") == [NameStatus.FREE]


@pytest.mark.parametrize(
    "service",
    [
        make_service("web", {"cluster": "lab"}),
        make_service("pod--a--b"),
        make_service("pod--a--b", {"cluster": "lab", "managed_by": "consul-k8s"}),
    ],
    ids=["odd ID", "no meta", "another tool"],
)
def test_service_that_no_registrar_wrote_is_told_by_its_meta(service: Service) -> None:
    """An ID that looks like a Pod's proves nothing."""
    assert not is_of_a_registrar(service)


async def test_name_is_looked_up_once_in_the_whole_catalog() -> None:
    """Until the next resync, and only for kinds whose names are not the default."""
    catalog = Catalog("taken")
    guard = NameGuard(catalog.is_name_taken, checked=PODS_CHECKED)
    assert statuses(guard, "taken", "free") == [NameStatus.UNCHECKED] * 2
    assert guard.names.status(Kind.NODE, "taken") is NameStatus.FREE
    for name in ("taken", "free", "free", "FREE"):
        await guard.check(name)
    assert (statuses(guard, "taken", "free"), catalog.asked) == (
        [NameStatus.TAKEN, NameStatus.FREE],
        ["taken", "free"],
    )
    resync(guard)
    assert statuses(guard, "taken", "free") == [NameStatus.UNCHECKED] * 2


async def test_name_that_our_node_shows_as_taken_needs_no_look() -> None:
    """It is taken already."""
    guard = NameGuard(Catalog().is_name_taken, checked=PODS_CHECKED)
    resync(guard, foreign("web"))
    assert statuses(guard, "web") == [NameStatus.TAKEN]


@pytest.mark.parametrize("error", [ConsulForbidden("no"), ConsulFiltered("in part"), ConsulRefused("no")])
async def test_name_that_may_not_be_looked_up_is_judged_by_our_node(
    error: ConsulError, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one warning, however many names there are."""
    catalog = Catalog()
    catalog.problem = error
    reporter = Reporter(RegistrarMetrics(CollectorRegistry()), RegistrarStatus())
    guard = NameGuard(catalog.is_name_taken, checked=PODS_CHECKED, unchecked=reporter.names_unchecked)
    for name in ("one", "two", "one"):
        await guard.check(name)
    assert statuses(guard, "one", "two") == [NameStatus.FREE] * 2
    resync(guard, foreign("one"))
    await guard.check("two")
    assert statuses(guard, "one", "two") == [NameStatus.TAKEN, NameStatus.FREE]
    assert _count(capsys.readouterr(), "cannot be checked") == 1


@pytest.mark.parametrize("error", [ConsulUnreachable("down"), ConsulBusy("no leader")])
async def test_name_stays_unchecked_while_consul_is_unavailable(error: ConsulError) -> None:
    """An outage is no answer: nothing is written under the name until there is one."""
    catalog = Catalog("taken")
    catalog.problem = error
    guard = NameGuard(catalog.is_name_taken, checked=PODS_CHECKED)
    with pytest.raises(type(error)):
        await guard.check("taken")
    assert statuses(guard, "taken") == [NameStatus.UNCHECKED]
    catalog.problem = None
    await guard.check("taken")
    assert statuses(guard, "taken") == [NameStatus.TAKEN]


async def test_name_guard_without_a_look_goes_by_our_node() -> None:
    """Nothing is unchecked."""
    guard = NameGuard(checked=PODS_CHECKED)
    await guard.check("web")
    assert statuses(guard, "web") == [NameStatus.FREE]


def test_name_is_compared_as_consul_does() -> None:
    """Case does not count."""
    assert comparable_name("Web-1") == comparable_name("wEB-1")
    assert comparable_name("web-1") != comparable_name("web_1")


def _count(captured: Iterable[str], text: str) -> int:
    return sum(part.count(text) for part in captured)
