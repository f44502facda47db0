"""Who may do what: tokens and certificate names stand for users, users have rules, as RBAC has."""

import secrets
from collections.abc import Iterable
from typing import NamedTuple

from k8s_consul_registrar.sandbox.api_errors import forbidden, unauthorized
from k8s_consul_registrar.sandbox.resources import Resource


class Rule(NamedTuple):
    """Allows a verb on a resource (`pods`, `pods/status`, `nodes/metrics`); `*` stands for any."""

    verb: str
    resource: str
    namespace: str = "*"


class Attempt(NamedTuple):
    """What someone wants to do; `name` is empty for a whole collection."""

    verb: str
    resource: Resource
    namespace: str = ""
    name: str = ""
    subresource: str = ""


ADMIN = (Rule("*", "*"),)


class Access:
    """The users of a sandbox cluster, shared by its API server and its kubelets."""

    def __init__(self) -> None:
        self._tokens: dict[str, str] = {}
        self._rules: dict[str, tuple[Rule, ...]] = {}

    def grant(self, user: str, rules: Iterable[Rule | tuple[str, ...]] = ADMIN, token: str = "") -> str:
        """Give a user these rules instead of the ones before, and return a token that stands for them."""
        self._rules[user] = tuple(Rule(*rule) for rule in rules)
        token = token or secrets.token_urlsafe(24)
        self._tokens[token] = user
        return token

    def revoke(self, token: str) -> None:
        """Forget a token."""
        self._tokens.pop(token, None)

    def user(self, authorization: str, certificate_name: str = "") -> str:
        """Return who sends an Authorization header, or else shows a certificate; ApiError 401 if nobody."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "bearer" and (user := self._tokens.get(token.strip())):
            return user
        if not authorization and certificate_name in self._rules:
            return certificate_name
        raise unauthorized()

    def allows(self, user: str, verb: str, resource: str, namespace: str = "") -> bool:
        """Return whether the user has a rule for this; an empty namespace means the whole cluster."""
        return any(
            rule.verb in ("*", verb)
            and rule.resource in ("*", resource)
            and rule.namespace in ("*", namespace)
            for rule in self._rules.get(user, ())
        )

    def require(self, user: str, attempt: Attempt) -> None:
        """Raise ApiError 403 with the API server's own words unless the user may do this."""
        resource = attempt.resource
        full = f"{resource.plural}/{attempt.subresource}" if attempt.subresource else resource.plural
        if self.allows(user, attempt.verb, full, attempt.namespace):
            return
        scope = f'in the namespace "{attempt.namespace}"' if attempt.namespace else "at the cluster scope"
        what = (
            f'User "{user}" cannot {attempt.verb} resource "{full}" in API group "{resource.group}" {scope}'
        )
        raise forbidden(resource, attempt.subresource, attempt.name, what)
