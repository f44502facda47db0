"""URLs that no request can be sent to are refused before the first one, and the others work."""

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from k8s_consul_registrar.urls import check_host, check_url

GOOD = [
    "http://127.0.0.1:1",
    "https://api.example:6443",
    "https://api.example:6443/",
    "https://api.example./prefix/of/it",
    "http://consul_server:8500",
    "http://-a-:8500",
    "http://ex_ample-:6443",
    "http://[::1]:6443",
    "http://[fd00::1]",
    "https://bücher.example",
    "https://xn--bcher-kva.example",
    "http://api.example/%20x",
    "http://" + "a" * 63 + ".x:6443",
    "http://1.2",
    "HTTP://API.EXAMPLE",
    "http://me:pw@proxy.example:3128",
    "http://me:p%40w@proxy.example:3128",
]
BAD = [
    "",
    "http://",
    "http://:80",
    "http://a..b:6443",
    "http://.example",
    "http://" + "a" * 64 + ".x:6443",
    "http://" + "a." * 130 + "x",
    "http://[::1%25eth0]:6443",
    "http://[fe80::1%eth0]:6443",
    "http://[::1",
    "http://[::g]",
    "http://[v1.x]",
    "http://exa mple:6443",
    "http://exa\tmple:6443",
    "http://example:6443\n",
    "http://\u2028x:6443",
    "http://x\u200b:6443",
    "http://\u202ex",
    "http://x\x7f",
    "http://x\x00",
    "http://\ud800",
    "http://127.0.0.1:1/%zz",
    "http://127.0.0.1:1/%",
    "http://%zz",
    "http://a%20b",
    "http://x:99999",
    "http://x:0",
    "http://x:-1",
    "http://x:\u0661",
    "http://x:port",
    "http://me%3A:pw@proxy.example",
    "http://m\u20ac:pw@proxy.example",
    "http://me:p%E2%82%AC@proxy.example",
    "http://" + "ü" * 63 + ".x",
    "http://a\u3002\u3002b",
]


@pytest.mark.parametrize("url", GOOD)
def test_url_of_a_host_is_good(url: str) -> None:
    """Names of containers with underscores among them."""
    assert check_url(url) == ""


@pytest.mark.parametrize("url", BAD, ids=ascii)
def test_url_that_no_request_can_be_sent_to_is_refused(url: str) -> None:
    """With words, and without a word of it."""
    problem = check_url(url)
    assert problem
    assert "pw" not in problem
    assert "\n" not in problem


class Nowhere(AbstractResolver):
    """A resolver that encodes a name as the system's does, and finds nothing."""

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        """Find nothing."""
        host.encode("idna")
        raise OSError(f"there is no {host}")

    async def close(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("url", [url for url in GOOD if "fd00" not in url], ids=ascii)
async def test_good_url_raises_nothing_but_a_connection_s_errors(url: str) -> None:
    """Whatever the client makes of it: a check that is too lax would end the daemon."""
    connector = aiohttp.TCPConnector(resolver=Nowhere())
    async with aiohttp.ClientSession(connector=connector) as session:
        with pytest.raises((aiohttp.ClientError, OSError)):
            await session.get(f"{url.rstrip('/')}/api", allow_redirects=False)
        with pytest.raises((aiohttp.ClientError, OSError)):
            await session.get("http://api.example/", proxy=url)


@pytest.mark.parametrize(
    "host", ["api.example", "10.0.0.1", "::1", "server.dc1.consul", "_x", "bücher.example"]
)
def test_name_in_a_certificate_is_good(host: str) -> None:
    """Names and addresses."""
    assert check_host(host) == ""


@pytest.mark.parametrize(
    "host", ["", ".", "..", "a..b", ".a", "a b", "a" * 64, "::g", "fe80::1%eth0", "a\n", "a\u2028b"]
)
def test_name_that_openssl_cannot_encode_is_refused(host: str) -> None:
    """It was a UnicodeError at each connection."""
    assert check_host(host)
