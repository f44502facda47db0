"""The status page: a few files that come with the package, served with the strictest policy a page can have."""

import hashlib
from importlib import resources

from aiohttp import web

# Everything comes from here and nothing is written inside the page; the page never makes HTML out of text
# (trusted-types 'none' lets the browser refuse it). https://www.w3.org/TR/CSP3/
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
FILES = ("page.html", "page.css", "page.js", "parts.js", "views.js", "words.js", "icon.svg")


def page_routes() -> list[web.RouteDef]:
    """Return `/` and the files the page is made of; it reads `api.api_routes`, by relative addresses."""
    return [_route(name) for name in FILES]


def _route(name: str) -> web.RouteDef:
    body = (resources.files(__package__) / "static" / name).read_bytes()
    tag = hashlib.blake2b(body, digest_size=12).hexdigest()
    headers = {
        **_HEADERS,
        "Content-Type": f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8",
        "ETag": f'"{tag}"',
    }

    async def file(request: web.Request) -> web.Response:
        if any(known.value == tag for known in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, headers=headers)

    return web.get("/" if name == "page.html" else f"/{name}", file, allow_head=False)
