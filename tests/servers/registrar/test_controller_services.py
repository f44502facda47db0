"""Endpoints of Services by the running controller: departures, resharded slices, absences and the brake."""

import asyncio

import pytest

from k8s_consul_registrar.model import MANAGED_BY, Service, SliceEndpoint
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.desired import GRACE
from support.builders import make_kube_service, make_pod, make_service, make_slice
from support.controller_lab import HELD, ControllerLab
from support.memory import PODS, SERVICES, SLICES
from support.waiting import unless_late

on_both = pytest.mark.parametrize("checks_versions", [True, False], ids=["catalog", "agent"])
SOURCES = (PODS, SERVICES, SLICES)
POINTS = [SliceEndpoint(f"198.51.100.{number}", pod=f"web-{number}") for number in range(1, 9)]
STRICT = BrakeRules(confirm=60, confirm_start=60)


def service_id(point: SliceEndpoint) -> str:
    """Return the ID of the endpoint's service."""
    return f"svc--shop--web--{point.pod}--9102"


def ids_of(*points: SliceEndpoint) -> set[str]:
    """Return the IDs of the services of some endpoints."""
    return {service_id(point) for point in points}


def our_endpoint(point: SliceEndpoint) -> Service:
    """Return what an earlier run wrote for an endpoint."""
    meta = {"cluster": "lab", "managed_by": MANAGED_BY, "kind": "endpoint", "namespace": "shop"}
    return make_service(service_id(point), {**meta, "service": "web", "pod": point.pod})


def lab_of(*, checks_versions: bool, brake: BrakeRules = HELD) -> ControllerLab:
    """Return a lab that follows Pods, Services and slices; none of them is listed yet."""
    return ControllerLab(checks_versions=checks_versions, sources=SOURCES, brake=brake)


def put_lists(lab: ControllerLab, *points: SliceEndpoint) -> None:
    """Complete the lists of a Service with these endpoints, in slices of two."""
    lab.cluster.put_list([], PODS)
    lab.cluster.put_list([make_kube_service()], SERVICES)
    pairs = [points[at : at + 2] for at in range(0, len(points), 2)]
    lab.cluster.put_list([make_slice(f"web-{at}", *pair) for at, pair in enumerate(pairs)], SLICES)


async def holds(lab: ControllerLab, *points: SliceEndpoint) -> None:
    """Wait until Consul holds these endpoints and nothing else."""
    await lab.until_so(lambda: set(lab.consul.held) == ids_of(*points))


@on_both
async def test_endpoints_come_and_go_with_their_slices(checks_versions: bool) -> None:
    """Endpoints are registered from the first list, and removed by an event after the grace."""
    lab = lab_of(checks_versions=checks_versions)
    put_lists(lab, *POINTS)
    async with lab.running():
        await holds(lab, *POINTS)
        lab.cluster.put(make_slice("web-0", POINTS[1]))
        await holds(lab, *POINTS[1:])
    assert lab.value("brake_held_services") == 0


@on_both
async def test_resharded_slices_write_nothing(checks_versions: bool) -> None:
    """Endpoints that are in other slices a moment later are neither removed nor written again."""

    async def attempt(_: int) -> None:
        lab = lab_of(checks_versions=checks_versions)
        put_lists(lab, *POINTS)
        async with lab.running():
            await holds(lab, *POINTS)
            writes = len(lab.consul.writes)
            for at in range(4):
                lab.cluster.remove(make_slice(f"web-{at}", *POINTS[2 * at : 2 * at + 2]))
            await asyncio.sleep(GRACE / 4)
            lab.cluster.put(make_slice("web-new", *POINTS))
            await asyncio.sleep(GRACE * 1.5)
            assert set(lab.consul.held) == ids_of(*POINTS)
            assert len(lab.consul.writes) == writes

    await unless_late(attempt, by=GRACE / 2)


@on_both
async def test_services_that_a_list_of_slices_lacks_wait_for_the_brake(checks_versions: bool) -> None:
    """A stale or empty list of slices after a start is a mass removal, and held."""
    lab = lab_of(checks_versions=checks_versions, brake=STRICT)
    for point in POINTS:
        lab.consul.put_by_hand(our_endpoint(point))
    async with lab.running():
        lab.cluster.put_list([], PODS)
        lab.cluster.put_list([make_kube_service()], SERVICES)
        lab.cluster.put_list([], SLICES)
        await lab.until_so(lambda: lab.value("brake_held_services") == len(POINTS))
        assert set(lab.consul.held) == ids_of(*POINTS)


@on_both
async def test_few_absent_endpoints_go_once_a_read_confirms_them(checks_versions: bool) -> None:
    """One of eight is no mass removal: a read of the Service and its slices shows it gone."""
    lab = lab_of(checks_versions=checks_versions, brake=STRICT)
    for point in POINTS:
        lab.consul.put_by_hand(our_endpoint(point))
    async with lab.running():
        put_lists(lab, *POINTS[1:])
        await holds(lab, *POINTS[1:])
    assert [key.kind for key in lab.cluster.reads] == ["endpoint"]


@on_both
async def test_endpoint_that_exists_stays_though_the_list_lacks_it(checks_versions: bool) -> None:
    """A list that was wrong is read again, and the service stays."""
    lab = lab_of(checks_versions=checks_versions, brake=STRICT)
    for point in POINTS:
        lab.consul.put_by_hand(our_endpoint(point))
    async with lab.running():
        put_lists(lab, *POINTS[1:])
        lab.cluster.objects[make_slice("web-9").key] = make_slice("web-9", POINTS[0])
        await lab.until_so(lambda: any(source == SLICES for source, _ in lab.cluster.relists))
        assert set(lab.consul.held) == ids_of(*POINTS)


@on_both
async def test_pod_takes_over_from_its_endpoint(checks_versions: bool) -> None:
    """The Pod's service is registered before that of its endpoint is removed."""
    lab = lab_of(checks_versions=checks_versions)
    put_lists(lab, POINTS[0])
    async with lab.running():
        await holds(lab, POINTS[0])
        lab.cluster.put(make_pod("web-1", ip=POINTS[0].address))
        await lab.until_so(lambda: set(lab.consul.held) == {"pod--shop--web-1"})
        assert [one for _, one in lab.consul.writes][-2:] == ["pod--shop--web-1", service_id(POINTS[0])]
        assert dict(lab.consul.held["pod--shop--web-1"].meta)["service"] == "web"


@on_both
async def test_source_of_services_that_fails_keeps_every_endpoint(checks_versions: bool) -> None:
    """Without the list of Services nothing of an endpoint is proven, whatever the slices show."""
    lab = lab_of(checks_versions=checks_versions, brake=BrakeRules(allow_mass=True))
    for point in POINTS:
        lab.consul.put_by_hand(our_endpoint(point))
    async with lab.running():
        lab.cluster.put_list([], PODS)
        lab.cluster.put_list([], SLICES)
        lab.cluster.store.fail(SERVICES, "cannot list services: grant list on services", "forbidden")
        await lab.until_so(lambda: lab.value("kept_services", why="blind") == len(POINTS))
        assert set(lab.consul.held) == ids_of(*POINTS)
    assert "grant list on services" in lab.status.readiness()
