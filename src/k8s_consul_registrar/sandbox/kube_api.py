"""The sandbox's Kubernetes API server: routes, authentication, permissions and refusals."""

import ssl
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Self

import msgspec
from aiohttp import web

from k8s_consul_registrar.sandbox import api_errors, objects
from k8s_consul_registrar.sandbox.access import Access, Attempt
from k8s_consul_registrar.sandbox.api_errors import ApiError
from k8s_consul_registrar.sandbox.kube_read import Reader
from k8s_consul_registrar.sandbox.kube_write import Writer, json_response
from k8s_consul_registrar.sandbox.registry import Registry
from k8s_consul_registrar.sandbox.resources import NAMESPACES, RESOURCES, Resource, resource_of
from k8s_consul_registrar.sandbox.server import Server
from k8s_consul_registrar.sandbox.store import Store
from k8s_consul_registrar.sandbox.watching import is_true

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Verb = Callable[[web.Request, Attempt], Awaitable[web.StreamResponse]]
_OPEN_PATHS = frozenset({"/version", "/livez", "/readyz", "/healthz"})
_VERSION = {"major": "1", "minor": "36", "gitVersion": "v1.36.0", "platform": "linux/amd64"}
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_LARGEST_BODY = 3 * 1024 * 1024  # bytes, the limit of a real API server
_INITIAL_NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")


class KubeApi:
    """A Kubernetes API server over a store; an asynchronous context manager.

    `bookmark_period` is in seconds; `can_stream_lists` is the feature gate WatchList, off on servers
    before 1.32 and on 1.33.
    """

    def __init__(
        self,
        access: Access,
        tls: ssl.SSLContext,
        *,
        store: Store | None = None,
        port: int = 0,
        bookmark_period: float = 60,
        can_stream_lists: bool = True,
    ) -> None:
        self.store = store or Store()
        self._access = access
        self._registry = Registry(self.store)
        self._reader = Reader(self.store, bookmark_period=bookmark_period, can_stream_lists=can_stream_lists)
        self._writer = Writer(self._registry)
        self._verbs: Mapping[str, _Verb] = {
            "list": self._reader.list,
            "watch": self._reader.watch,
            "create": self._writer.create,
            "update": self._writer.update,
            "patch": self._writer.patch,
            "delete": self._writer.delete,
            "deletecollection": self._writer.delete_collection,
        }
        self._requests: Counter[tuple[str, str]] = Counter()
        self._flow = {
            f"X-Kubernetes-Pf-{name}-Uid": str(uuid.uuid4()) for name in ("Flowschema", "Prioritylevel")
        }
        self._server = Server(self._application(), port=port, tls=tls)
        for name in _INITIAL_NAMESPACES:
            self._registry.seed(NAMESPACES, objects.namespace(name))

    @property
    def url(self) -> str:
        """The root of the API."""
        return self._server.url

    async def __aenter__(self) -> Self:
        await self._server.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._server.__aexit__()

    def create(self, obj: Mapping[str, Any]) -> dict[str, Any]:
        """Write an object as given, with its status, and its namespace if that is missing."""
        resource = resource_of(obj["kind"])
        namespace = obj["metadata"].get("namespace", "default")
        if resource.is_namespaced and self.store.get(NAMESPACES, namespace) is None:
            self._registry.seed(NAMESPACES, objects.namespace(namespace))
        return self._registry.seed(resource, obj).decode()

    update = create

    def delete(self, kind: str, name: str, namespace: str = "default", *, grace: int = 0) -> None:
        """Delete an object, at once or after `grace` seconds; ApiError 404 if there is none."""
        resource = resource_of(kind)
        namespace = namespace if resource.is_namespaced else ""
        self._writer.begin_deletion(resource, namespace, name, grace=grace)

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=_LARGEST_BODY)
        app.on_response_prepare.append(self._add_headers)
        for path in ("/livez", "/readyz", "/healthz"):
            app.router.add_get(path, _ok)
        app.router.add_get("/version", _version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post(_REVIEWS, self._review)
        for resource in RESOURCES:
            self._add_routes(app.router, resource)
        return app

    def _add_routes(self, router: web.UrlDispatcher, resource: Resource) -> None:
        collection = f"{resource.root}/{resource.plural}"
        router.add_route("GET", collection, self._handler("list", resource))
        if resource.is_namespaced:
            collection = f"{resource.root}/namespaces/{{namespace}}/{resource.plural}"
            router.add_route("GET", collection, self._handler("list", resource))
        router.add_route("POST", collection, self._handler("create", resource))
        router.add_route("DELETE", collection, self._handler("deletecollection", resource))
        for subresource in ("", "status") if resource.has_status else ("",):
            path = f"{collection}/{{name}}/{subresource}".rstrip("/")
            for method, verb in (("GET", "get"), ("PUT", "update"), ("PATCH", "patch")):
                router.add_route(method, path, self._handler(verb, resource, subresource))
        router.add_route("DELETE", f"{collection}/{{name}}", self._handler("delete", resource))

    def _handler(self, verb: str, resource: Resource, subresource: str = "") -> _Handler:
        return partial(self._serve, verb, resource, subresource)

    async def _serve(
        self, verb: str, resource: Resource, subresource: str, request: web.Request
    ) -> web.StreamResponse:
        if verb == "list" and is_true(request.query.get("watch", "")):
            verb = "watch"
        self._requests[verb.upper(), resource.plural] += 1
        match = request.match_info
        namespace, name = match.get("namespace", ""), match.get("name", "")
        attempt = Attempt(verb, resource, namespace, name, subresource)
        self._access.require(self._user(request), attempt)
        if verb == "get":
            return json_response(self._reader.get(attempt))
        return await self._verbs[verb](request, attempt)

    async def _review(self, request: web.Request) -> web.Response:
        """Answer a SelfSubjectAccessReview."""
        review = msgspec.json.decode(await request.read())
        spec = review.get("spec") or {}
        asked = spec.get("resourceAttributes") or {}
        plural, subresource = asked.get("resource", ""), asked.get("subresource", "")
        is_allowed = self._access.allows(
            self._user(request),
            asked.get("verb", ""),
            f"{plural}/{subresource}" if subresource else plural,
            asked.get("namespace", ""),
        )
        answer = {
            "kind": "SelfSubjectAccessReview",
            "apiVersion": "authorization.k8s.io/v1",
            "metadata": {},
            "spec": spec,
            "status": {"allowed": is_allowed},
        }
        return json_response(msgspec.json.encode(answer) + b"\n", status=201)

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Refuse unknown users, and turn refusals into Status objects."""
        try:
            if request.path not in _OPEN_PATHS or "Authorization" in request.headers:
                self._user(request)
            return await handler(request)
        except ApiError as error:
            refusal = error
        except web.HTTPNotFound:
            return web.Response(text="404 page not found\n", status=404)
        except web.HTTPMethodNotAllowed:
            refusal = api_errors.method_not_allowed()
        response = json_response(msgspec.json.encode(refusal.status()) + b"\n", status=refusal.code)
        response.headers.update(refusal.headers)
        return response

    async def _metrics(self, request: web.Request) -> web.Response:
        """Count the requests, with those labels of the real metric that matter here."""
        self._user(request)
        lines = [
            f'apiserver_request_total{{verb="{verb}",resource="{resource}"}} {count}\n'
            for (verb, resource), count in sorted(self._requests.items())
        ]
        return web.Response(text="".join(lines))

    def _user(self, request: web.Request) -> str:
        """Return the user of the request; ApiError 401 if it shows no known credentials."""
        return self._access.user(request.headers.get("Authorization", ""), _certificate_name(request))

    async def _add_headers(self, _: web.Request, response: web.StreamResponse) -> None:
        response.headers["Audit-Id"] = str(uuid.uuid4())
        response.headers["Cache-Control"] = "no-cache, private"
        if response.status != 401:
            response.headers.update(self._flow)


async def _ok(_: web.Request) -> web.Response:
    return web.Response(text="ok")


async def _version(_: web.Request) -> web.Response:
    return json_response(msgspec.json.encode(_VERSION))


def _certificate_name(request: web.Request) -> str:
    """Return the common name of the client's verified certificate, empty without one."""
    transport = request.transport
    certificate = transport.get_extra_info("peercert") if transport else None
    for attributes in (certificate or {}).get("subject", ()):
        for key, value in attributes:
            if key == "commonName":
                return str(value)
    return ""
