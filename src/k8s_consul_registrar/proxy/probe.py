"""Questions that are put to the proxy from outside: does it answer at a Node, and does it serve Pods."""

import asyncio
import os
import random
from collections.abc import Collection
from typing import NamedTuple

import aiohttp

from k8s_consul_registrar.proxy.refusals import UNAUTHORIZED, UNAUTHORIZED_WITH_PODS
from k8s_consul_registrar.proxy.routes import NO_PODS, PODS_UNKNOWN, UNKNOWN_PATH, UNKNOWN_POD
from k8s_consul_registrar.targets.scrape_config import url_host
from k8s_consul_registrar.tls import KUBELET, Cause, Trust, explain

# Connections of one question about Pods. Behind a NodePort each may lead to another replica of the proxy, so that
# one which serves no Pods yet is met.
CONNECTIONS = 5
NO_POD = "/api/v1/namespaces/0/pods/0/metrics/16"  # a Pod "0" with sixteen scrapes of one port
LONGEST_BODY = 1024
_UNVERIFIED = Trust(is_verified=False)  # nothing secret is sent


class ProbeAnswer(NamedTuple):
    """An answer from a port of a Node."""

    status: int
    body: bytes

    def says(self, reason: str) -> bool:
        """Return True if the answer gives this reason."""
        return reason.encode() in self.body


# The refusals of a proxy that is asked for a Pod, and what is wrong with it. The first that fits counts.
_KNOWN = (
    (UNKNOWN_POD, ""),
    (UNAUTHORIZED_WITH_PODS, ""),
    (NO_PODS, "is a proxy that relays no Pods"),
    (UNAUTHORIZED, "is a proxy that relays no Pods, or an earlier version of it"),
    (PODS_UNKNOWN, "is a proxy that does not know the Pods yet"),
)
# Of a proxy that wants a certificate before it answers anything.
WANTS_CERTIFICATE = ProbeAnswer(401, b"")


async def ask(
    address: str, port: int, target: str, seconds: float, scheme: str = "http"
) -> ProbeAnswer | str:
    """Return the answer to a request without credentials, or the reason why there is none."""
    try:
        async with (
            asyncio.timeout(seconds),
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False) as session,
            session.get(
                f"{scheme}://{url_host(address)}:{port}{target}",
                ssl=_UNVERIFIED.context,
                allow_redirects=False,
            ) as response,
        ):
            return ProbeAnswer(response.status, await response.content.read(LONGEST_BODY))
    except TimeoutError:
        return f"does not answer within {seconds:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        explanation = explain(error, KUBELET)
        if explanation is not None:
            wants = explanation.cause is Cause.OUR_CERTIFICATE
            return WANTS_CERTIFICATE if wants else explanation.problem
        if isinstance(error, aiohttp.ClientConnectorError):
            return f"cannot be reached: {os_reason(error)}"
        return f"breaks off: {type(error).__name__}"


def os_reason(error: aiohttp.ClientConnectorError) -> str:
    """Return the system's words for a failed connection."""
    number = error.os_error.errno
    return os.strerror(number).lower() if number else str(error.os_error)[:200]


async def proxy_problem(address: str, port: int, seconds: float, scheme: str = "http") -> str:
    """Return why Prometheus does not reach the proxy there, empty if it does.

    The path is one that the proxy never serves: its refusal proves that it is the proxy.
    """
    answer = await ask(address, port, "/", seconds, scheme)
    if isinstance(answer, str):
        return answer
    is_proxy = (answer.status == 404 and answer.says(UNKNOWN_PATH.reason)) or answer.status == 401
    return "" if is_proxy else _stranger(answer)


async def relays_kubelet(address: str, port: int, kubelet: str, seconds: float, scheme: str = "http") -> bool:
    """Return True if whatever answers there relays the metrics of a kubelet (`address:port`)."""
    answer = await ask(address, port, f"/api/v1/nodes/{kubelet}/metrics/cadvisor", seconds, scheme)
    return isinstance(answer, ProbeAnswer) and answer.status == 200 and answer.body.startswith(b"# ")


async def pods_problem(places: Collection[tuple[str, int]], seconds: float, scheme: str = "http") -> str:
    """Return why Prometheus would not reach Pods through the proxy, empty if it would.

    One place that answers is enough, since a Node may be down, but none may be found that serves no Pods. Of a
    proxy that wants client certificates only that much is seen.
    """
    distinct = random.sample(list(places), min(len(places), CONNECTIONS))
    asked = [distinct[number % len(distinct)] for number in range(CONNECTIONS)]
    answers = await asyncio.gather(*(ask(*place, NO_POD, seconds, scheme) for place in asked))
    named = [
        (f"{url_host(address)}:{port}", answer)
        for (address, port), answer in zip(asked, answers, strict=True)
    ]
    reached = [(place, answer) for place, answer in named if isinstance(answer, ProbeAnswer)]
    unfit = [f"{place} {problem}" for place, answer in reached if (problem := _pods_problem(answer))]
    if unfit:
        return unfit[0]
    return "" if reached else "{} {}".format(*named[0])


def _pods_problem(answer: ProbeAnswer) -> str:
    if answer is WANTS_CERTIFICATE:
        return ""
    known = (
        problem
        for refusal, problem in _KNOWN
        if answer.status == refusal.status and answer.says(refusal.reason)
    )
    return next(known, _stranger(answer))


def _stranger(answer: ProbeAnswer) -> str:
    return f"answers {answer.status}, and not as the proxy does (the original program's may still run)"
