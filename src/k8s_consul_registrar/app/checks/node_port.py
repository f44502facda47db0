"""The NodePort: does the proxy answer where the registrar says that Nodes are scraped."""

import asyncio
from collections.abc import Sequence

import aiohttp

from k8s_consul_registrar.app.checks.finding import Finding, fail, ok, skipped, warn
from k8s_consul_registrar.app.checks.kubelets import Place, os_reason, sample
from k8s_consul_registrar.model import Node
from k8s_consul_registrar.proxy.nodes import is_dialable
from k8s_consul_registrar.proxy.route import UNKNOWN_PATH
from k8s_consul_registrar.targets.scrape_config import node_address, parse_ip

NAME = "node port"
LONGEST_BODY = 1024
HINT = (
    "is the proxy deployed and ready (kubectl get endpoints k8s-consul-registrar-proxy-service), is its NodePort "
    "PROXY_NODE_PORT, and does no firewall or NetworkPolicy keep this machine from it?"
)


async def check_node_port(nodes: Sequence[Node], port: int, timeout: float) -> Finding:  # noqa: ASYNC109 - for each request
    """Ask the proxy on a few Nodes' addresses for something it never serves, and know it by its answer."""
    places = [
        Place(node.name, address, port)
        for node in sorted(nodes, key=lambda node: not node.ready)
        if (address := node_address(node)) and _may_be_asked(address)
    ]
    if not places:
        return skipped(NAME, "no Node is known that could be asked")
    asked = sample(places)
    problems = await asyncio.gather(*(_problem(place, timeout) for place in asked))
    failed = [f"{place} {problem}" for place, problem in zip(asked, problems, strict=True) if problem]
    if not failed:
        return ok(NAME, f"the proxy answers on port {port} of {', '.join(place.node for place in asked)}")
    finding = fail if len(failed) == len(asked) else warn
    return finding(NAME, "; ".join(failed), HINT)


def _may_be_asked(address: str) -> bool:
    parsed = parse_ip(address)
    return parsed is not None and is_dialable(parsed, allow_loopback=True)


async def _problem(place: Place, seconds: float) -> str:
    """Return what keeps a scraper from the proxy there, empty for nothing."""
    try:
        async with (
            asyncio.timeout(seconds),
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False) as session,
            session.get(f"http://{place}/", allow_redirects=False) as response,
        ):
            body = await response.content.read(LONGEST_BODY)
            status = response.status
    except TimeoutError:
        return f"does not answer within {seconds:g} s"
    except aiohttp.ClientConnectorError as error:
        return f"cannot be reached: {os_reason(error)}"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return f"breaks off: {type(error).__name__}"
    is_proxy = (status, UNKNOWN_PATH.reason.encode() in body) == (404, True) or status == 401
    return "" if is_proxy else f"answers {status}, and not as the proxy does"
