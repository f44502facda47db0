"""`kube.client` against real servers on loopback: good answers, every refusal, every kind of break."""

import asyncio
import base64
import gzip
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trustme
from aiohttp import web

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.errors import (
    AccessError,
    ClusterAhead,
    ClusterBusy,
    ClusterError,
    ClusterExpired,
    ClusterForbidden,
    ClusterRefused,
    ClusterUnauthorized,
    ClusterUnreachable,
)
from k8s_consul_registrar.kube import responses
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.client import JSON, LEAN_JSON, KubeClient
from k8s_consul_registrar.kube.credentials import ClientIdentity, Credentials, StoredCredentials
from k8s_consul_registrar.kube.lists import MOST_IDLE_PAGES, Page
from k8s_consul_registrar.kube.objects import Broken
from k8s_consul_registrar.model import Kind, ObjectKey, Pod, Selector, Undecodable
from k8s_consul_registrar.rotating import fixed
from k8s_consul_registrar.tls import KeyPair, Trust
from support.files import recorded, recorded_refusal
from support.processes import reserve_ports
from support.waiting import PATIENCE

TIMING = Timing(connect_timeout=20.0, read_timeout=20.0)  # no test waits for it, even on a busy machine
IMPATIENT = Timing(connect_timeout=1.0, read_timeout=0.1)
SECRET = "s3cr3t-t0ken"
ANONYMOUS = StoredCredentials(ClientIdentity())
CA = trustme.CA()
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serve(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Serve every path with one handler and yield the port."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_server(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Serve with a function that reads and writes bytes, and yield the port."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await reader.readuntil(b"\r\n\r\n")
                await answer(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def answering(status: int, body: bytes, **headers: str) -> Handler:
    """Return a handler that always gives this answer."""

    async def handle(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body, headers=headers or {"Content-Type": "application/json"})

    return handle


async def list_all(
    access: Access, kind: Kind = Kind.POD, timing: Timing = TIMING, **options: Any
) -> list[Page]:
    """List to the end with a client of its own."""
    async with KubeClient(access, timing) as client:
        return [page async for page in client.pages(kind, **options)]


async def failure(handler: Handler, **options: Any) -> ClusterError:
    """Return the error a Pod list of this handler ends with."""
    async with serve(handler) as port:
        with pytest.raises(ClusterError) as caught:
            await list_all(Access(f"http://127.0.0.1:{port}", ANONYMOUS, origin="the test"), **options)
    return caught.value


async def test_recorded_pages_make_one_list() -> None:
    """The recorded first page leads to the second by its token, with nothing else changed."""
    first, second = recorded("k8s-pods-list-page1"), recorded("k8s-pods-list-page2")
    asked: list[dict[str, str]] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(dict(request.query))
        assert request.path == "/api/v1/pods"
        assert request.headers["Accept-Encoding"] == "gzip"
        body = second.body if "continue" in request.query else first.body
        if "continue" in request.query:
            body = body.replace(b'"continue"', b'"was-continue"')
        return web.Response(body=gzip.compress(body), headers={"Content-Encoding": "gzip"})

    async with serve(handle) as port:
        pages = await list_all(
            Access(f"http://127.0.0.1:{port}", ANONYMOUS), selector=Selector("app in (a,b),!x"), page_size=4
        )
    assert [len(page.items) for page in pages] == [4, 4]
    common = {"limit": "4", "labelSelector": "app in (a,b),!x"}
    assert asked == [common, {**common, "continue": pages[0].continue_token}]
    assert all(isinstance(item, Pod) for page in pages for item in page.items)


async def test_namespace_and_a_server_prefix_are_part_of_the_path() -> None:
    """A Role in one namespace is enough for its Pods, also behind a gateway's path."""
    paths: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        paths.append(request.raw_path)
        return web.Response(body=recorded("k8s-pods-list").body)

    async with serve(handle) as port:
        await list_all(Access(f"http://127.0.0.1:{port}/k8s/c-1", ANONYMOUS), namespace="a/b")
    assert paths == ["/k8s/c-1/api/v1/namespaces/a%2Fb/pods?limit=250"]


async def test_page_that_repeats_ends_the_list() -> None:
    """A server that names the same next page again would be asked forever."""
    error = await failure(answering(200, recorded("k8s-pods-list-page1").body))
    assert isinstance(error, ClusterRefused)
    assert "repeats" in str(error)


@pytest.mark.parametrize("items", ["[]", '[{"metadata":{"name":"a","namespace":"b"}}]', "[5]"])
async def test_pages_with_new_tokens_that_bring_nothing_new_end_the_list(items: str) -> None:
    """A server that always has another page would keep its source from ever being synced."""
    asked = 0

    async def handle(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        metadata = f'{{"resourceVersion":"5","continue":"{asked}"}}'
        return web.Response(text=f'{{"kind":"PodList","metadata":{metadata},"items":{items}}}')

    error = await failure(handle)
    assert isinstance(error, ClusterRefused)
    assert "without end" in str(error)
    assert asked < 2 * MOST_IDLE_PAGES


async def test_few_empty_pages_do_not_end_the_list() -> None:
    """With a selector a page may have nothing that is selected."""

    async def handle(request: web.Request) -> web.Response:
        number = int(request.query.get("continue", 0)) + 1
        token = f',"continue":"{number}"' if number < MOST_IDLE_PAGES else ""
        return web.Response(
            text=f'{{"kind":"PodList","metadata":{{"resourceVersion":"5"{token}}},"items":[]}}'
        )

    async with serve(handle) as port:
        pages = await list_all(Access(f"http://127.0.0.1:{port}", ANONYMOUS))
    assert len(pages) == MOST_IDLE_PAGES


async def test_snapshot_that_expires_midway_is_expired() -> None:
    """A 410 on a later page ends the list by its own error."""

    async def handle(request: web.Request) -> web.Response:
        if "continue" in request.query:
            return web.Response(
                status=410, body=b'{"kind":"Status","reason":"Expired","message":"too old","code":410}'
            )
        return web.Response(body=recorded("k8s-pods-list-page1").body)

    async with (
        serve(handle) as port,
        KubeClient(Access(f"http://127.0.0.1:{port}", ANONYMOUS), TIMING) as client,
    ):
        pages = client.pages(Kind.POD)
        assert len((await anext(pages)).items) == 4
        with pytest.raises(ClusterExpired, match="the server said: too old"):
            await anext(pages)


async def test_missing_permission_is_named() -> None:
    """The recorded 403 becomes words an operator can act on."""
    error = await failure(answering(403, recorded_refusal("k8s-403-pods-list")))
    assert isinstance(error, ClusterForbidden)
    assert str(error).startswith(
        "cannot list pods at the cluster scope: grant list on pods; the server said: pods is forb"
    )
    error = await failure(answering(403, b"<html>blocked</html>"), namespace="web")
    assert str(error) == "cannot list pods in namespace web: grant list on pods"


async def test_refusal_is_told_in_bounded_printable_text() -> None:
    """A message of a megabyte with control characters makes one short line."""
    message = "no\n\x1b[31m\x00" + "x" * 1_000_000
    status = {"kind": "Status", "message": message, "code": 422}
    error = await failure(answering(422, json.dumps({**status, "message": message[:60_000]}).encode()))
    assert isinstance(error, ClusterRefused)
    assert error.status == 422
    assert str(error).isprintable()
    assert "the server said: no [31m xxx" in str(error)
    assert len(str(error)) < 400
    assert "x" not in str(await failure(answering(422, json.dumps(status).encode()))).partition("422")[2]


@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (500, {}, None),
        (503, {"Retry-After": "99999999999999999999"}, 3600.0),
        (503, {"Retry-After": "inf"}, None),
        (504, {"Retry-After": "-1"}, None),
    ],
)
async def test_busy_server_names_the_wait(status: int, headers: dict[str, str], wait: float | None) -> None:
    """Retry-After is believed where it is a number of seconds, up to an hour."""
    error = await failure(answering(status, b"{}", **headers))
    assert isinstance(error, ClusterBusy)
    assert error.retry_after == wait


async def test_wait_may_stand_in_the_body() -> None:
    """API servers put the seconds in the details as well."""
    body = b'{"kind":"Status","message":"slow down","details":{"retryAfterSeconds":3}}'
    error = await failure(answering(429, body))
    assert isinstance(error, ClusterBusy)
    assert error.retry_after == 3.0
    assert str(error).endswith("the server said: slow down")


async def test_version_from_the_future_is_ahead() -> None:
    """The recorded 504 is distinguished from a busy server."""
    error = await failure(answering(504, recorded("k8s-pods-list-future").body))
    assert isinstance(error, ClusterAhead)


@pytest.mark.parametrize("status", [204, 301, 302, 307, 400, 404, 418])
async def test_other_answers_are_refusals_and_redirects_are_not_followed(status: int) -> None:
    """One request, one answer: a Location leads our token nowhere."""
    requests = 0

    async def handle(_: web.Request) -> web.Response:
        nonlocal requests
        requests += 1
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    error = await failure(handle)
    assert isinstance(error, ClusterRefused)
    assert error.status == status
    assert requests == 1


@pytest.mark.parametrize(
    "body", [b"<html>sign in</html>", b"", b"{}", b"\x1f\x8b junk", b'{"kind":"PodList"}']
)
async def test_success_that_is_no_list_is_refused(body: bytes) -> None:
    """A gateway's sign-in page is not an empty cluster."""
    error = await failure(answering(200, body))
    assert isinstance(error, ClusterRefused)
    assert str(error).startswith("cannot list pods at the cluster scope: the answer is not a PodList")


class Rotating:
    """Credentials with a new token after each rejection."""

    def __init__(self) -> None:
        self.number = 1
        self.rejections = 0

    async def identity(self) -> ClientIdentity:
        """Return the current token."""
        return ClientIdentity(token=f"{SECRET}-{self.number}")

    def rejected(self, identity: ClientIdentity) -> None:
        """Count, and rotate."""
        self.rejections += 1
        self.number += 1

    async def aclose(self) -> None:
        """Do nothing."""


async def test_401_is_tried_once_more_with_fresh_credentials() -> None:
    """A token that just rotated costs nothing but a request."""
    seen: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.headers["Authorization"])
        if request.headers["Authorization"].endswith("-2"):
            return web.Response(body=recorded("k8s-pods-list").body)
        return web.Response(status=401, body=recorded("k8s-401").body)

    credentials = Rotating()
    async with serve(handle) as port:
        assert await list_all(Access(f"http://127.0.0.1:{port}", credentials))
    assert seen == [f"Bearer {SECRET}-1", f"Bearer {SECRET}-2"]
    assert credentials.rejections == 1


async def test_credentials_refused_twice_are_an_error_that_names_their_origin() -> None:
    """There is no third try and no token in the text."""
    requests = 0

    async def handle(_: web.Request) -> web.Response:
        nonlocal requests
        requests += 1
        return web.Response(status=401, body=recorded("k8s-401").body)

    credentials = Rotating()
    async with serve(handle) as port:
        with pytest.raises(
            ClusterUnauthorized, match=r"\(kubeconfig x\); the server said: Unauthorized"
        ) as caught:
            await list_all(Access(f"http://127.0.0.1:{port}", credentials, origin="kubeconfig x"))
    assert SECRET not in str(caught.value)
    assert requests == credentials.rejections == 2


async def test_credentials_that_cannot_be_had_are_a_cluster_error() -> None:
    """An exec plugin that fails later is retried like any other fault, so it must be one."""

    class Failing:
        async def identity(self) -> ClientIdentity:
            raise AccessError("user 'x': exec: the plugin failed")

        def rejected(self, identity: ClientIdentity) -> None:
            pass

        async def aclose(self) -> None:
            pass

    with pytest.raises(ClusterUnauthorized, match="the plugin failed"):
        await list_all(Access("http://127.0.0.1:1", Failing()))


async def unreachable(port: int, timing: Timing = TIMING, **options: Any) -> str:
    """Return what a list of this port says when it cannot be had."""
    with pytest.raises(ClusterUnreachable) as caught:
        await list_all(Access(f"http://127.0.0.1:{port}", ANONYMOUS, **options), timing=timing)
    return str(caught.value)


async def test_refused_connection_and_an_unknown_name_are_unreachable() -> None:
    """Nothing listens at the address, or the name does not exist."""
    (port,) = reserve_ports(1)
    assert f"no connection to http://127.0.0.1:{port}: " in await unreachable(port)
    with pytest.raises(ClusterUnreachable, match=r"no connection to http://no-such-host\.invalid"):
        await list_all(Access("http://no-such-host.invalid", ANONYMOUS))


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (b"", "broke"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "broke off its answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "broke off its answer"),
    ],
)
async def test_answer_that_breaks_off_is_unreachable(sent: bytes, text: str) -> None:
    """A cut body is never decoded, whatever framed it."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()

    async with raw_server(answer) as port:
        assert text in await unreachable(port)


async def test_compressed_body_that_unpacks_without_end() -> None:
    """A hundred kilobytes that stand for a hundred megabytes do not fill the memory."""
    body = gzip.compress(
        b'{"kind":"PodList","metadata":{"resourceVersion":"5"},"items":[' + b" " * (100 << 20)
    )
    error = await failure(answering(200, body, **{"Content-Encoding": "gzip"}))
    assert isinstance(error, ClusterUnreachable)


async def test_uncompressed_body_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is not filled by a body that is sent as it is, either."""
    monkeypatch.setattr(responses, "MOST_SENT", 1 << 20)

    async def handle(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        with suppress(ConnectionError):
            while True:
                await answer.write(b" " * (1 << 16))
        return answer

    error = await failure(handle)
    assert isinstance(error, ClusterRefused)
    assert "over 1 MB" in str(error)


async def test_cut_that_keeps_the_framing_is_no_list_either() -> None:
    """Half a gzip body under its own Content-Length does not pass for a list."""
    body = gzip.compress(recorded("k8s-pods-list").body)[:-200]
    error = await failure(answering(200, body, **{"Content-Encoding": "gzip"}))
    assert isinstance(error, (ClusterRefused, ClusterUnreachable))


async def test_answer_that_is_not_http_is_refused() -> None:
    """Another protocol on the port is named as such."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n\r\n")
        await writer.drain()

    async with raw_server(answer) as port:
        with pytest.raises(ClusterRefused, match="does not speak HTTP"):
            await list_all(Access(f"http://127.0.0.1:{port}", ANONYMOUS))


async def test_silent_server_and_one_that_trickles_run_out_of_time() -> None:
    """The read timeout bounds a pause, the total one an endless trickle."""

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async def trickle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.1)

    patient = Timing(connect_timeout=30.0, read_timeout=0.4)
    async with (
        asyncio.timeout(PATIENCE),
        raw_server(silent) as port,
        KubeClient(Access(f"http://127.0.0.1:{port}", ANONYMOUS), patient) as client,
    ):
        with pytest.raises(ClusterUnreachable, match="took too long"):
            await client.server_version()
    async with raw_server(trickle) as port, asyncio.timeout(PATIENCE):
        assert "took too long" in await unreachable(port, IMPATIENT)


def server_tls(name: str, ca: trustme.CA = CA, client_ca: trustme.CA | None = None) -> ssl.SSLContext:
    """Return a server's context with a certificate for this name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)
    if client_ca is not None:
        client_ca.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def tls_access(
    port: int, *, ca: trustme.CA = CA, name: str | None = None, pair: KeyPair | None = None
) -> Access:
    """Return access over TLS that trusts this CA."""
    return Access(
        f"https://127.0.0.1:{port}",
        StoredCredentials(ClientIdentity(pair=pair)),
        trusted=fixed(
            Trust(ca=ca.cert_pem.bytes().decode(), ca_setting="cluster 'x': certificate-authority")
        ),
        server_hostname=name,
    )


LIST = recorded("k8s-pods-list").body


async def test_certificate_is_verified_and_mistakes_name_the_setting() -> None:
    """The wrong CA points at certificate-authority, the wrong name at tls-server-name."""
    async with serve(answering(200, LIST), server_tls("127.0.0.1")) as port:
        assert await list_all(tls_access(port))
        with pytest.raises(
            ClusterUnreachable, match=r"cannot be verified: .*cluster 'x': certificate-authority\)"
        ):
            await list_all(tls_access(port, ca=trustme.CA()))
    async with serve(answering(200, LIST), server_tls("api.example")) as port:
        assert await list_all(tls_access(port, name="api.example"))
        for wrong in (None, "other.example"):
            with pytest.raises(ClusterUnreachable, match=r"cannot be verified: .*tls-server-name"):
                await list_all(tls_access(port, name=wrong))
        skipped = Access(f"https://127.0.0.1:{port}", ANONYMOUS, trusted=fixed(Trust(is_verified=False)))
        assert await list_all(skipped)


async def test_intermediate_is_enough_to_trust() -> None:
    """As Go does, a CA certificate that is not self-signed serves as the anchor."""
    intermediate = CA.create_child_ca()
    async with serve(answering(200, LIST), server_tls("127.0.0.1", intermediate)) as port:
        assert await list_all(tls_access(port, ca=intermediate))


async def test_old_tls_is_refused() -> None:
    """A server that speaks at most TLS 1.1 is not spoken to."""
    context = server_tls("127.0.0.1")
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with serve(answering(200, LIST), context) as port:
        with pytest.raises(ClusterUnreachable):
            await list_all(tls_access(port))


async def test_client_certificate_is_shown() -> None:
    """A server that asks for one gets it, and refuses us without."""
    leaf = CA.issue_cert("client.example")
    pair = KeyPair(leaf.cert_chain_pems[0].bytes(), leaf.private_key_pem.bytes())
    async with serve(answering(200, LIST), server_tls("127.0.0.1", client_ca=CA)) as port:
        assert await list_all(tls_access(port, pair=pair))
        with pytest.raises(ClusterUnreachable):
            await list_all(tls_access(port))


async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    """Answer a CONNECT and pass bytes to the port on loopback, whatever name was asked for."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while chunk := await source.read(65536):
                sink.write(chunk)
                await sink.drain()
        sink.close()

    await asyncio.gather(copy(reader, upstream_writer), copy(upstream_reader, writer))


async def test_proxy_of_the_kubeconfig_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS goes end to end through it, its password to it alone; the environment's proxies are ignored."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    asked: list[bytes] = []
    async with serve(answering(200, LIST), server_tls("api.example")) as port:

        async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            await tunnel(reader, writer, port)

        proxy = await asyncio.start_server(serve_one, "127.0.0.1", 0)
        async with proxy:
            proxy_port = proxy.sockets[0].getsockname()[1]
            direct = tls_access(port, name="api.example")
            assert await list_all(direct)
            through = Access(
                "https://api.example:6443",
                StoredCredentials(ClientIdentity(token=SECRET)),
                trusted=direct.trusted,
                proxy=f"http://me:pw@127.0.0.1:{proxy_port}",
            )
            assert await list_all(through)
    assert len(asked) == 1
    assert asked[0].startswith(b"CONNECT api.example:6443 ")
    assert base64.b64encode(b"me:pw") in asked[0]
    assert SECRET.encode() not in asked[0]


async def test_proxy_that_refuses_is_told_without_its_password() -> None:
    """Its status is shown, its URL is not."""

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with raw_server(refuse) as port:
        access = Access(
            "https://api.example",
            ANONYMOUS,
            trusted=fixed(Trust()),
            proxy=f"http://me:{SECRET}@127.0.0.1:{port}",
        )
        with pytest.raises(ClusterUnreachable, match="the proxy answered 407") as caught:
            await list_all(access)
    assert SECRET not in str(caught.value)
    with pytest.raises(ClusterUnreachable, match="no connection to the proxy"):
        await list_all(access)


async def test_lists_and_watches_ask_without_managed_fields_until_a_406() -> None:
    """A server that cannot produce it is asked in plain JSON from then on; other requests always are."""
    asked: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request.headers["Accept"])
        if request.path == "/version":
            return web.json_response({"gitVersion": "v1.36.0"})
        if "drop=" in request.headers["Accept"]:
            return web.Response(status=406, body=b'{"kind":"Status","code":406,"message":"no"}')
        return web.Response(body=b"" if "watch" in request.query else LIST)

    async with (
        serve(handle) as port,
        KubeClient(Access(f"http://127.0.0.1:{port}", ANONYMOUS), TIMING) as client,
    ):
        await client.server_version()
        assert [page async for page in client.pages(Kind.POD)]
        assert [page async for page in client.pages(Kind.POD)]
        assert [batch async for batch in client.watch(Kind.POD, resource_version="1", timeout_seconds=1)]
    assert asked == [JSON, LEAN_JSON, JSON, JSON, JSON]


async def test_406_to_plain_json_is_a_refusal() -> None:
    """There is no third media type to try."""
    error = await failure(answering(406, b"<html>"))
    assert isinstance(error, ClusterRefused)
    assert error.status == 406


@pytest.mark.parametrize("name", ["web-1", "a,b=c\\d"])
async def test_object_is_read_by_its_name(name: str) -> None:
    """One list without label selector or version, in the Pod's namespace."""
    asked: list[tuple[str, dict[str, str]]] = []
    body = json.dumps({"kind": "PodList", "metadata": {"resourceVersion": "9"}, "items": [POD | {"metadata": {
        "name": name, "namespace": "shop"}}]}).encode()  # fmt: skip

    async def handle(request: web.Request) -> web.Response:
        asked.append((request.path, dict(request.query)))
        return web.Response(body=body)

    async with (
        serve(handle) as port,
        KubeClient(Access(f"http://127.0.0.1:{port}", ANONYMOUS), TIMING) as client,
    ):
        found = await client.read_object(ObjectKey(Kind.POD, "shop", name))
    assert isinstance(found, Pod)
    assert found.name == name
    escaped = name.replace("\\", "\\\\").replace(",", "\\,").replace("=", "\\=")
    assert asked == [("/api/v1/namespaces/shop/pods", {"fieldSelector": f"metadata.name={escaped}"})]


async def test_object_that_is_not_selected_is_none_with_the_selector() -> None:
    """Both selectors go to the server, which decides."""
    asked: list[dict[str, str]] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(dict(request.query))
        return web.json_response(EMPTY)

    async with (
        serve(handle) as port,
        KubeClient(Access(f"http://127.0.0.1:{port}", ANONYMOUS), TIMING) as client,
    ):
        key = ObjectKey(Kind.POD, "shop", "a")
        assert await client.read_object(key, Selector("app=web", "metadata.namespace!=b")) is None
    fields = "metadata.name=a,metadata.namespace!=b"
    assert asked == [{"fieldSelector": fields, "labelSelector": "app=web"}]


POD: dict[str, Any] = {"spec": {}, "status": {}}
EMPTY = {"kind": "PodList", "metadata": {"resourceVersion": "9"}, "items": []}


async def test_only_an_empty_list_says_that_an_object_is_not_there() -> None:
    """A server that ignores the selector, pages, or names nothing proves no absence; unreadable is not absent."""
    other = POD | {"metadata": {"name": "other", "namespace": "shop"}}
    broken = {"metadata": {"name": "a", "namespace": "shop"}, "spec": 7}
    key = ObjectKey(Kind.POD, "shop", "a")
    answers: list[Any] = [
        EMPTY,
        EMPTY | {"items": None},
        EMPTY | {"items": [broken]},
        EMPTY | {"items": [other]},
        EMPTY | {"items": [{"metadata": {}}]},
        EMPTY | {"metadata": {"resourceVersion": "9", "continue": "more"}},
        {"kind": "NodeList"},
    ]

    async def handle(_: web.Request) -> web.Response:
        return web.json_response(answers.pop(0))

    async with (
        serve(handle) as port,
        KubeClient(Access(f"http://127.0.0.1:{port}", ANONYMOUS), TIMING) as client,
    ):
        assert await client.read_object(key) is None
        assert await client.read_object(key) is None
        assert isinstance(await client.read_object(key), Undecodable)
        while answers:
            with pytest.raises(ClusterRefused):
                await client.read_object(key)


async def test_node_is_read_at_the_cluster_scope() -> None:
    """It has no namespace."""

    async def handle(request: web.Request) -> web.Response:
        assert request.path == "/api/v1/nodes"
        return web.json_response({"kind": "NodeList", "metadata": {"resourceVersion": "9"}, "items": []})

    async with (
        serve(handle) as port,
        KubeClient(Access(f"http://127.0.0.1:{port}", ANONYMOUS), TIMING) as client,
    ):
        assert await client.read_object(ObjectKey(Kind.NODE, "", "n")) is None


async def ask_everything(client: KubeClient) -> None:
    """Ask each kind of question; every one must end in a ClusterError."""

    async def pages() -> None:
        async for _ in client.pages(Kind.POD):
            pass

    async def watch() -> None:
        async for _ in client.watch(Kind.POD, resource_version="1", timeout_seconds=1):
            pass

    for question in (
        pages(),
        watch(),
        client.current_version(Kind.POD),
        client.read_object(ObjectKey(Kind.POD, "shop", "a")),
        client.namespace_uid("kube-system"),
        client.server_version(),
        client.can_i("get", "nodes"),
    ):
        with pytest.raises(ClusterError):
            await question


@pytest.mark.parametrize(
    "server",
    [
        "https://a..b",
        "http://a..b:6443",
        "http://" + "a" * 70 + ".x:6443",
        "http://[::1%25eth0]:6443",
        "http://[::1",
        "http://exa mple:6443",
        "http://\u2028x:6443",
        "http://x\uff0fy:6443",
        "http://.:6443",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:-1",
        "http://127.0.0.1:1/%zz",
        "http://",
        "//x",
        "ftp://x",
        "",
        "http://\udcff",
    ],
)
async def test_url_that_cannot_be_requested_is_a_cluster_error(server: str) -> None:
    """yarl, aiohttp and idna each raise exceptions of their own."""
    async with KubeClient(Access(server, ANONYMOUS), TIMING) as client:
        await ask_everything(client)


async def test_proxy_url_that_cannot_be_requested_does_not_show_its_password() -> None:
    """Neither where the library's text quotes it."""
    for proxy in (f"http://me:{SECRET}@a..b:1", f"http://me:{SECRET}@[::1", f"foo://me:{SECRET}@x"):
        access = Access("http://127.0.0.1:1", ANONYMOUS, proxy=proxy)
        with pytest.raises(ClusterError) as caught:
            await list_all(access)
        assert SECRET not in str(caught.value)


async def test_credentials_that_break_by_surprise_are_a_cluster_error() -> None:
    """A token of line breaks, and a source of tokens that raises."""

    class Raising:
        async def identity(self) -> ClientIdentity:
            raise KeyError("token")

        def rejected(self, identity: ClientIdentity) -> None:
            pass

        async def aclose(self) -> None:
            pass

    sources: tuple[Credentials, ...] = (Raising(), StoredCredentials(ClientIdentity(token="a\r\nX: b")))
    for credentials in sources:
        async with KubeClient(Access("http://127.0.0.1:1", credentials), TIMING) as client:
            await ask_everything(client)


DEEP = b'{"kind":"PodList","metadata":{"resourceVersion":"1"},"items":' + b"[" * 200_000


@pytest.mark.parametrize(
    "body",
    [
        b"<!doctype html><title>Sign in</title>\n",
        DEEP + b"\n",
        b'{"type":"ADDED","object":' + b'{"a":' * 100_000 + b"\n",
        b"\xff\xfe\n",
        b'{"kind":"PodList","metadata":{},"items":[]}\n',
        b'{"kind":"PodList","metadata":{"resourceVersion":7},"items":[]}\n',
        b'{"kind":"PodList","metadata":{"resourceVersion":"' + b"9" * 300 + b'"},"items":[]}\n',
    ],
)
async def test_success_without_sense_is_a_cluster_error(body: bytes) -> None:
    """In every question but a watch, whose decoder reports it."""
    async with (
        serve(answering(200, body)) as port,
        KubeClient(Access(f"http://127.0.0.1:{port}", ANONYMOUS), TIMING) as client,
    ):
        for question in (
            client.current_version(Kind.POD),
            client.read_object(ObjectKey(Kind.POD, "shop", "a")),
            client.namespace_uid("kube-system"),
            client.server_version(),
            client.can_i("get", "nodes"),
        ):
            with pytest.raises(ClusterRefused):
                await question
        batches = client.watch(Kind.POD, resource_version="1", timeout_seconds=1)
        events = [event async for batch in batches for event in batch]
    assert [type(event) for event in events] == [Broken]


@pytest.mark.parametrize(
    "piece", [b"X-Filler: x\r\n", b"X", b"HTTP/1.1 103 Early Hints\r\n\r\n"], ids=["many", "long", "interim"]
)
async def test_head_without_end_is_a_cluster_error(piece: bytes) -> None:
    """Headers that never end, one header that never ends, interim answers that never end."""

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not piece.startswith(b"HTTP"):
            writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)

    async with (
        asyncio.timeout(PATIENCE),
        raw_server(endless) as port,
        KubeClient(Access(f"http://127.0.0.1:{port}", ANONYMOUS), IMPATIENT) as client,
    ):
        await ask_everything(client)


async def test_uid_of_a_namespace() -> None:
    """Known, hidden, absent, garbage and broken are distinguished."""
    answers: dict[str, Handler] = {
        "kube-system": answering(200, b'{"kind":"Namespace","metadata":{"uid":"u-1"}}'),
        "hidden": answering(403, b"{}"),
        "absent": answering(404, recorded("k8s-404").body),
        "garbage": answering(200, b"[]"),
        "broken": answering(500, b"{}"),
    }

    async def handle(request: web.Request) -> web.StreamResponse:
        return await answers[request.path.removeprefix("/api/v1/namespaces/")](request)

    async with (
        serve(handle) as port,
        KubeClient(Access(f"http://127.0.0.1:{port}", ANONYMOUS), TIMING) as client,
    ):
        assert await client.namespace_uid("kube-system") == "u-1"
        assert await client.namespace_uid("hidden") is None
        assert await client.namespace_uid("absent") is None
        with pytest.raises(ClusterRefused):
            await client.namespace_uid("garbage")
        with pytest.raises(ClusterBusy):
            await client.namespace_uid("broken")


async def test_version_and_permissions() -> None:
    """The version is the server's text; a permission is asked for with exactly what was named."""
    reviews: list[Any] = []

    async def handle(request: web.Request) -> web.Response:
        if request.path == "/version":
            return web.json_response({"major": "1", "minor": "36", "gitVersion": "v1.36.0"})
        assert request.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        assert request.content_type == "application/json"
        reviews.append(await request.json())
        return web.json_response({"status": {"allowed": len(reviews) == 1}}, status=201)

    async with (
        serve(handle) as port,
        KubeClient(Access(f"http://127.0.0.1:{port}", ANONYMOUS), TIMING) as client,
    ):
        assert await client.server_version() == "v1.36.0"
        assert await client.can_i("get", "nodes", subresource="metrics")
        assert not await client.can_i("list", "pods", namespace="web")
    assert reviews[0]["kind"] == "SelfSubjectAccessReview"
    assert reviews[0]["spec"] == {
        "resourceAttributes": {"verb": "get", "resource": "nodes", "subresource": "metrics"}
    }
    assert reviews[1]["spec"] == {
        "resourceAttributes": {"verb": "list", "resource": "pods", "namespace": "web"}
    }
