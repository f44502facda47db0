"""Pods through the proxy: what is asked of them, what they never see, and which of them are reached."""

import asyncio
import re

import pytest
import trustme
from hypothesis import example, given
from hypothesis import strategies as st

from k8s_consul_registrar.proxy.limits import Concurrency
from k8s_consul_registrar.proxy.nodes import KUBELET, POD, Endpoint, NodeTable
from k8s_consul_registrar.proxy.refusals import Outcome, Refusal
from k8s_consul_registrar.proxy.routes import (
    PODS_UNKNOWN,
    UNKNOWN_PATH,
    UNKNOWN_POD,
    Pods,
    Route,
    find_pod,
    proxied_pod,
    redirected,
)
from k8s_consul_registrar.tls import Trust
from support.doors import TcpProxy
from support.proxy_lab import (
    METRICS,
    POD_HOST,
    PREFIX,
    TOKEN,
    Kubelet,
    PodServer,
    Proxy,
    access,
    always,
    answer,
    cadvisor,
    declared,
    get_request,
    hang,
    known,
    parse_answer,
    pod_path,
    proxying,
    put,
    reset_on_close,
    serve_metrics,
)
from support.waiting import until

pytestmark = pytest.mark.both_loops

NOBODY = NodeTable()
TIMEOUT = "X-Prometheus-Scrape-Timeout-Seconds"
TEXT = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


async def test_pod_is_asked_what_it_is_annotated_with() -> None:
    """The Pod sees its own path and query, whatever the caller's query, and no credentials or cookies of anybody."""
    pod = PodServer()
    async with pod.serving():
        annotations = {"path": "/stats?format=a b", "param-depth": "x&y=1", "param-none": ""}
        pods = known(pod.pod(annotations=annotations))
        async with proxying(pods=access(pods)) as proxy:
            secrets = ("Authorization: Bearer the-callers-own", "Cookie: a=b", "X-Forwarded-For: 192.0.2.1")
            got = await proxy.get(f"{pod_path()}?path=/admin&format=z", "Accept: text/plain", *secrets)
    assert (got.status, got.body) == (200, METRICS)
    (request,) = pod.requests
    line, *fields = request.decode().splitlines()
    assert line == "GET /stats?depth=x%26y%3D1&format=a+b HTTP/1.1"
    named = {field.partition(":")[0] for field in fields if field}
    assert named == {"Host", "User-Agent", "Accept", TIMEOUT}
    assert f"Host: {POD_HOST}:{pod.port}" in fields


async def test_pod_never_sees_what_kubelets_are_shown() -> None:
    """The kubelet gets the token and the Pods none of it, over http and https; no connection serves both kinds."""
    kubelet, plain, secure = Kubelet(), PodServer(), PodServer(is_secure=True)
    async with kubelet.serving(), plain.serving(), secure.serving():
        pods = known(plain.pod(), secure.pod("web-2"))
        async with proxying(kubelet.node(), pods=access(pods)) as proxy:
            for _ in range(3):
                for path in (cadvisor(kubelet), pod_path(), pod_path("web-2")):
                    assert (await proxy.get(path)).status == 200
            assert proxy.server.stats().dials == 3
    assert all(TOKEN.encode() in request for request in kubelet.requests)
    for server in (plain, secure):
        assert server.connections == 1
        assert len(server.requests) == 3
        assert not [
            one for one in server.requests if b"authorization" in one.lower() or TOKEN.encode() in one
        ]


async def test_several_ports() -> None:
    """Each annotated port is reached by its number, the first without one, and no other port at all."""
    one, two, other = PodServer(), PodServer(), PodServer()
    async with one.serving(), two.serving(), other.serving():
        pods = known(one.pod(annotations={"port": f"{one.port},{two.port}"}))
        async with proxying(pods=access(pods)) as proxy:
            for path in (pod_path(), pod_path(ports=[one.port]), pod_path(ports=[two.port])):
                assert (await proxy.get(path)).status == 200
            assert (await proxy.get(pod_path(ports=[other.port]))).status == 404
    assert (len(one.requests), len(two.requests), other.connections) == (2, 1, 0)


async def test_pod_that_goes_is_gone_at_once() -> None:
    """404 with its kept connection closed; a Pod of its name comes back with a connection of its own."""
    pod = PodServer()
    async with pod.serving():
        pods = known(pod.pod())
        async with proxying(pods=access(pods)) as proxy:
            assert (await proxy.get(pod_path())).status == 200
            put(pods, pod.pod(phase="Succeeded"))
            await until(lambda: pod.open_now == 0)
            assert (await proxy.get(pod_path())).status == 404
            put(pods, pod.pod(uid="another"))
            assert (await proxy.get(pod_path())).status == 200
            assert pod.connections == 2


async def test_another_uid_closes_the_connection() -> None:
    """A Pod created again under its name and address is never asked over the connection to the old one."""
    pod = PodServer()
    async with pod.serving():
        pods = known(pod.pod())
        async with proxying(pods=access(pods)) as proxy:
            assert (await proxy.get(pod_path())).status == 200
            put(pods, pod.pod(uid="another"))
            await until(lambda: pod.open_now == 0)
            assert (await proxy.get(pod_path())).status == 200
            assert pod.connections == 2


async def test_change_of_no_concern_keeps_the_connection() -> None:
    """A label or the readiness of a Pod closes nothing."""
    pod = PodServer()
    async with pod.serving():
        pods = known(pod.pod())
        async with proxying(pods=access(pods)) as proxy:
            for ready in (True, False):
                put(pods, pod.pod(ready=ready, labels={"a": str(ready)}))
                assert (await proxy.get(pod_path())).status == 200
    assert pod.connections == 1


async def test_scrape_under_way_of_a_pod_that_goes() -> None:
    """A scrape that has begun ends, and its connection is not kept."""
    release = asyncio.Event()

    async def wait(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await release.wait()
        writer.write(answer())
        await writer.drain()

    pod = PodServer(wait)
    async with pod.serving():
        pods = known(pod.pod())
        async with proxying(pods=access(pods)) as proxy:
            scrape = asyncio.create_task(proxy.get(pod_path()))
            await until(lambda: bool(pod.requests))
            put(pods, pod.pod(uid="another"))
            release.set()
            assert (await scrape).body == METRICS
            assert proxy.server.stats().kept == 0


async def test_scrape_that_waits_for_a_pod_that_goes() -> None:
    """404, with no connection to an address that may be another Pod's by now."""
    pod = PodServer(hang)
    async with pod.serving():
        pods = known(pod.pod())
        places = Concurrency(per_node=1, overall=1)
        async with proxying(pods=access(pods, concurrency=places)) as proxy:
            first = asyncio.create_task(proxy.get(pod_path(), "X-Prometheus-Scrape-Timeout-Seconds: 1"))
            await until(lambda: bool(pod.requests))
            second = asyncio.create_task(proxy.get(pod_path()))
            await until(lambda: proxy.server.stats().waiting == 1)
            pods.put("shop", "web-1", None)
            assert (await second).status == 404
            assert (await first).status == 504
    assert pod.connections == 1


async def test_pod_that_goes_while_it_is_dialled() -> None:
    """404 once the connection is up, and not a byte of a request over it."""
    pod = PodServer(is_secure=True)
    async with pod.serving(), TcpProxy(POD_HOST, pod.port, listen_on=POD_HOST) as door:
        pods = known(pod.pod(annotations={"port": str(door.port)}))
        async with proxying(pods=access(pods)) as proxy:
            door.stall()
            scrape = asyncio.create_task(proxy.get(pod_path()))
            await until(lambda: door.is_held)
            pods.put("shop", "web-1", None)
            await door.heal()
            assert (await scrape).status == 404
    assert pod.requests == []


@pytest.mark.parametrize("is_secure", [False, True])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_body_ended_by_close_is_passed_on_in_chunks(version: bytes, is_secure: bool) -> None:
    """Shows the client where the body ends, so that its own connection goes on."""
    head = b"HTTP/%b 200 OK\r\nContent-Type: text/plain\r\n\r\n" % version
    body = b"a 1\n" * 60_000
    pod = PodServer(always(head + body, then_close=True), is_secure=is_secure)
    async with pod.serving(), proxying(pods=access(known(pod.pod()))) as proxy:
        got = await proxy.get(pod_path())
        assert (got.status, got.fields["transfer-encoding"]) == (200, "chunked")
        assert got.body == body
        raw = await proxy.exchange(b"GET %b HTTP/1.0\r\n\r\n" % pod_path().encode())
        assert b"chunked" not in raw
        assert raw.partition(b"\r\n\r\n")[2] == body
        assert proxy.server.stats().outcomes[Outcome.OK] == 2


async def test_an_empty_body_ended_by_close_is_complete() -> None:
    """Passes on no chunk but the last."""
    pod = PodServer(always(TEXT + b"\r\n", then_close=True))
    async with pod.serving(), proxying(pods=access(known(pod.pod()))) as proxy:
        got = await proxy.get(pod_path())
        assert (got.status, got.body) == (200, b"")


async def test_a_body_ended_by_a_reset_is_cut() -> None:
    """Does not take a connection that breaks for the end of a body."""

    async def break_off(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(TEXT + b"\r\na 1\n")
        await writer.drain()
        await asyncio.sleep(0.1)
        reset_on_close(writer)

    pod = PodServer(break_off)
    async with pod.serving(), proxying(pods=access(known(pod.pod()))) as proxy:
        reader, writer = await proxy.connect()
        writer.write(get_request(pod_path()))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await until(lambda: proxy.server.stats().outcomes[Outcome.CUT] == 1)


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        (
            b"Content-Type: text/plain; version=0.0.4\r\nContent-Type: text/html\r\n",
            "content-type",
            "text/plain; version=0.0.4",
        ),
        (b"Content-Encoding: gzip\r\nContent-Encoding: gzip\r\n", "content-encoding", "gzip"),
        (b"Content-Length: 4\r\nContent-Length:  4\r\n", "content-length", "4"),
        (b"X: " + b"y" * 20_000 + b"\r\n", "content-length", "4"),
    ],
)
async def test_repeated_and_long_fields_of_a_pod(fields: bytes, name: str, value: str) -> None:
    """Forwards a singleton once, takes equal lengths for one, and accepts heads up to 64 KB."""
    pod = PodServer(always(b"HTTP/1.1 200 OK\r\n" + fields + b"Content-Length: 4\r\n\r\na 1\n"))
    async with pod.serving(), proxying(pods=access(known(pod.pod()))) as proxy:
        raw = await proxy.exchange(get_request(pod_path(), "Connection: close"))
        head = raw.partition(b"\r\n\r\n")[0].lower()
        assert head.count(name.encode()) == 1
        assert parse_answer(raw).fields[name] == value
        assert parse_answer(raw).body == b"a 1\n"


async def test_a_pod_gets_the_time_that_is_left_and_the_trace() -> None:
    """Forwards what a Pod may use and only that: the seconds left, and a well-formed traceparent."""
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    pod = PodServer()
    async with pod.serving(), proxying(pods=access(known(pod.pod()))) as proxy:
        await proxy.get(pod_path(), f"{TIMEOUT}: 10", f"Traceparent: {trace}")
        await proxy.get(pod_path(), f"{TIMEOUT}: 10", "Traceparent: 00-xyz")
    first, second = (request.decode().lower() for request in pod.requests)
    seconds = float(first.partition(f"{TIMEOUT.lower()}: ")[2].partition("\r\n")[0])
    assert 0 < seconds < 10
    assert f"traceparent: {trace}\r\n" in first
    assert "traceparent" not in second


@pytest.mark.parametrize(
    ("stated", "got"), [(b"", "text/plain"), (b"Content-Type: text/html\r\n", "text/html")]
)
async def test_a_pod_without_a_type_gets_the_fallback(stated: bytes, got: str) -> None:
    """States POD_CONTENT_TYPE_FALLBACK for a Pod that states no type, and for no other; a kubelet's stay as they are."""
    answering = always(b"HTTP/1.1 200 OK\r\n" + stated + b"Content-Length: 4\r\n\r\na 1\n")
    pod, kubelet = PodServer(answering), Kubelet(answering)
    async with pod.serving(), kubelet.serving():
        pods = access(known(pod.pod()))
        async with proxying(kubelet.node(), pods=pods, pod_content_type="text/plain") as proxy:
            assert (await proxy.get(pod_path())).fields["content-type"] == got
            assert ("content-type" in (await proxy.get(cadvisor(kubelet))).fields) == bool(stated)


async def redirect_once(
    kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Redirect to `/metrics/`, as a server does that knows a folder there."""
    if request.startswith(b"GET /metrics/ "):
        await serve_metrics(kubelet, request, reader, writer)
    else:
        writer.write(b"HTTP/1.1 301 Moved\r\nLocation: /metrics/\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()


async def test_a_redirect_to_the_pod_itself_is_followed_once() -> None:
    """Asks the same Pod at the path it names, without credentials; and no second time."""
    pod, loop = (
        PodServer(redirect_once),
        PodServer(always(b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n")),
    )
    async with pod.serving(), loop.serving():
        pods = known(pod.pod(), loop.pod("web-2"))
        async with proxying(pods=access(pods)) as proxy:
            got = await proxy.get(pod_path(), "Authorization: Bearer the-callers-own")
            assert (got.status, got.body) == (200, METRICS)
            got = await proxy.get(pod_path("web-2"))
            assert got.status == 502
            assert b"/again" in got.body
    assert [request.split(b" ")[1] for request in loop.requests] == [b"/metrics", b"/again"]
    assert not any(b"Authorization" in request for request in pod.requests)


ROUTE = Route(Endpoint("10.0.0.1", 8080, "10.0.0.1", "uid", POD), "/metrics?a=b")


@pytest.mark.parametrize(
    ("location", "path"),
    [
        (b"/metrics/", "/metrics/"),
        (b"other?x=1#part", "/other?x=1"),
        (b"http://10.0.0.1:8080/stats", "/stats"),
        (b"//10.0.0.1:8080/stats", "/stats"),
        (b"http://10.0.0.1/stats", None),
        (b"http://10.0.0.1:8081/stats", None),
        (b"http://10.0.0.2:8080/stats", None),
        (b"http://web.shop.svc:8080/stats", None),
        (b"https://10.0.0.1:8080/stats", None),
        (b"http://a@10.0.0.1:8080/stats", None),
        (b"//169.254.169.254/latest", None),
        (b"http://10.0.0.1:99999/", None),
        (b"http://[10.0.0.1:8080/", None),
        (b"/a b", None),
        (b"/a\tb", None),
        (b"/\xff", None),
        (b"/" + b"x" * 3000, None),
        (b"file:///etc/passwd", None),
    ],
)
def test_redirects_lead_to_the_same_place_only(location: bytes, path: str | None) -> None:
    """Keeps scheme, address and port, and the rules for a path."""
    route = redirected(ROUTE, location)
    assert (route and (route.path, route.endpoint)) == (path and (path, ROUTE.endpoint))
    assert redirected(Route(ROUTE.endpoint._replace(peer=KUBELET), "/metrics"), location) is None


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirects_are_not_followed(status: int) -> None:
    """A Pod that points elsewhere is 502 in words that name where, and elsewhere hears nothing."""
    elsewhere = Kubelet()
    async with elsewhere.serving():
        to = f"https://127.0.0.1:{elsewhere.port}/metrics/cadvisor"
        location = f"{to.replace('//', '//user:password@')}?token=hidden#hidden"
        pod = PodServer(
            always(f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())
        )
        async with pod.serving(), proxying(elsewhere.node(), pods=access(known(pod.pod()))) as proxy:
            got = await proxy.get(pod_path())
            assert got.status == 502
            assert b"the Pod answered 3" in got.body
            assert to.encode() in got.body
            assert b"password" not in got.body
            assert b"hidden" not in got.body
            assert proxy.server.stats().outcomes[Outcome.POD_ANSWERED] == 1
    assert elsewhere.connections == 0


async def test_https_pods_are_verified() -> None:
    """502 naming both settings where the authority is not the Pods', unless verification is skipped."""
    pod = PodServer(is_secure=True, signed_by=trustme.CA())
    async with pod.serving():
        pods = known(pod.pod())
        async with proxying(pods=access(pods)) as proxy:
            got = await proxy.get(pod_path())
            assert got.status == 502
            assert b"POD_CA_FILE" in got.body
            assert b"POD_INSECURE_SKIP_TLS_VERIFY" in got.body
            assert b"KUBELET" not in got.body
        assert pod.requests == []
        blind = Trust(is_verified=False).context
        async with proxying(pods=access(known(pod.pod()), context=blind)) as proxy:
            assert (await proxy.get(pod_path())).status == 200


@pytest.mark.parametrize(
    ("raw", "status", "outcome"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", 502, Outcome.POD_ANSWERED),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", 502, Outcome.POD_ANSWERED),
        (b"\x16\x03\x01 this is no HTTP\r\n\r\n", 502, Outcome.POD_MALFORMED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nno", 502, Outcome.POD_MALFORMED),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 502, Outcome.POD_MALFORMED),
    ],
)
async def test_pods_that_answer_badly(raw: bytes, status: int, outcome: Outcome) -> None:
    """Tells what the Pod did, of the Pod and not of a kubelet, and counts it apart from theirs."""
    pod = PodServer(always(raw))
    async with pod.serving(), proxying(pods=access(known(pod.pod()))) as proxy:
        got = await proxy.get(pod_path())
        assert got.status == status
        assert b"kubelet" not in got.body
        assert proxy.server.stats().outcomes[outcome] == 1
        (failure,) = proxy.server.failures()
        assert (failure.outcome, failure.endpoint.port) == (outcome, pod.port)


async def test_pod_that_is_not_there() -> None:
    """502 with the reason where nothing listens."""
    server = PodServer()
    async with server.serving():
        gone = server.pod()
    async with proxying(pods=access(known(gone))) as proxy:
        got = await proxy.get(pod_path())
        assert (got.status, b"the Pod cannot be reached" in got.body) == (502, True)


async def test_pods_that_hang_do_not_starve_kubelets() -> None:
    """With every place for Pods taken, Nodes are scraped as ever."""
    kubelet, pod = Kubelet(), PodServer(hang)
    async with kubelet.serving(), pod.serving():
        places = Concurrency(per_node=2, overall=2)
        pods = access(known(pod.pod(), pod.pod("web-2")), concurrency=places)
        async with proxying(kubelet.node(), concurrency=places, pods=pods) as proxy:
            stuck = [
                asyncio.create_task(proxy.get(pod_path(name), "X-Prometheus-Scrape-Timeout-Seconds: 2"))
                for name in ("web-1", "web-2", "web-1", "web-2")
            ]
            await until(lambda: proxy.server.stats().running == 2)
            for _ in range(3):
                assert (await proxy.get(cadvisor(kubelet))).status == 200
            for answered in asyncio.as_completed(stuck):
                assert (await answered).status in (503, 504)


async def drip(
    kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Send a body byte by byte."""
    writer.write(TEXT + b"Content-Length: 1000000\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"a")
        await writer.drain()
        await asyncio.sleep(0.05)


def under_way(proxy: Proxy) -> int:
    """Return the number of scrapes that run or wait."""
    stats = proxy.server.stats()
    return stats.running + stats.waiting


async def test_pods_of_one_namespace_that_drip_do_not_starve_another() -> None:
    """Gives the place that comes free next to a namespace with fewer, however many scrapes wait before it."""
    hostile, honest = PodServer(drip), PodServer()
    async with hostile.serving(), honest.serving():
        pods = [hostile.pod(f"web-{number}", "evil") for number in range(8)]
        places = Concurrency(per_node=1, overall=2)
        async with proxying(pods=access(known(*pods, honest.pod()), concurrency=places)) as proxy:
            # The first two give their places back soon, the others hardly ever.
            stuck = []
            for number, seconds in enumerate((1, 1, *[100] * 6)):
                path = pod_path(f"web-{number}", "evil")
                stuck.append(asyncio.create_task(proxy.get(path, f"{TIMEOUT}: {seconds}")))
                await until(lambda: under_way(proxy) == number + 1)  # noqa: B023 - awaited here
            got = await proxy.get(pod_path(), f"{TIMEOUT}: 20")
            assert (got.status, got.body) == (200, METRICS)
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)


async def test_before_the_pods_are_known() -> None:
    """503 until the first complete list and once what was known is too old; Nodes are not concerned."""
    kubelet, pod = Kubelet(), PodServer()
    async with kubelet.serving(), pod.serving():
        pods = Pods()
        put(pods, pod.pod())
        async with proxying(kubelet.node(), pods=access(pods)) as proxy:
            assert (await proxy.get(pod_path())).status == 503
            assert (await proxy.get(cadvisor(kubelet))).status == 200
            pods.known = True
            assert (await proxy.get(pod_path())).status == 200
            assert proxy.server.stats().kept == 2
            pods.forget()
            assert proxy.server.stats().kept == 1
            assert (await proxy.get(pod_path())).status == 503


async def test_without_the_setting_there_are_no_pods() -> None:
    """The form for Pods leads nowhere unless they are relayed."""
    async with proxying() as proxy:
        got = await proxy.get(pod_path())
        assert got.status == 404


def route_of(pods: Pods, target: str, nodes: NodeTable = NOBODY) -> Route | Refusal:
    """Decide on a target."""
    return find_pod(target.encode("latin-1"), pods, nodes)


async def test_pod_with_its_nodes_network() -> None:
    """Only a declared port is reached, and never the kubelet's, declared or not."""
    kubelet, pod = Kubelet(), PodServer(host="127.0.0.1")
    async with kubelet.serving(), pod.serving():
        pods = known(
            pod.pod("declared", host_network=True, ports=declared(pod.port)),
            pod.pod("undeclared", host_network=True, ports=declared(1)),
            pod.pod(
                "kubelet",
                host_network=True,
                ports=declared(kubelet.port),
                annotations={"port": str(kubelet.port), "scheme": "https"},
            ),
            pod.pod("spoofed"),
        )
        async with proxying(kubelet.node(), pods=access(pods)) as proxy:
            for name, status in (("declared", 200), ("undeclared", 404), ("kubelet", 404), ("spoofed", 404)):
                assert (await proxy.get(pod_path(name))).status == status, name
    assert (kubelet.connections, len(pod.requests)) == (0, 1)


@pytest.mark.parametrize(("port", "status"), [(6443, 404), (8443, None)])
def test_pod_at_the_api_server_is_reached_at_other_ports_only(port: int, status: int | None) -> None:
    """Its own address and port are not a Pod's, with the node's network or without."""
    table = NodeTable(api_server=frozenset({("192.0.2.9", 6443)}))
    for host_network in (False, True):
        pod = PodServer(port=port).pod(ip="192.0.2.9", host_network=host_network, ports=declared(port))
        found = route_of(known(pod), pod_path(pod.name), table)
        assert (found.status if isinstance(found, Refusal) else None) == status


@pytest.mark.parametrize(
    "ip",
    [
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "fd00:ec2::254",
        "169.254.169.254",
        "127.0.0.1",
        "::1",
        "0.0.0.0",
        "224.0.0.1",
        "::ffff:127.0.0.1",
        "fe80::1",
        "",
        "x",
    ],
)
def test_addresses_never_dialled(ip: str) -> None:
    """A Pod whose status names a special address is as good as none: a kubelet writes it."""
    assert proxied_pod(PodServer(port=80).pod(ip=ip), PREFIX) is None


@pytest.mark.parametrize(
    ("annotations", "path"),
    [
        ({"path": "/metrics"}, "/metrics"),
        ({"path": "a/b"}, "/a/b"),
        ({"path": '/é m%2f/"#;x=y'}, "/%C3%A9%20m%252f/%22%23;x=y"),
        ({"path": "/m\r\nX: y"}, None),
        ({"path": "/" + "m" * 3000}, None),
        ({"port": "70000"}, None),
        ({"scrape": "no"}, None),
    ],
)
def test_pod_is_asked_for_the_path_as_go_writes_it(annotations: dict[str, str], path: str | None) -> None:
    """Path and query are written as Go's net/url writes them, and nothing can break out of the request line."""
    made = proxied_pod(PodServer(port=80).pod(ip="192.0.2.9", annotations=annotations), PREFIX)
    assert (made.routes[0].path if made else None) == path


ATTACKS = [
    "/api/v1/namespaces/shop/pods/web-1",
    "/api/v1/namespaces/shop/pods/web-1/",
    "/api/v1/namespaces/shop/pods/web-1/metrics/",
    "/api/v1/namespaces/shop/pods/web-1//metrics",
    "/api/v1/namespaces/shop/pods//web-1/metrics",
    "/api/v1/namespaces/shop/pods/web-1/proxy/metrics",
    "/api/v1/namespaces/shop/pods/web-1/metrics/cadvisor",
    "/api/v1/namespaces/shop/pods/web-1/exec",
    "/api/v1/namespaces/shop/pods/web-1/log",
    "/api/v1/namespaces/shop/pods/web-1/%6detrics",
    "/api/v1/namespaces/shop/pods/web-1%2fmetrics",
    "/api/v1/namespaces/shop/pods/web-1%3A9102/metrics",
    "/api/v1/namespaces/shop/pods/web%2D1/metrics",
    "/api/v1/namespaces/shop/pods/../pods/web-1/metrics",
    "/api/v1/namespaces/other/../shop/pods/web-1/metrics",
    "/api/v1/namespaces/shop/./pods/web-1/metrics",
    "/api/v1/namespaces/shop/pods/web-1/../web-2/metrics",
    "/api/v1/namespaces/shop/pods/web-1/metrics/../../web-2/metrics",
    "/api/v1/namespaces/shop%2f..%2fshop/pods/web-1/metrics",
    "/api/v1/namespaces/shop/pods/web-1:/metrics",
    "/api/v1/namespaces/shop/pods/web-1:09102/metrics",
    "/api/v1/namespaces/shop/pods/web-1:+9102/metrics",
    "/api/v1/namespaces/shop/pods/web-1:9103/metrics",
    "/api/v1/namespaces/shop/pods/web-1:74638/metrics",
    "/api/v1/namespaces/shop/pods/web-1:10250/metrics",
    "/api/v1/namespaces/shop/pods/web-1:http/metrics",
    "/api/v1/namespaces/shop/pods/https:web-1:9102/metrics",
    "/api/v1/namespaces/shop/pods/user@web-1/metrics",
    "/api/v1/namespaces/shop/pods/WEB-1/metrics",
    "/api/v1/namespaces/shop/pods/web-1./metrics",
    "/api/v1/namespaces/shop/pods/web-1;x/metrics",
    "/api/v1/namespaces/shop/pods/web-1\\/metrics",
    "/api/v1/namespaces/shop/pods/web-1/metrics#x",
    "/api/v1/namespaces/shop/pods/web-1/metrics?#x",
    "/api/v1/namespaces/shop/pods/web-1/metrics HTTP/1.1\r\nX: y",
    "/api/v1/namespaces/shop/pods/web-1/metrics\n",
    "/api/v1/namespaces/shop/pods/198.51.100.10/metrics",
    "/api/v1/namespaces/shop/pods/198.51.100.10:9102/metrics",
    "/api/v1/namespaces/shop/pods/[2001:db8::1]:9102/metrics",
    "/api/v1/namespaces/shop/pods/169.254.169.254:80/metrics",
    "/api/v1/namespaces/shop/pods/localhost/metrics",
    "/api/v1/namespaces/shop/pods/kubernetes.default.svc/metrics",
    "/api/v1/namespaces//pods/web-1/metrics",
    "/api/v1/namespaces/sh.op/pods/web-1/metrics",
    "/api/v1/namespaces/other/pods/web-1/metrics",
    "/api/v1/namespaces/shop/Pods/web-1/metrics",
    "/api/v1/namespaces/shop/services/web-1/metrics",
    "http://shop/api/v1/namespaces/shop/pods/web-1/metrics",
    "//api/v1/namespaces/shop/pods/web-1/metrics",
]


def table() -> Pods:
    """Return a Pod of a name, one whose name looks like an address, and one whose name holds two dots."""
    server = PodServer(port=9102)
    return known(
        server.pod(ip="198.51.100.10"),
        server.pod("192.0.2.77", ip="198.51.100.11"),
        server.pod("a..b", ip="198.51.100.12"),
    )


@pytest.mark.parametrize("target", ATTACKS)
def test_refused(target: str) -> None:
    """Leads nowhere."""
    assert route_of(table(), target) in (UNKNOWN_PATH, UNKNOWN_POD)


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("/api/v1/namespaces/shop/pods/web-1/metrics", "198.51.100.10"),
        ("/api/v1/namespaces/shop/pods/web-1:9102/metrics?x=../..", "198.51.100.10"),
        ("/api/v1/namespaces/shop/pods/192.0.2.77/metrics", "198.51.100.11"),
        ("/api/v1/namespaces/shop/pods/192.0.2.77:9102/metrics", "198.51.100.11"),
        ("/api/v1/namespaces/shop/pods/a..b/metrics", "198.51.100.12"),
    ],
)
def test_names_are_looked_up_and_nothing_else(target: str, address: str) -> None:
    """A name that looks like an address leads to the Pod of that name, at the Pod's own address."""
    route = route_of(table(), target)
    assert isinstance(route, Route)
    assert (route.endpoint.address, route.path) == (address, "/metrics")


def test_unknown_yet() -> None:
    """Says that Pods are not known rather than that one is not there."""
    assert route_of(Pods(), pod_path()) == PODS_UNKNOWN
    assert route_of(Pods(), "/api/v1/namespaces/x") == UNKNOWN_PATH


async def test_attacks_over_the_wire() -> None:
    """Nothing is connected to for any of them, and a method or body that is no scrape is refused as for Nodes."""
    pod, other = PodServer(), PodServer()
    async with pod.serving(), other.serving():
        async with proxying(pods=access(known(pod.pod()))) as proxy:
            # With a version in it a target is, on the wire, a sound request of what stands before.
            # One in absolute form is a sound request too.
            for target in (one for one in ATTACKS if " HTTP/" not in one and not one.startswith("http")):
                aimed = target.replace("9103", str(other.port)).replace("9102", str(other.port))
                raw = await proxy.exchange(get_request(aimed, "Connection: close"))
                assert parse_answer(raw).status in (400, 404, 505), (target, raw)
            good = get_request(pod_path(), "Connection: close")
            for raw, status in (
                (good.replace(b"GET", b"POST"), 405),
                (good.replace(b"GET", b"CONNECT"), 405),
                (get_request(pod_path(), "Content-Length: 3") + b"abc", 400),
                (good + good, 400),
            ):
                assert parse_answer(await proxy.exchange(raw)).status == status
        assert (pod.connections, other.connections) == (0, 0)


PIECES = st.sampled_from(
    [
        "/api/v1/namespaces/", "shop", "/pods/", "web-1", "192.0.2.77", "a..b", ":9102", ":80", "/metrics",
        "..", "/", "%2f", "%2e", "?", "#", "@", "[::1]", "\x00", "\r\n", "/proxy", "http://",
    ]
)  # fmt: skip


@given(st.one_of(st.lists(PIECES, max_size=9).map("".join), st.text(max_size=60)))
@example("/api/v1/namespaces/shop/pods/web-1:9102/metrics")
def test_only_allowed_pods(target: str) -> None:
    """Whatever the target, leads to a known Pod's own address, port and path, or nowhere."""
    pods = table()
    route = find_pod(target.encode("utf-8", "surrogatepass"), pods, NOBODY)
    if isinstance(route, Route):
        assert pods.is_current(route.endpoint)
        assert (route.endpoint.port, route.path) == (9102, "/metrics")
        assert re.fullmatch(r"/api/v1/namespaces/shop/pods/[a-z0-9.-]+(:9102)?/metrics(\?.*)?", target)
    else:
        assert route.status == 404


async def test_no_pod_is_asked_while_the_nodes_are_not_known() -> None:
    """Without them nothing shows that a Pod claims the address of a Node or of the API server."""
    pod = PodServer()
    async with pod.serving(), proxying(pods=access(known(pod.pod())), known=False) as proxy:
        assert (await proxy.get(pod_path())).status == 503
        assert pod.requests == []
        proxy.nodes.replace(NodeTable())
        assert (await proxy.get(pod_path())).status == 200
        proxy.nodes.forget()
        assert (await proxy.get(pod_path())).status == 503
    assert len(pod.requests) == 1
