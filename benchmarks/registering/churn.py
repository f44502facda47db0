"""Changes of Pods at a steady rate, and the time until each shows in Consul's health endpoint."""

import asyncio
import ipaddress
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import aiohttp
import msgspec

from k8s_consul_registrar.sandbox.synthetic import APPS, synthetic_pod
from registering.observing import session_with
from registering.processes import BenchmarkError
from registering.stage import NODES, Api

_FIRST_IP = int(ipaddress.IPv4Address("127.96.0.1"))
_IPS = 1 << 21
_MERGE_PATCH = {"Content-Type": "application/merge-patch+json"}
_LONGEST = 180.0  # seconds after which an unseen change ends the measurement
_POLL = 0.01  # seconds
_COLLECTION = 20  # Pods deleted at once


class PodName(NamedTuple):
    """A Pod and what it is called in Consul."""

    namespace: str
    name: str

    @property
    def service(self) -> str:
        """The name and the ID of its service."""
        return f"pod--{self.namespace}--{self.name}"

    @property
    def path(self) -> str:
        """Where the API server has it."""
        return f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"


class Change(NamedTuple):
    """One change: when it was sent, answered by the API server, and seen in Consul, all monotonic."""

    sent: float
    answered: float
    seen: float


@dataclass(slots=True)
class Churn:
    """Results of the changes.

    A change's delay counts from before it is sent to the API server until Consul's answer to a blocking query
    on the service is read here.
    """

    changes: list[Change] = field(default_factory=list)
    seconds: float = 0.0

    def percentile(self, percent: float, *, windows: Sequence[tuple[float, float]] = ()) -> float:
        """Return a percentile of the delays, of changes sent within the windows if any are given."""
        return _percentile([one.seen - one.sent for one in self._within(windows)], percent)

    def percentile_behind(self, percent: float, *, windows: Sequence[tuple[float, float]] = ()) -> float:
        """Return a percentile of the delays after the API server's answer."""
        return _percentile([max(0.0, one.seen - one.answered) for one in self._within(windows)], percent)

    def count(self, windows: Sequence[tuple[float, float]]) -> int:
        """Return how many changes were sent within the windows."""
        return len(self._within(windows))

    def _within(self, windows: Sequence[tuple[float, float]]) -> list[Change]:
        if not windows:
            return self.changes
        return [one for one in self.changes if any(begin <= one.sent <= end for begin, end in windows)]


def _percentile(values: list[float], percent: float) -> float:
    if not values:
        raise BenchmarkError("no change fell into the time that is measured")
    return sorted(values)[min(int(len(values) * percent / 100), len(values) - 1)]


def annotated_pods(count: int) -> list[PodName]:
    """Return those of the sandbox's synthetic Pods that ask for scrapes."""
    return [pod_name(number) for number in range(count) if is_annotated(number)]


def is_annotated(number: int) -> bool:
    """Return whether a synthetic Pod asks for scrapes."""
    return number % 5 != 4


def pod_name(number: int) -> PodName:
    """Return the name of a synthetic Pod."""
    metadata = synthetic_pod(number, NODES)["metadata"]
    return PodName(metadata["namespace"], metadata["name"])


async def churn(api: Api, consul: str, pods: Sequence[PodName], *, rate: float, seconds: float) -> Churn:
    """Give one Pod after the other another IP, `rate` times a second, whether or not earlier ones are seen."""
    result = Churn()
    loop = asyncio.get_running_loop()
    async with api.session() as kube, session_with(consul) as session, asyncio.TaskGroup() as group:
        began = loop.time()
        for number, pod in enumerate(_cycle(pods, int(rate * seconds))):
            await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
            group.create_task(_measure(kube, session, pod, next_address(api), result))
        await asyncio.sleep(max(0.0, began + seconds - loop.time()))
        result.seconds = loop.time() - began
    return result


async def change_only(api: Api, pods: Sequence[PodName], *, rate: float, seconds: float) -> int:
    """Change Pods as `churn` does without a look at Consul; return how many."""
    loop = asyncio.get_running_loop()
    count = int(rate * seconds)
    async with api.session() as kube:
        began = loop.time()
        for number, pod in enumerate(_cycle(pods, count)):
            await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
            await patch_address(kube, pod, next_address(api))
        await asyncio.sleep(max(0.0, began + seconds - loop.time()))
    return count


async def create_pod(kube: aiohttp.ClientSession, number: int) -> PodName:
    """Create a synthetic Pod as a scheduler and a kubelet would: first the Pod, then its status."""
    pod = synthetic_pod(number, NODES)
    name = PodName(pod["metadata"]["namespace"], pod["metadata"]["name"])
    collection = f"/api/v1/namespaces/{name.namespace}/pods"
    async with kube.post(collection, data=msgspec.json.encode(pod)) as answer:
        await _require_ok(answer)
    await _patch(kube, name, pod["status"])
    return name


async def delete_pods(api: Api, pods: Sequence[PodName], *, rate: float, in_flight: int = 16) -> None:
    """Delete Pods without grace, at most `rate` a second."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    left = iter(enumerate(pods))
    async with api.session() as kube, asyncio.TaskGroup() as group:

        async def delete() -> None:
            for number, pod in left:
                await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
                async with kube.delete(pod.path, params={"gracePeriodSeconds": "0"}) as answer:
                    await _require_ok(answer)

        for _ in range(in_flight):
            group.create_task(delete())


async def delete_namespaces(api: Api, namespaces: Sequence[str], *, rate: float, size: int) -> None:
    """Delete all synthetic Pods of namespaces of `size` Pods, by collections of some twenty, `rate` Pods a second.

    A request for each Pod would keep the API server and the benchmark busier than the registrar.
    """
    slices = max(1, size // _COLLECTION)
    apps = [[f"app-{number}" for number in range(at, APPS, slices)] for at in range(slices)]
    pairs = [(namespace, chosen) for namespace in namespaces for chosen in apps]
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with api.session() as kube:
        for number, (namespace, chosen) in enumerate(pairs):
            await asyncio.sleep(max(0.0, began + number * (size / slices) / rate - loop.time()))
            params = {"labelSelector": f"app in ({','.join(chosen)})", "gracePeriodSeconds": "0"}
            async with kube.delete(f"/api/v1/namespaces/{namespace}/pods", params=params) as answer:
                await _require_ok(answer)


async def until_at_agent(session: aiohttp.ClientSession, service: str) -> float:
    """Wait until an agent has a service; return when, monotonic."""
    async with asyncio.timeout(_LONGEST):
        while True:
            async with session.get(f"/v1/agent/service/{service}") as answer:
                await answer.read()
                if answer.status == 200:
                    return time.monotonic()
            await asyncio.sleep(_POLL)


async def patch_address(kube: aiohttp.ClientSession, pod: PodName, address: str) -> None:
    """Give a Pod another IP."""
    await _patch(kube, pod, {"podIP": address, "podIPs": [{"ip": address}]})


def next_address(api: Api) -> str:
    """Return an IP that no Pod of this API server has had."""
    return str(ipaddress.IPv4Address(_FIRST_IP + next(api.numbers) % _IPS))


def _cycle(pods: Sequence[PodName], count: int) -> Iterator[PodName]:
    return (pods[number % len(pods)] for number in range(count))


async def _measure(
    kube: aiohttp.ClientSession, consul: aiohttp.ClientSession, pod: PodName, address: str, result: Churn
) -> None:
    """Make one change and see it in Consul."""
    index, _ = await _read(consul, pod, "")
    seeing = asyncio.create_task(_see(consul, pod, index, address))
    await asyncio.sleep(0.005)  # so that the blocking query is there before the change
    sent = time.monotonic()
    await patch_address(kube, pod, address)
    answered = time.monotonic()
    try:
        seen = await asyncio.wait_for(seeing, _LONGEST)
    except TimeoutError:
        raise BenchmarkError(f"{pod.service} was not changed within {_LONGEST:.0f} s") from None
    result.changes.append(Change(sent, answered, seen))


async def _see(consul: aiohttp.ClientSession, pod: PodName, index: str, address: str) -> float:
    while True:
        index, addresses = await _read(consul, pod, index)
        if addresses == [address]:
            return time.monotonic()


class _Address(msgspec.Struct, rename="pascal"):
    address: str


class _Instance(msgspec.Struct, rename="pascal"):
    service: _Address


_instances = msgspec.json.Decoder(list[_Instance])


async def _read(consul: aiohttp.ClientSession, pod: PodName, index: str) -> tuple[str, list[str]]:
    params = {"index": index, "wait": "30s"} if index else {}
    async with consul.get(f"/v1/health/service/{pod.service}", params=params) as answer:
        body = await answer.read()
        return answer.headers["X-Consul-Index"], [one.service.address for one in _instances.decode(body)]


async def _patch(kube: aiohttp.ClientSession, pod: PodName, status: dict[str, object]) -> None:
    body = msgspec.json.encode({"status": status})
    async with kube.patch(f"{pod.path}/status", data=body, headers=_MERGE_PATCH) as answer:
        await _require_ok(answer)


async def _require_ok(answer: aiohttp.ClientResponse) -> None:
    if answer.status >= 300:
        raise BenchmarkError(f"{answer.method} {answer.url}: {answer.status} {await answer.text()}")
    await answer.read()
