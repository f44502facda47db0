"""Consul's ACLs in the sandbox: tokens with all rights or none, and logins by auth methods; pure.

Statuses and texts: consul 1.8 `agent/acl_endpoint.go`, `agent/consul/acl_endpoint.go`, seen on 1.8.7;
denials of later releases: `acl/errors.go`.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from k8s_consul_registrar.sandbox.consul_model import DEFAULT_NAMESPACE, Json
from k8s_consul_registrar.sandbox.consul_release import AuthMethod, Bearer, ConsulOptions
from k8s_consul_registrar.sandbox.consul_rules import HttpError, RefusedError, decode_object, text_field

ANONYMOUS = "anonymous"  # the secret of the token that stands for requests without one
_ROLE = {"ID": "31cad8c2-61d6-904d-a112-ec3d9b3e9bcf", "Name": "registrar"}


class Right(NamedTuple):
    """A right in Consul's words, such as `service:write`; `name` is empty where no record has one."""

    right: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class _Token:
    """A known token; `method` is the auth method of the login that made it, `expires` 0 for never.

    `namespace` is the only one of Enterprise in which it has rights, empty for all.
    """

    accessor: str
    has_all: bool
    method: str = ""
    namespace: str = ""
    expires: float = 0.0


class Tokens:
    """The tokens of one Consul cluster; without a management token its ACLs are off."""

    def __init__(self, options: ConsulOptions, *, clock: Callable[[], float] = time.time) -> None:
        self._release = options.release
        self._is_enterprise = options.is_enterprise
        self._methods = {method.name: method for method in options.auth_methods}
        self._clock = clock
        self._known: dict[str, _Token] = {}
        self.is_enabled = bool(options.token)
        if self.is_enabled:
            self.create(options.token)
            for secret in (ANONYMOUS, *options.blind_tokens):
                self.create(secret, has_all=False)

    def create(self, secret: str, *, has_all: bool = True, namespace: str = "") -> None:
        """Make a token with all rights, or with none; in Enterprise those of one namespace only, if given."""
        self._known[secret] = _Token(str(uuid.uuid4()), has_all, namespace=namespace)

    def sees(self, secret: str, namespace: str) -> bool:
        """Return True if a token's rights reach into a namespace of Enterprise."""
        token = self._find(secret or ANONYMOUS) if self.is_enabled else None
        return token is None or token.namespace in ("", namespace or DEFAULT_NAMESPACE)

    def revoke(self, secret: str) -> None:
        """Forget a token."""
        self._known.pop(secret, None)

    def add_method(self, method: AuthMethod) -> None:
        """Create an auth method, or replace the one of its name."""
        self._methods[method.name] = method

    @property
    def logged_in(self) -> tuple[str, ...]:
        """The secrets of the tokens that logins made and that are still known."""
        return tuple(one for one, token in self._known.items() if token.method and self._find(one))

    def is_known(self, secret: str) -> bool:
        """Return True if Consul knows the token, or has no ACLs."""
        return not self.is_enabled or self._find(secret or ANONYMOUS) is not None

    def has_all(self, secret: str) -> bool:
        """Return True if the token has all rights; HttpError 403 if Consul does not know it."""
        if not self.is_enabled:
            return True
        if (token := self._find(secret or ANONYMOUS)) is None:
            raise HttpError(403, "ACL not found")
        return token.has_all

    def denial(self, secret: str, right: Right) -> str:
        """Return the text that denies a right to a token."""
        token = self._find(secret or ANONYMOUS)
        if not self._release.explains_denials or token is None:
            return "Permission denied"
        is_anonymous = secret in ("", ANONYMOUS)
        who = "anonymous token" if is_anonymous else f"token with AccessorID '{token.accessor}'"
        subject = f' on "{right.name}"' if right.name else ""
        hint = ". The anonymous token is used implicitly when a request does not specify a token."
        return f"Permission denied: {who} lacks permission '{right.right}'{subject}{hint if is_anonymous else ''}"

    def login(self, body: bytes) -> Json:
        """Return a new token for the bearer token in a request's body; HttpError as Consul refuses it."""
        if not self.is_enabled:
            raise HttpError(401, "ACL support disabled")
        try:
            fields = decode_object(body)
            name, bearer = text_field(fields, "AuthMethod"), text_field(fields, "BearerToken")
        except RefusedError as error:
            text = str(error).replace("struct field .", "struct field ACLLoginParams.")
            raise self._bad_request(f"Failed to decode request body: {text}") from None
        if "Namespace" in fields:
            raise self._bad_request(
                'Failed to decode request body: json: unknown field "Namespace" '
                "- Namespaces are a Consul Enterprise feature"
            )
        if (method := self._methods.get(name)) is None:
            cause = f': auth method "{name}" not found' if self._release.explains_denials else ""
            raise HttpError(403, f"ACL not found{cause}")
        _require_bound(method, bearer)
        return self._issue(method, fields.get("Meta") or {})

    def logout(self, secret: str) -> None:
        """Forget a token that a login made; HttpError 403 for any other."""
        if not self.is_enabled:
            raise HttpError(401, "ACL support disabled")
        if not secret or (token := self._find(secret)) is None:
            raise HttpError(403, "ACL not found")
        if not token.method:
            cause = ": token wasn't created via login" if self._release.explains_denials else ""
            raise HttpError(403, f"Permission denied{cause}")
        self.revoke(secret)

    def refuse_namespace(self, query: Mapping[str, str]) -> None:
        """Raise HttpError 400 for a request that names a namespace, unless this is Enterprise."""
        if "ns" in query and not self._is_enterprise:
            raise self._bad_request(
                'Invalid query parameter: "ns" - Namespaces are a Consul Enterprise feature'
            )

    def _find(self, secret: str) -> _Token | None:
        token = self._known.get(secret)
        is_expired = token is not None and 0 < token.expires <= self._clock()
        return None if is_expired else token

    def _issue(self, method: AuthMethod, meta: Mapping[str, Any]) -> Json:
        now = self._clock()
        secret = str(uuid.uuid4())
        expires = now + method.max_token_ttl if method.max_token_ttl else 0.0
        token = _Token(str(uuid.uuid4()), has_all=True, method=method.name, expires=expires)
        self._known[secret] = token
        described = f": {msgspec.json.encode(meta).decode()}" if meta else ""
        return {
            "AccessorID": token.accessor,
            "SecretID": secret,
            "Description": f"token created via login{described}",
            "Roles": [_ROLE],
            "Local": True,
            "AuthMethod": method.name,
            **({"ExpirationTime": _time(expires)} if expires else {}),
            "CreateTime": _time(now),
            "Hash": "Jy6VAw0R4xNLBg1ajcyUkv5bkODV1ugPUGCBQ0pfXbc=",
            "CreateIndex": 14,
            "ModifyIndex": 14,
        }

    def _bad_request(self, text: str) -> HttpError:
        return HttpError(400, f"{self._release.bad_request}{text}")


def _require_bound(method: AuthMethod, bearer: str) -> None:
    match method.bearers.get(bearer):
        case Bearer.BOUND:
            return
        case Bearer.UNBOUND:
            raise HttpError(403, "Permission denied")
        case Bearer.EXPIRED:
            raise HttpError(
                500, "error validating claims: square/go-jose/jwt: validation failed, token is expired (exp)"
            )
    if not bearer:
        raise HttpError(500, "missing jwt")
    raise HttpError(500, "error parsing token: square/go-jose: compact JWS format must have three parts")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
