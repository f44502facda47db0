"""Authentication and authorization: users by token or certificate name, and their RBAC-like rules."""

import secrets
from collections.abc import Iterable
from typing import NamedTuple

from k8s_consul_registrar.sandbox.api_errors import forbidden, unauthorized
from k8s_consul_registrar.sandbox.resources import Resource


class Rule(NamedTuple):
    """The right to a verb on a resource (`pods`, `pods/status`, `nodes/metrics`); `*` stands for any."""

    verb: str
    resource: str
    namespace: str = "*"


class Attempt(NamedTuple):
    """A request to authorize; `name` is empty for a whole collection."""

    verb: str
    resource: Resource
    namespace: str = ""
    name: str = ""
    subresource: str = ""


ADMIN = (Rule("*", "*"),)


class Access:
    """The users of a sandbox cluster, for its API server and its kubelets."""

    def __init__(self) -> None:
        self._tokens: dict[str, str] = {}
        self._rules: dict[str, tuple[Rule, ...]] = {}

    def grant(self, user: str, rules: Iterable[Rule | tuple[str, ...]] = ADMIN, token: str = "") -> str:
        """Replace a user's rules, and return a token of the user."""
        self._rules[user] = tuple(Rule(*rule) for rule in rules)
        token = token or secrets.token_urlsafe(24)
        self._tokens[token] = user
        return token

    def revoke(self, token: str) -> None:
        """Forget a token."""
        self._tokens.pop(token, None)

    def user(self, authorization: str, certificate_name: str = "") -> str:
        """Return the user of an Authorization header, else of a certificate; ApiError 401 without either."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "bearer" and (user := self._tokens.get(token.strip())):
            return user
        if not authorization and certificate_name in self._rules:
            return certificate_name
        raise unauthorized()

    def allows(self, user: str, verb: str, resource: str, namespace: str = "") -> bool:
        """Return True if the user has a rule for this; an empty namespace means the whole cluster."""
        return any(
            rule.verb in ("*", verb)
            and rule.resource in ("*", resource)
            and rule.namespace in ("*", namespace)
            for rule in self._rules.get(user, ())
        )

    def require(self, user: str, attempt: Attempt) -> None:
        """Raise ApiError 403 with the API server's text unless the user has the right."""
        resource = attempt.resource
        full = f"{resource.plural}/{attempt.subresource}" if attempt.subresource else resource.plural
        if self.allows(user, attempt.verb, full, attempt.namespace):
            return
        scope = f'in the namespace "{attempt.namespace}"' if attempt.namespace else "at the cluster scope"
        what = (
            f'User "{user}" cannot {attempt.verb} resource "{full}" in API group "{resource.group}" {scope}'
        )
        raise forbidden(resource, attempt.subresource, attempt.name, what)
