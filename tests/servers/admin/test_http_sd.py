"""HTTP service discovery: the labels a collector gets, its filters, and who is let in."""

import asyncio
import gc
import gzip
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from multidict import CIMultiDictProxy

from k8s_consul_registrar.admin.http_sd import SD_PATH, HttpSdServer, accepts_gzip
from k8s_consul_registrar.admin.saved_state import SavedState, decode_state
from k8s_consul_registrar.admin.target_groups import BadQuery, GroupEncoder, parse_sd_query
from k8s_consul_registrar.admin.view import TargetRow
from k8s_consul_registrar.consul.codec import MetaKeys
from k8s_consul_registrar.errors import AccessError, OperationalError
from k8s_consul_registrar.rotating import BearerTokens, Rotating, bearer_tokens
from k8s_consul_registrar.tls import ServerTls, server_tls
from support.seen import Registrar, many_targets, node_target, pod_target
from unit.admin.test_saved_state import ORIGIN, encoded

pytestmark = pytest.mark.both_loops


def group_of(target: TargetRow, encoder: GroupEncoder | None = None) -> dict[str, Any]:
    """Return the one group a target becomes."""
    found: dict[str, Any] = json.loads((encoder or GroupEncoder()).encode(target).text)
    return found


def test_target_has_the_labels_of_consul_sd_and_those_prometheus_heeds() -> None:
    """Meta, tags, ID and address under consul_sd's names; path, scheme and parameters ready to use."""
    target = pod_target("web-1", tags=("a", "b"), meta={"param_module": "http_2xx", "scheme": "https"})
    assert group_of(target) == {
        "targets": ["198.51.100.10:9102"],
        "labels": {
            "__metrics_path__": "/metrics",
            "__scheme__": "https",
            "__param_module": "http_2xx",
            "__meta_consul_service": "pod--shop--web-1",
            "__meta_consul_service_id": "pod--shop--web-1",
            "__meta_consul_service_address": "198.51.100.10",
            "__meta_consul_service_port": "9102",
            "__meta_consul_tags": ",a,b,",
            **{f"__meta_consul_service_metadata_{key}": value for key, value in target.service.meta},
        },
    }


def test_ipv6_stands_in_brackets() -> None:
    """A collector splits at the last colon."""
    assert group_of(pod_target("web-1", address="2001:db8::7"))["targets"] == ["[2001:db8::7]:9102"]


def test_renamed_meta_keeps_the_scrape_as_it_is() -> None:
    """Where Consul knows `scheme` under another name the label follows, and `__scheme__` stays."""
    encoder = GroupEncoder(MetaKeys((("scheme", "prom-scheme"),)))
    labels = group_of(pod_target("web-1"), encoder)["labels"]
    assert labels["__meta_consul_service_metadata_prom_scheme"] == "http"
    assert labels["__scheme__"] == "http"
    assert "__meta_consul_service_metadata_scheme" not in labels


@pytest.mark.parametrize("text", ['"},{"', "</script>", "\x00\x1f\u2028", "a\nb", "\\", "half \ud83d of it"])
def test_hostile_text_stays_inside_its_value(text: str) -> None:
    """Nothing in a name or value breaks out of the JSON, and no label's name is one Prometheus refuses."""
    target = pod_target("web-1", tags=(text,), name=text, meta={text: text, f"param_{text}": text})
    group = group_of(target)
    assert group.keys() == {"targets", "labels"}
    assert group["labels"]["__meta_consul_service"] == text
    assert all(
        name.replace("_", "a").isascii() and name.replace("_", "a").isalnum() for name in group["labels"]
    )


def test_query_that_asks_for_nothing_known_is_refused() -> None:
    """A slip in a filter must not hand out every target."""
    for pair in (("shard", "a"), ("kind", "service"), ("", "")):
        with pytest.raises(BadQuery):
            parse_sd_query([pair])
    query = parse_sd_query([("kind", "pod"), ("shard_path", "a"), ("shard_path", "b")])
    assert query.shard_paths == {"a", "b"}


@pytest.mark.parametrize(
    ("header", "is_gzip"),
    [("gzip", True), ("br, GZIP;q=0.5", True), ("", False), ("gzip;q=0", False), ("gzip; q=0.0", False),
     ("x-gzip-not", False), ("identity", False)],
)  # fmt: skip
def test_gzip_is_sent_to_those_who_ask(header: str, is_gzip: bool) -> None:
    """A weight of 0 is a no."""
    assert accepts_gzip(header) is is_gzip


@asynccontextmanager
async def serving(
    registrar: Registrar, *, bearer: Rotating[BearerTokens] | None = None, tls: ServerTls | None = None
) -> AsyncIterator[HttpSdServer]:
    """Serve a registrar on a port the system picks."""
    async with HttpSdServer(port=0, view=registrar, bearer=bearer, tls=tls) as server:
        yield server


async def ask(
    server: HttpSdServer, path: str = SD_PATH, context: ssl.SSLContext | None = None, **headers: str
) -> tuple[int, bytes, CIMultiDictProxy[str]]:
    """Return status, bytes as they came and headers of one GET on a connection of its own.

    A header's `-` is written `_`.
    """
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"{'https' if context else 'http'}://localhost:{server.port}{path}"
    async with (
        aiohttp.ClientSession(auto_decompress=False, skip_auto_headers=["Accept-Encoding"]) as session,
        session.get(url, headers=sent, ssl=context or True) as response,
    ):
        return response.status, await response.read(), response.headers


async def test_filters_narrow_and_combine() -> None:
    """Values of one filter are alternatives, filters must all hold; nothing found is an empty list."""
    registrar = Registrar()
    registrar.put(pod_target("a"), pod_target("b", "search", meta={"shard_path": "shard-2"}), node_target(0))

    async def found(query: str) -> set[str]:
        status, body, headers = await ask(server, f"{SD_PATH}{query}")
        assert (status, headers["Content-Type"]) == (200, "application/json")
        return {group["labels"]["__meta_consul_service_id"] for group in json.loads(body)}

    pods = {"pod--shop--a", "pod--search--b"}
    async with serving(registrar) as server:
        assert await found("") == {*pods, "node--192.0.2.1-0"}
        assert await found("?kind=pod") == pods
        assert await found("?kind=pod&kind=node") == {*pods, "node--192.0.2.1-0"}
        assert await found("?namespace=search") == {"pod--search--b"}
        assert await found("?shard_path=shard-2") == {"pod--search--b"}
        assert await found("?shard_path=shard-2&namespace=shop") == set()
        assert (await ask(server, f"{SD_PATH}?shard=1"))[0] == 400


async def test_until_everything_was_listed_a_collector_keeps_what_it_has() -> None:
    """503 with the reason and when to come again, then 200."""
    registrar = Registrar(missing="pods are not listed yet:\n403")
    async with serving(registrar) as server:
        status, body, headers = await ask(server)
        assert (status, body, headers["Retry-After"]) == (503, b"pods are not listed yet: 403\n", "5")
        registrar.missing = ""
        assert (await ask(server))[:2] == (200, b"[]\n")


async def test_saved_targets_are_served_as_stale_until_the_sources_are_listed() -> None:
    """The same document as before the restart, with its age; filters work; then what was listed, unmarked."""
    before = Registrar(many_targets(300))
    before.put(pod_target("lonely", "quiet"))
    registrar = Registrar(missing="pods are not listed yet")
    saved: list[SavedState | None] = [None]
    async with (
        serving(before) as earlier,
        HttpSdServer(port=0, view=registrar, saved=lambda: saved[0]) as server,
    ):
        assert (await ask(server))[0] == 503
        content = encoded(before.targets(), at=time.time() - 100)
        saved[0] = decode_state(content, ORIGIN, time.time())
        for query in ("", "?namespace=quiet", "?shard_path=shard-1"):
            status, body, headers = await ask(server, SD_PATH + query)
            assert (status, body) == (200, (await ask(earlier, SD_PATH + query))[1])
            assert 99 <= int(headers["Age"]) <= 160
            assert headers["X-Stale-Since"].endswith("Z")
        _, packed, _ = await ask(server, accept_encoding="gzip")
        assert gzip.decompress(packed) == (await ask(earlier))[1]
        status, _, again = await ask(server, if_none_match=(await ask(server))[2]["ETag"])
        assert (status, "Age" in again) == (304, True)
        assert (await ask(server, f"{SD_PATH}?kind=service"))[0] == 400
        registrar.missing = ""
        status, body, headers = await ask(server)
        assert (status, body) == (200, b"[]\n")
        assert not {"Age", "X-Stale-Since"} & headers.keys()
        registrar.missing, saved[0] = "pods are not listed yet", None
        assert (await ask(server))[0] == 503


async def test_only_the_one_path_by_get_is_served() -> None:
    """Another path is a 404, another method a 405, and no answer is a page."""
    async with serving(Registrar()) as server, aiohttp.ClientSession() as session:
        for path in ("/", "/metrics", "/sd/targets/", "/api/v1/targets", "/sd/../api"):
            assert (await ask(server, path))[0] == 404
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            async with session.request(method, f"http://localhost:{server.port}{SD_PATH}") as response:
                assert response.status == 405
                assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_answer_is_rendered_once_until_targets_change() -> None:
    """Many collectors at once cost one walk over the targets; a change costs another and is seen."""
    registrar = Registrar(many_targets(500))
    async with serving(registrar) as server:
        answers = await asyncio.gather(*(ask(server) for _ in range(8)))
        assert len({body for _, body, _ in answers}) == 1
        assert registrar.walks == 1
        status, _, headers = await ask(server, if_none_match=answers[0][2]["ETag"])
        assert status == 304
        registrar.put(pod_target("newcomer"))
        status, body, _ = await ask(server, if_none_match=headers["ETag"])
        assert status == 200
        assert len(json.loads(body)) == 501
        assert registrar.walks == 2


async def test_gzip_and_plain_are_the_same_document() -> None:
    """A large document comes whole either way, with the size told beforehand."""
    async with serving(Registrar(many_targets(3000))) as server:
        _, plain, headers = await ask(server)
        assert int(headers["Content-Length"]) == len(plain)
        _, packed, headers = await ask(server, accept_encoding="gzip")
        assert headers["Content-Encoding"] == "gzip"
        assert len(packed) < len(plain) / 8
        assert gzip.decompress(packed) == plain
        assert len(json.loads(plain)) == 3000


async def test_targets_may_change_while_they_are_rendered() -> None:
    """Changes meanwhile break nothing, and the next answer has them."""
    registrar = Registrar(many_targets(3000))

    async def disturb() -> None:
        for number in range(200):
            del registrar.held[next(iter(registrar.held))]
            registrar.put(pod_target(f"new-{number}"))
            await asyncio.sleep(0)

    async with serving(registrar) as server:
        (status, body, _), _ = await asyncio.gather(ask(server), disturb())
        assert status == 200
        assert len(json.loads(body)) >= 2700
        assert {
            group["labels"]["__meta_consul_service_id"] for group in json.loads((await ask(server))[1])
        } == set(registrar.held)


async def test_eighty_thousand_targets_do_not_stall_the_loop() -> None:
    """While 80,000 targets are looked through, rendered and sent, the loop turns every few milliseconds.

    It is the thread's own time that counts, without what else the machine does; only a whole answer made in
    one piece, which takes a second, reaches the bound on a busy machine.
    """
    registrar = Registrar(many_targets(80_000))
    gc.collect()
    gc.freeze()  # as the daemon does with what it holds
    async with serving(registrar) as server:
        for query, least in (("", 40_000_000), ("?namespace=nobody", 0)):
            asking = asyncio.create_task(_read_all(server, query))
            longest, last = 0.0, time.thread_time()
            while not asking.done():
                await asyncio.sleep(0)
                now = time.thread_time()
                longest, last = max(longest, now - last), now
            assert await asking > least
            assert longest < 0.3, query


async def _read_all(server: HttpSdServer, query: str) -> int:
    """Read an answer without keeping it, and return its size."""
    size = 0
    url = f"http://localhost:{server.port}{SD_PATH}{query}"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers={"Accept-Encoding": ""}) as response,
    ):
        async for piece in response.content.iter_any():
            size += len(piece)
    return size


async def test_caller_without_the_token_gets_nothing(tmp_path: Path) -> None:
    """401 for every path without the token or with another; a new file's token counts from then on."""
    path = tmp_path / "token"
    path.write_text("first\n")
    async with serving(Registrar(), bearer=bearer_tokens(path, "HTTP_SD_BEARER_TOKEN_FILE")) as server:
        status, _, headers = await ask(server)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert (await ask(server, "/nowhere"))[0] == 401
        for wrong in ("Bearer second", "Basic first", "first", "Bearer", "Bearer first\u00fc"):
            assert (await ask(server, authorization=wrong))[0] == 401
        assert (await ask(server, authorization="bearer first"))[0] == 200
        replace(path, "second\n")
        await server.refresh()
        assert (await ask(server, authorization="Bearer first"))[0] == 401
        assert (await ask(server, authorization="Bearer second"))[0] == 200
        replace(path, "\n")
        await server.refresh()
        assert (await ask(server, authorization="Bearer second"))[0] == 200
    with pytest.raises(AccessError, match=r"HTTP_SD_BEARER_TOKEN_FILE .* holds no token"):
        bearer_tokens(path, "HTTP_SD_BEARER_TOKEN_FILE")


def replace(path: Path, text: str | bytes) -> None:
    """Put another file in the place of this one, as a Secret's volume does."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(text if isinstance(text, bytes) else text.encode())
    fresh.replace(path)


class Certificates:
    """An authority, a server's files it signed, and clients."""

    def __init__(self, folder: Path, *, asks_clients: bool = True) -> None:
        self.authority = trustme.CA()
        self.clients = trustme.CA()
        self.certificate, self.key, self.client_ca = folder / "tls.crt", folder / "tls.key", folder / "ca.crt"
        self.asks_clients = asks_clients
        self.issue()

    def issue(self) -> None:
        """Write the server's files again."""
        pair = self.authority.issue_cert("localhost")
        replace(self.certificate, b"".join(pem.bytes() for pem in pair.cert_chain_pems))
        replace(self.key, pair.private_key_pem.bytes())
        replace(self.client_ca, self.clients.cert_pem.bytes())

    def tls(self) -> ServerTls:
        """Read the server's files."""
        client_ca = self.client_ca if self.asks_clients else None
        return server_tls(self.certificate, self.key, client_ca, setting="HTTP_SD_TLS")

    def client(self, clients: trustme.CA | None = None) -> ssl.SSLContext:
        """Return a client that trusts the authority and shows a certificate of `clients` if given."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if clients is not None:
            clients.issue_cert("prometheus").configure_cert(context)
        return context


async def test_client_needs_a_certificate_of_the_authority(tmp_path: Path) -> None:
    """Without one, or with a stranger's, there is no answer."""
    made = Certificates(tmp_path)
    async with serving(Registrar(), tls=made.tls()) as server:
        assert (await ask(server, context=made.client(made.clients)))[0] == 200
        for stranger in (None, trustme.CA()):
            with pytest.raises((aiohttp.ClientError, OSError)):
                await ask(server, context=made.client(stranger))


async def test_another_authority_of_clients_locks_out_the_old_ones(tmp_path: Path) -> None:
    """After the file changed, new connections and kept ones alike need the new authority's certificate."""
    made = Certificates(tmp_path)
    before = made.client(made.clients)
    async with serving(Registrar(), tls=made.tls()) as server:
        url = f"https://localhost:{server.port}{SD_PATH}"
        async with aiohttp.ClientSession() as kept:
            async with kept.get(url, ssl=before) as response:
                assert response.status == 200
            made.clients = trustme.CA()
            made.issue()
            await server.refresh()
            with pytest.raises((aiohttp.ClientError, OSError)):
                async with kept.get(url, ssl=before) as response:
                    await response.read()
        with pytest.raises((aiohttp.ClientError, OSError)):
            await ask(server, context=before)
        assert (await ask(server, context=made.client(made.clients)))[0] == 200


async def test_files_caught_half_way_leave_the_old_in_force(tmp_path: Path) -> None:
    """A key that is not of the certificate changes nothing; the certificate that follows counts."""
    made = Certificates(tmp_path, asks_clients=False)
    first = made.authority
    tls = made.tls()
    async with serving(Registrar(), tls=tls) as server:
        replace(made.key, trustme.CA().issue_cert("localhost").private_key_pem.bytes())
        await server.refresh()
        assert (await ask(server, context=made.client()))[0] == 200
        made.key.unlink()
        await server.refresh()
        assert (await ask(server, context=made.client()))[0] == 200
        made.authority = trustme.CA()
        made.issue()
        await server.refresh()
        assert (await ask(server, context=made.client()))[0] == 200
        made.authority = first
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await ask(server, context=made.client())


def test_unusable_tls_files_are_told_by_their_setting(tmp_path: Path) -> None:
    """Each fault names the setting and the file, and shows nothing of the key."""
    made = Certificates(tmp_path)
    made.client_ca.write_text("no certificate")
    with pytest.raises(AccessError, match=r"HTTP_SD_TLS_CLIENT_CA_FILE .*ca\.crt: holds no PEM certificate"):
        made.tls()
    made.key.write_text("no key")
    with pytest.raises(
        AccessError, match=r"HTTP_SD_TLS_CERT_FILE .*tls\.crt with .*tls\.key: holds no PEM private key"
    ):
        made.tls()
    made.certificate.unlink()
    with pytest.raises(AccessError, match="No such file"):
        made.tls()


async def test_taken_port_is_told_by_its_setting() -> None:
    """A second server fails with the setting's name."""
    async with serving(Registrar()) as server:
        with pytest.raises(OperationalError, match=f"HTTP_SD_PORT {server.port} .*: Address already in use"):
            async with HttpSdServer(port=server.port, view=Registrar()):
                pass
