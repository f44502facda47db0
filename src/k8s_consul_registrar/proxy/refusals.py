"""Answers of the proxy's own: why a request was denied or its upstream failed, in words an operator can act on."""

import os
import re
import ssl
from enum import StrEnum
from http import HTTPStatus
from typing import NamedTuple

from k8s_consul_registrar import tls
from k8s_consul_registrar.proxy.nodes import KUBELET


class Outcome(StrEnum):
    """Result of a request to the proxy; a fixed set, fit for a metric's label."""

    OK = "ok"
    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    HANDSHAKE = "tls_handshake_failed"
    METHOD = "method_not_allowed"
    UNKNOWN_PATH = "unknown_path"
    UNKNOWN_NODE = "unknown_node"
    UNKNOWN_POD = "unknown_pod"
    NODES_UNKNOWN = "nodes_not_yet_known"
    PODS_UNKNOWN = "pods_not_yet_known"
    BUSY = "too_many_scrapes"
    NO_CREDENTIALS = "no_credentials"
    UNREACHABLE = "kubelet_unreachable"
    UNVERIFIED = "kubelet_unverified"
    FORBIDDEN = "kubelet_forbids"
    ANSWERED = "kubelet_other_status"
    MALFORMED = "kubelet_malformed"
    POD_UNREACHABLE = "pod_unreachable"
    POD_UNVERIFIED = "pod_unverified"
    POD_ANSWERED = "pod_other_status"
    POD_MALFORMED = "pod_malformed"
    TIMEOUT = "timeout"
    CUT = "cut"
    CALLER_LEFT = "caller_left"
    CALLER_STALLED = "caller_stalled"


class Refusal(NamedTuple):
    """An answer in place of an upstream's; `reason` is for people and echoes nothing that a client sent."""

    status: int
    outcome: Outcome
    reason: str


TIMED_OUT = Refusal(504, Outcome.TIMEOUT, "the kubelet did not answer within the scrape's timeout")
TOO_SHORT = Refusal(
    504, Outcome.CALLER_LEFT, "the timeout that the client announces is too short to judge the kubelet by"
)
WAITED_OUT = Refusal(503, Outcome.BUSY, "no place for this scrape came free within its timeout")
QUEUE_FULL = Refusal(503, Outcome.BUSY, "too many scrapes wait already")
NO_CREDENTIALS = Refusal(503, Outcome.NO_CREDENTIALS, "the credentials for kubelets cannot be read")
CLOSED_EARLY = Refusal(502, Outcome.UNREACHABLE, "the kubelet closed the connection without an answer")
UNSOUND_NAME = Refusal(502, Outcome.UNVERIFIED, "the Node's name cannot be the name in a certificate")
UNAUTHORIZED = Refusal(401, Outcome.UNAUTHORIZED, "a bearer token is needed, or another one")
# Where Pods are relayed: the registrar, which has no token, sees by it that they are.
UNAUTHORIZED_WITH_PODS = UNAUTHORIZED._replace(reason=f"{UNAUTHORIZED.reason}, for Nodes and Pods")

FORBIDDEN_POD = "the Pod answered 401 or 403: the proxy has no credentials for Pods"

# Statuses of refusals that are an upstream's fault.
UPSTREAM_FAILED = (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT)


class Malformed(Exception):
    """An upstream's answer that is no HTTP/1.1 and cannot be relayed; the text quotes none of it."""


def connect_timeout(seconds: float) -> Refusal:
    """Return the refusal for a connection that did not come about in time."""
    return Refusal(504, Outcome.TIMEOUT, f"no connection to the kubelet within {seconds:g} s")


def connection_failure(error: OSError, peer: str, context: ssl.SSLContext | None) -> Refusal:
    """Return the refusal for an error of a connection to a peer (`Endpoint.peer`), TLS included."""
    explanation = tls.explain(error, tls.KUBELET if peer == KUBELET else tls.POD, context)
    if explanation is not None:
        outcome = Outcome.UNVERIFIED if explanation.is_unverified else Outcome.UNREACHABLE
        return Refusal(502, outcome, f"the kubelet cannot be scraped: {explanation}")
    what = os.strerror(error.errno).lower() if error.errno else "connection lost"
    return Refusal(502, Outcome.UNREACHABLE, f"the kubelet cannot be reached: {what}")


def malformed(error: Malformed) -> Refusal:
    """Return the refusal for an answer that cannot be relayed."""
    return Refusal(502, Outcome.MALFORMED, f"the kubelet's answer cannot be relayed: {error}")


def other_status(status: int) -> Refusal:
    """Return the refusal for an answer that is not 200 and so carries no metrics."""
    match status:
        case 401:
            return Refusal(
                502,
                Outcome.FORBIDDEN,
                "the kubelet answered 401: it does not accept the proxy's credentials "
                "(it needs webhook authentication for service account tokens)",
            )
        case 403:
            return Refusal(
                502,
                Outcome.FORBIDDEN,
                "the kubelet answered 403: the proxy's account needs the permission get on nodes/metrics",
            )
        case _:
            phrase = (
                HTTPStatus(status).phrase
                if status in HTTPStatus._value2member_map_
                else "no status of HTTP's"
            )
            return Refusal(502, Outcome.ANSWERED, f"the kubelet answered {status} ({phrase})")


# A name and password before the host, a query and a fragment (RFC 3986, 3).
_SECRET_PARTS = re.compile(r"(?<=//)[^/?#@]*@|[?#].*", re.DOTALL)


def redirect(status: int, location: bytes) -> Refusal:
    """Return the refusal for a redirect that is not followed, without what may be a secret in its location."""
    target = tls.printable(_SECRET_PARTS.sub("", location.decode("latin-1")))
    return Refusal(
        502,
        Outcome.ANSWERED,
        f"the kubelet answered {status} and redirects to {target}: that is not followed",
    )


_OF_PODS = {
    Outcome.UNREACHABLE: Outcome.POD_UNREACHABLE,
    Outcome.UNVERIFIED: Outcome.POD_UNVERIFIED,
    Outcome.FORBIDDEN: Outcome.POD_ANSWERED,
    Outcome.ANSWERED: Outcome.POD_ANSWERED,
    Outcome.MALFORMED: Outcome.POD_MALFORMED,
}


def of_pod(refusal: Refusal) -> Refusal:
    """Return the refusal reworded for a Pod: a kubelet's remedy does not help there."""
    is_forbidden = refusal.outcome is Outcome.FORBIDDEN
    reason = FORBIDDEN_POD if is_forbidden else refusal.reason.replace("the kubelet", "the Pod")
    return Refusal(refusal.status, _OF_PODS.get(refusal.outcome, refusal.outcome), reason)
