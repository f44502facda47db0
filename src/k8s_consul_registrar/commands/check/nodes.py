"""Checks of the kubelets that the proxy scrapes, and of its own NodePort."""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import NamedTuple

import aiohttp

from k8s_consul_registrar.commands.check.cluster import ClusterView
from k8s_consul_registrar.commands.check.report import Finding, fail, ok, skipped, warn
from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.model import Kind, Node
from k8s_consul_registrar.proxy.nodes import is_dialable, usable_addresses
from k8s_consul_registrar.proxy.probe import (
    ProbeAnswer,
    ask,
    os_reason,
    pods_problem,
    proxy_problem,
    relays_kubelet,
)
from k8s_consul_registrar.proxy.routes import CLOSED_PATH
from k8s_consul_registrar.settings.proxy import ProxySettings
from k8s_consul_registrar.targets.scrape_config import kubelet_address, parse_ip, url_host
from k8s_consul_registrar.tls import KUBELET, Cause, Explanation, Trust, explain
from k8s_consul_registrar.wiring.proxy import KubeletIdentity
from k8s_consul_registrar.wiring.registrar import Wiring

SAMPLE = 5
PATH = "/metrics/cadvisor"
NODE_PORT = "node port"
NODE_PATHS = "node paths"
PODS = "pods through the proxy"
NOWHERE = "/api/v1/nodes/0.0.0.0:1"  # no Node has this address
NO_TOKEN = warn(
    "kubelet token",
    "the credentials have no bearer token, which is what kubelets are shown",
    "use a service account or a kubeconfig with a token; a client certificate is not shown to kubelets",
)
NO_AGREEMENT = (
    "the port is reached: the kubelet's log says why it ended the handshake; its tlsMinVersion and tlsCipherSuites "
    "must allow TLS 1.2 or 1.3"
)
UNVERIFIED = (
    "another machine with the Node's address could read the token: set KUBELET_CA_FILE and not "
    "KUBELET_INSECURE_SKIP_TLS_VERIFY"
)
REFUSED = {
    401: (
        "it does not accept the token",
        "the kubelet needs webhook authentication (authentication.webhook.enabled), the proxy a valid token",
    ),
    403: (
        "our account may not read it",
        (
            'grant verbs ["get"] on resources ["nodes/metrics"] in the ClusterRole of our account '
            "(deploy/rbac.yaml); nodes/proxy is never needed"
        ),
    ),
}
UNREACHABLE = "may this machine reach the kubelets' port (NetworkPolicy, firewall, security groups)?"
NODE_PORT_HINT = (
    "is the proxy deployed and ready (kubectl get endpoints k8s-consul-registrar-proxy-service), is its NodePort "
    "PROXY_NODE_PORT, and does no firewall or NetworkPolicy keep this machine from it?"
)
ANOTHER_PROXY_HINT = (
    "it relays the kubelets' metrics, so Nodes are scraped; if it is the original program's, deploy/deployment-svc.yaml "
    "replaces it (docs/original-program.md)"
)
PODS_HINT = (
    "set PROXY_PODS=true for the proxy first (deploy/overlays/proxy-pods); until then services of Pods stay"
)


class Place(NamedTuple):
    """One address of one Node."""

    node: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"{url_host(self.address)}:{self.port}"


def sample(places: Iterable[Place], size: int = SAMPLE) -> list[Place]:
    """Pick some places, of each address family in turn."""
    families: dict[bool, list[Place]] = {}
    for place in places:
        families.setdefault(":" in place.address, []).append(place)
    in_turn = chain.from_iterable(zip_longest(*families.values()))
    return [place for place in in_turn if place is not None][:size]


def kubelet_places(nodes: Iterable[Node], *, allow_loopback: bool) -> list[Place]:
    """Return where the proxy would dial, the Ready Nodes first."""
    by_readiness = sorted(nodes, key=lambda node: not node.ready)
    return [
        Place(node.name, address, node.kubelet_port)
        for node in by_readiness
        for address in usable_addresses(node, allow_loopback=allow_loopback)
    ]


@dataclass(frozen=True, slots=True)
class Kubelets:
    """The proxy's way to kubelets: its TLS, the name that a certificate must hold, its token."""

    trust: Trust
    verifies_node_name: bool
    token: str = field(repr=False)
    timeout: float

    def server_name(self, place: Place) -> str:
        """Return the name that the certificate of this kubelet must hold."""
        return place.node if self.verifies_node_name else place.address

    def other_name(self, place: Place) -> str:
        """Return the name that it must hold under the other KUBELET_TLS_SERVER_NAME."""
        return place.address if self.verifies_node_name else place.node


async def check_proxied(
    settings: ProxySettings,
    cluster: Awaitable[ClusterView],
    timeout: float,  # noqa: ASYNC109 - of each request
) -> list[Finding]:
    """Check a few kubelets with the credentials and the TLS of the proxy."""
    view = await cluster
    if view.access is None:
        return [skipped("kubelets", "no credentials for them")]
    try:
        identity = KubeletIdentity(settings.kubelets, view.access)
        await identity.refresh()
        kubelets = Kubelets(
            trust=identity.trust,
            verifies_node_name=settings.kubelets.tls_server_name == "node",
            token=identity.token(),
            timeout=timeout,
        )
    except AccessError as error:
        return [fail("kubelets", str(error), "the proxy reads it: is it mounted in its Pod, and readable?")]
    return await check_kubelets(view.nodes, kubelets, allow_loopback=settings.allow_loopback)


async def check_kubelets(nodes: Sequence[Node], kubelets: Kubelets, *, allow_loopback: bool) -> list[Finding]:
    """Scrape a few kubelets as the proxy would."""
    if not nodes:
        return [skipped("kubelets", "no Node is known")]
    places = kubelet_places(nodes, allow_loopback=allow_loopback)
    if not places:
        hint = (
            "link-local, multicast and unspecified addresses never are; loopback only with "
            "PROXY_ALLOW_LOOPBACK=true"
        )
        return [fail("kubelets", "no Node has an address that may be dialled", hint)]
    findings = [*await asyncio.gather(*(_check(place, kubelets) for place in sample(places)))]
    if not kubelets.token:
        findings.insert(0, NO_TOKEN)
    return findings


async def _check(place: Place, kubelets: Kubelets) -> Finding:
    name = f"kubelet {place.node}"
    try:
        async with asyncio.timeout(kubelets.timeout):
            status = await _scrape(place, kubelets)
    except TimeoutError:
        return fail(name, f"{place}: no answer within {kubelets.timeout:g} s", UNREACHABLE)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        explanation = explain(error, KUBELET, kubelets.trust.context, trusted=kubelets.trust.source)
        if explanation is not None:
            remedy = await _other_name(place, kubelets, explanation) or explanation.remedy
            return fail(name, f"{place}: {explanation.problem}", remedy or NO_AGREEMENT)
        if isinstance(error, aiohttp.ClientConnectorError):
            return fail(name, f"{place} cannot be reached: {os_reason(error)}", UNREACHABLE)
        return fail(name, f"{place}: {type(error).__name__}: {str(error)[:200]}", UNREACHABLE)
    return _judge_status(name, place, status, is_verified=kubelets.trust.is_verified)


async def _scrape(place: Place, kubelets: Kubelets) -> int:
    """Return the status of one scrape; its body is not read."""
    headers = {"Authorization": f"Bearer {kubelets.token}"} if kubelets.token else {}
    async with (
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False) as session,
        session.get(
            f"https://{place}{PATH}",
            headers=headers,
            ssl=kubelets.trust.context,
            server_hostname=kubelets.server_name(place),
            allow_redirects=False,
        ) as response,
    ):
        response.close()
        return response.status


def _judge_status(name: str, place: Place, status: int, *, is_verified: bool) -> Finding:
    if status == 200 and is_verified:
        return ok(name, f"{place} serves {PATH}, its certificate is verified")
    if status == 200:
        return warn(name, f"{place} serves {PATH}, its certificate is not verified", UNVERIFIED)
    problem, hint = REFUSED.get(status, ("it does not serve " + PATH, "is this a kubelet's port?"))
    return fail(name, f"{place} answers {status}: {problem}", hint)


async def _other_name(place: Place, kubelets: Kubelets, explanation: Explanation) -> str:
    """Return the remedy for a certificate that names the kubelet the other way; no token is sent to find out."""
    if explanation.cause is not Cause.OTHER_NAME:
        return ""
    wanted = kubelets.other_name(place)
    if not await _is_verifiable(place, kubelets, wanted):
        return ""
    other = "ip" if kubelets.verifies_node_name else "node"
    return f"set KUBELET_TLS_SERVER_NAME={other}: the certificate names {wanted}"


async def _is_verifiable(place: Place, kubelets: Kubelets, server_name: str) -> bool:
    """Return True if a handshake under another name succeeds."""
    try:
        async with asyncio.timeout(kubelets.timeout):
            _, writer = await asyncio.open_connection(
                place.address, place.port, ssl=kubelets.trust.context, server_hostname=server_name
            )
    except (OSError, TimeoutError, ValueError):
        return False
    writer.transport.abort()
    return True


async def check_node_port(wiring: Wiring, cluster: Awaitable[ClusterView]) -> list[Finding]:
    """Ask a few Nodes for a path that the proxy never serves: its refusal proves that it is the proxy."""
    settings, nodes = wiring.settings, (await cluster).nodes
    if Kind.NODE not in settings.selection.kinds:
        return []
    port = settings.proxy_node_port
    places = [
        Place(node.name, address, port)
        for node in sorted(nodes, key=lambda node: not node.ready)
        if (address := kubelet_address(node, settings.common.node_ip_family)) and _may_be_asked(address)
    ]
    if not places:
        return [skipped(NODE_PORT, "no Node is known that could be asked")]
    asked = sample(places)
    seconds, scheme = wiring.timing.connect_timeout, settings.proxy_scheme
    problems = await asyncio.gather(*(proxy_problem(one.address, port, seconds, scheme) for one in asked))
    failed = [f"{place} {problem}" for place, problem in zip(asked, problems, strict=True) if problem]
    if failed and await _is_relayed_by_another(wiring, asked, nodes):
        return [warn(NODE_PORT, "; ".join(failed), ANOTHER_PROXY_HINT)]
    if failed:
        finding = fail if len(failed) == len(asked) else warn
        return [finding(NODE_PORT, "; ".join(failed), NODE_PORT_HINT)]
    reached = ok(NODE_PORT, f"the proxy answers on port {port} of {', '.join(one.node for one in asked)}")
    return [reached, *await _check_node_paths(wiring, asked[0]), *await _check_pods(wiring, asked)]


async def _is_relayed_by_another(wiring: Wiring, asked: Sequence[Place], nodes: Sequence[Node]) -> bool:
    """Return True if what answers on each of these ports relays the Node's kubelet, as the original's proxy does."""
    kubelet_ports = {node.name: node.kubelet_port for node in nodes}
    seconds, scheme = wiring.timing.connect_timeout, wiring.settings.proxy_scheme
    answers = [
        relays_kubelet(
            place.address,
            place.port,
            f"{url_host(place.address)}:{kubelet_ports[place.node]}",
            seconds,
            scheme,
        )
        for place in asked
    ]
    return all(await asyncio.gather(*answers))


async def _check_pods(wiring: Wiring, asked: Iterable[Place]) -> list[Finding]:
    """Ask whether the proxy serves Pods, where they are to be scraped through it."""
    settings = wiring.settings
    if not settings.pods_through_proxy:
        return []
    places = [(one.address, one.port) for one in asked]
    problem = await pods_problem(places, wiring.timing.connect_timeout, settings.proxy_scheme)
    if problem:
        return [fail(PODS, problem, PODS_HINT)]
    return [ok(PODS, "the proxy serves Pods")]


async def _check_node_paths(wiring: Wiring, place: Place) -> list[Finding]:
    """Ask the proxy for each path of NODE_PATHS of a Node that cannot exist: it refuses a path before a Node."""
    paths = wiring.settings.selection.node_paths
    asked = sorted({*paths.linux, *paths.windows} - {PATH})
    seconds, scheme = wiring.timing.connect_timeout, wiring.settings.proxy_scheme
    answers = [await ask(place.address, place.port, f"{NOWHERE}{path}", seconds, scheme) for path in asked]
    closed = [
        path
        for path, answer in zip(asked, answers, strict=True)
        if isinstance(answer, ProbeAnswer) and answer.says(CLOSED_PATH.reason)
    ]
    if closed:
        return [
            fail(
                NODE_PATHS, f"the proxy does not relay {', '.join(closed)}", f"PROXY_PATHS={','.join(asked)}"
            )
        ]
    is_known = all(isinstance(answer, ProbeAnswer) and answer.status == 404 for answer in answers)
    return [ok(NODE_PATHS, f"the proxy relays {', '.join(asked)} too")] if asked and is_known else []


def _may_be_asked(address: str) -> bool:
    parsed = parse_ip(address)
    return parsed is not None and is_dialable(parsed, allow_loopback=True)
