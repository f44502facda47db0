"""Whom scrapes are of: kubelets, or Pods; each kind with what its scrapes share and nothing of the other's."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from k8s_consul_registrar.proxy.limits import Concurrency, Limits
from k8s_consul_registrar.proxy.nodes import Endpoint
from k8s_consul_registrar.proxy.outcomes import Refusal
from k8s_consul_registrar.proxy.pod_route import Pods
from k8s_consul_registrar.proxy.pool import Pool


class TokenSource(Protocol):
    """Where the bearer token for kubelets comes from; it is asked at every scrape and must not block."""

    def __call__(self) -> str:
        """Return the current token, empty for none; raises OperationalError where it cannot be had."""


@dataclass(frozen=True, slots=True)
class Peers:
    """One kind of those who are scraped.

    `context` is that of the moment, None for plain connections; `token` what is shown to them; `limits` and
    `pool` are theirs alone, so that the one kind can neither starve the other nor meet its connections.
    `is_current` says whether one may still be asked, `unknown` is the answer where it may not, and `worded`
    turns a refusal into one about them.
    """

    context: Callable[[], ssl.SSLContext | None]
    token: TokenSource
    limits: Limits
    pool: Pool
    is_current: Callable[[Endpoint], bool]
    unknown: Refusal
    worded: Callable[[Refusal], Refusal]


@dataclass(frozen=True, slots=True)
class PodAccess:
    """How Pods are reached: which of them, whom to believe to be one, and how many scrapes may run."""

    pods: Pods
    context: Callable[[], ssl.SSLContext]
    concurrency: Concurrency
    kept_connections: int = 8192


def no_token() -> str:
    """Return none: a Pod is never shown who we are to kubelets."""
    return ""


def no_context() -> None:
    """Return none: the connection is a plain one."""


def as_it_is(refusal: Refusal) -> Refusal:
    """Return a refusal that is about kubelets already."""
    return refusal
