"""What a kubelet did wrong, in words an operator can act on; one place turns errors into answers."""

import os
import ssl
from http import HTTPStatus

from k8s_consul_registrar.proxy.outcomes import Outcome, Refusal
from k8s_consul_registrar.proxy.response import Malformed

TIMED_OUT = Refusal(504, Outcome.TIMEOUT, "the kubelet did not answer within the scrape's timeout")
WAITED_OUT = Refusal(503, Outcome.BUSY, "no place for this scrape came free within its timeout")
QUEUE_FULL = Refusal(503, Outcome.BUSY, "too many scrapes wait already")
NO_CREDENTIALS = Refusal(503, Outcome.NO_CREDENTIALS, "the credentials for kubelets cannot be read")
CLOSED_EARLY = Refusal(502, Outcome.UNREACHABLE, "the kubelet closed the connection without an answer")
UNSOUND_NAME = Refusal(502, Outcome.UNVERIFIED, "the Node's name cannot be the name in a certificate")


def connect_timeout(seconds: float) -> Refusal:
    """Return the answer where no connection came about in time."""
    return Refusal(504, Outcome.TIMEOUT, f"no connection to the kubelet within {seconds:g} s")


def connection_failure(error: OSError) -> Refusal:
    """Return the answer to an error of the connection, TLS included."""
    match error:
        case ssl.SSLCertVerificationError():
            return Refusal(
                502,
                Outcome.UNVERIFIED,
                f"the kubelet's certificate cannot be verified ({printable(error.verify_message)}): set KUBELET_CA_FILE "
                "to the CA that signed it (KUBELET_TLS_SERVER_NAME=node where it names the Node and not the address), "
                "or KUBELET_INSECURE_SKIP_TLS_VERIFY=true to do without",
            )
        case ssl.SSLError():
            what = printable(error.reason or "protocol error")
            return Refusal(502, Outcome.UNREACHABLE, f"TLS with the kubelet failed: {what}")
        case _:
            what = os.strerror(error.errno).lower() if error.errno else "connection lost"
            return Refusal(502, Outcome.UNREACHABLE, f"the kubelet cannot be reached: {what}")


def malformed(error: Malformed) -> Refusal:
    """Return the answer to something that is no HTTP/1.1 response."""
    return Refusal(502, Outcome.MALFORMED, f"the kubelet's answer cannot be relayed: {error}")


def other_status(status: int) -> Refusal:
    """Return the answer to a kubelet's answer that is not 200 and so carries no metrics."""
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


_OF_PODS = {
    Outcome.UNREACHABLE: Outcome.POD_UNREACHABLE,
    Outcome.UNVERIFIED: Outcome.POD_UNVERIFIED,
    Outcome.FORBIDDEN: Outcome.POD_ANSWERED,
    Outcome.ANSWERED: Outcome.POD_ANSWERED,
    Outcome.MALFORMED: Outcome.POD_MALFORMED,
}
UNVERIFIED_POD = (
    "the Pod's certificate cannot be verified: set POD_CA_FILE to the CA that signed it for the Pod's address, "
    "or POD_INSECURE_SKIP_TLS_VERIFY=true to do without"
)
FORBIDDEN_POD = "the Pod answered 401 or 403: the proxy has no credentials for Pods"


def of_pod(refusal: Refusal) -> Refusal:
    """Return the same about a Pod: what would help with a kubelet is no help there."""
    match refusal.outcome:
        case Outcome.UNVERIFIED:
            reason = UNVERIFIED_POD
        case Outcome.FORBIDDEN:
            reason = FORBIDDEN_POD
        case _:
            reason = refusal.reason.replace("the kubelet", "the Pod")
    return Refusal(refusal.status, _OF_PODS.get(refusal.outcome, refusal.outcome), reason)


def printable(text: str) -> str:
    """Return a library's text cut short and in ASCII: it may quote what a peer sent."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:200])
