"""Sending bodies with gzip where the request allows it."""

import zlib

from aiohttp import web

GZIP = 16 + zlib.MAX_WBITS  # zlib's way of asking for gzip's framing


def accepts_gzip(request: web.BaseRequest) -> bool:
    """Return whether the request names gzip among its encodings, without a weight of zero."""
    for offer in request.headers.get("Accept-Encoding", "").lower().split(","):
        name, _, weight = offer.strip().partition(";")
        if name.strip() == "gzip" and weight.replace(" ", "") not in ("q=0", "q=0.0"):
            return True
    return False


def compress(body: bytes) -> bytes:
    """Return the body in gzip, at the level servers use (1: speed)."""
    return zlib.compress(body, 1, wbits=GZIP)
