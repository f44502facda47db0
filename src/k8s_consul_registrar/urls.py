"""URLs and host names that our HTTP clients can use, judged before the first request."""

import ipaddress
import re
from urllib.parse import urlsplit

from yarl import URL

LONGEST_HOST = 253  # bytes, RFC 1035
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


class _UnusableError(ValueError):
    """The text says why; it never quotes the URL, which may hold a password."""


def check_url(url: str) -> str:
    """Return why no request can be sent to this http or https URL, empty if one can."""
    try:
        _refuse_unprintable(url)
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0:
            return "is not a URL with a host"
        if _BROKEN_ESCAPE.search(url):
            return "holds a % that begins no escape"
        _refuse_host(parts.hostname, is_bracketed="[" in parts.netloc)
        _refuse_unbuildable(url)
    except _UnusableError as error:
        return str(error)
    except ValueError:
        return "is not a URL with a host"
    return ""


def check_host(host: str) -> str:
    """Return why a host name or address cannot be connected to or verified, empty if it can."""
    try:
        _refuse_host(host, is_bracketed=False)
    except _UnusableError as error:
        return str(error)
    return ""


def _refuse_host(host: str, *, is_bracketed: bool) -> None:
    """Raise _UnusableError for a host that the resolver or OpenSSL cannot encode.

    Both use Python's `idna` codec, which raises UnicodeError for empty labels and for labels of more than
    63 bytes.
    """
    _refuse_unprintable(host)
    if "%" in host:
        raise _UnusableError("has a zone or an escape in its host, which is not supported")
    if is_bracketed or ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _UnusableError("has no IPv6 address where one is expected") from None
        return
    try:
        encoded = host.encode("idna")
    except UnicodeError:
        raise _UnusableError("has a host name with an empty, too long or unfit label") from None
    if not encoded.strip(b".") or len(encoded) > LONGEST_HOST:
        raise _UnusableError(f"has a host name that is empty or longer than {LONGEST_HOST} characters")


def _refuse_unbuildable(url: str) -> None:
    """Raise _UnusableError for a URL that yarl or aiohttp cannot send."""
    try:
        built = URL(url)
        if built.user is not None or built.password is not None:
            _refuse_credentials(built)
        _refuse_host(built.raw_host or "", is_bracketed=False)
        str(built).encode("ascii")
    except _UnusableError:
        raise
    except (ValueError, TypeError):
        raise _UnusableError("has a host, user or password that cannot be used") from None


def _refuse_credentials(url: URL) -> None:
    """Raise ValueError for what aiohttp cannot send as Basic credentials, in Latin-1."""
    from aiohttp import BasicAuth  # noqa: PLC0415 - a third of the time of `--help`, for a rare URL

    credentials = BasicAuth.from_url(url)
    if credentials is not None:
        credentials.encode()


def _refuse_unprintable(text: str) -> None:
    if any(char.isspace() or not char.isprintable() for char in text):
        raise _UnusableError("holds spaces or control characters")
