"""Changes Pods at a steady rate, and tells how long each change takes to show in Consul's health endpoint."""

import asyncio
import ipaddress
import time
from dataclasses import dataclass, field

import aiohttp
import msgspec

from registering.stage import Api

_FIRST_IP = int(ipaddress.IPv4Address("127.96.0.1"))
_MERGE_PATCH = "application/merge-patch+json"
# A change that is not seen for so long, in seconds, ends the benchmark.
_LONGEST = 30.0


class _Address(msgspec.Struct, rename="pascal"):
    address: str


class _Instance(msgspec.Struct, rename="pascal"):
    service: _Address


_instances = msgspec.json.Decoder(list[_Instance])


@dataclass(slots=True)
class Churn:
    """What came of it: a delay in seconds for each change, and the same without the API server's answer.

    `seen` counts from before the change is sent to the API server until Consul's answer to a blocking query
    on the service is read here; `behind` counts from when the API server's answer is read.
    """

    seen: list[float] = field(default_factory=list)
    behind: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def percentile(self, percent: float) -> float:
        """Return a percentile of `seen`, in seconds."""
        return sorted(self.seen)[min(int(len(self.seen) * percent / 100), len(self.seen) - 1)]

    def percentile_behind(self, percent: float) -> float:
        """Return a percentile of `behind`, in seconds."""
        return sorted(self.behind)[min(int(len(self.behind) * percent / 100), len(self.behind) - 1)]


async def churn(api: Api, consul: str, pods: list[tuple[str, str]], *, rate: float, seconds: float) -> Churn:
    """Give one Pod after the other another IP, `rate` times a second, whether or not earlier ones are seen.

    `pods` are namespaces and names; each is changed once at most.
    """
    result = Churn()
    loop = asyncio.get_running_loop()
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        api.session() as kube,
        aiohttp.ClientSession(f"http://{consul}", connector=connector) as session,
        asyncio.TaskGroup() as group,
    ):
        began = loop.time()
        for number, (namespace, pod) in enumerate(pods[: int(rate * seconds)]):
            await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
            address = str(ipaddress.IPv4Address(_FIRST_IP + number))
            change = _Change(kube, session, namespace, pod, address)
            group.create_task(change.measure(result))
        result.seconds = loop.time() - began
    return result


@dataclass(frozen=True, slots=True)
class _Change:
    """One Pod's new address."""

    kube: aiohttp.ClientSession
    consul: aiohttp.ClientSession
    namespace: str
    pod: str
    address: str

    async def measure(self, result: Churn) -> None:
        """Make the change and see it in Consul."""
        index, _ = await self._read("")
        seeing = asyncio.create_task(self._see(index))
        await asyncio.sleep(0.005)  # so that the blocking query is there before the change
        sent = time.perf_counter()
        await self._patch()
        answered = time.perf_counter()
        seen = await asyncio.wait_for(seeing, _LONGEST)
        result.seen.append(seen - sent)
        result.behind.append(max(0.0, seen - answered))

    async def _see(self, index: str) -> float:
        while True:
            index, addresses = await self._read(index)
            if addresses == [self.address]:
                return time.perf_counter()

    async def _read(self, index: str) -> tuple[str, list[str]]:
        params = {"index": index, "wait": "30s"} if index else {}
        path = f"/v1/health/service/pod--{self.namespace}--{self.pod}"
        async with self.consul.get(path, params=params) as answer:
            body = await answer.read()
            return answer.headers["X-Consul-Index"], [one.service.address for one in _instances.decode(body)]

    async def _patch(self) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{self.pod}/status"
        body = msgspec.json.encode({"status": {"podIP": self.address, "podIPs": [{"ip": self.address}]}})
        async with self.kube.patch(path, data=body, headers={"Content-Type": _MERGE_PATCH}) as answer:
            if answer.status != 200:
                raise RuntimeError(await answer.text())
            await answer.read()
