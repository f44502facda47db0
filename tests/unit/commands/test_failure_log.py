"""The log of failing scrapes: each cause once, with an example, until it is over."""

from structlog.testing import capture_logs

from k8s_consul_registrar.commands.proxy import MAX_CAUSES, FailureLog
from k8s_consul_registrar.proxy.nodes import Endpoint
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.proxy.stats import Failure

SELF_SIGNED = "its certificate cannot be verified: self-signed certificate; set KUBELET_CA_FILE to the CA"
OTHER_NAME = "its certificate cannot be verified: IP address mismatch, not valid for '{}'; set it"


def failure(number: int, reason: str, outcome: Outcome = Outcome.UNVERIFIED) -> Failure:
    """Return a failure of one of many kubelets."""
    address = f"192.0.2.{number}"
    return Failure(1.0, Endpoint(address, 10250, address, f"uid-{number}"), outcome, reason.format(address))


def names() -> dict[str, str]:
    """Return the names of these kubelets' Nodes."""
    return {f"uid-{number}": f"node-{number}" for number in range(250)}


def logged(log: FailureLog, *failures: Failure) -> list[tuple[str, str]]:
    """Return example and problem of each line that these failures cause."""
    with capture_logs() as lines:
        log.update(failures, names)
    assert {(line["event"], line["log_level"]) for line in lines} <= {("scrapes fail", "warning")}
    return [(line["example"], line["problem"]) for line in lines]


def test_one_cause_of_all_kubelets_is_one_line_with_its_remedy() -> None:
    """Certificates name different addresses, the cause is the same; a line is not repeated while it lasts."""
    log = FailureLog()
    everyone = [failure(number, SELF_SIGNED) for number in range(200)]
    assert logged(log, *everyone) == [("node-0 at 192.0.2.0:10250", SELF_SIGNED)]
    assert logged(log, *everyone) == []
    mismatches = [failure(number, OTHER_NAME) for number in range(200)]
    assert len(logged(log, *everyone, *mismatches)) == 1


def test_a_cause_that_changes_or_comes_back_is_logged_again() -> None:
    """Another cause is another line at once, the same one only after it was over."""
    log = FailureLog()
    assert len(logged(log, failure(1, SELF_SIGNED))) == 1
    assert len(logged(log, failure(1, SELF_SIGNED), failure(1, "refused", Outcome.UNREACHABLE))) == 1
    assert logged(log) == []
    assert len(logged(log, failure(1, SELF_SIGNED))) == 1


def test_causes_that_keep_changing_do_not_fill_the_log() -> None:
    """A Pod chooses its status, and may choose another one each time."""
    log = FailureLog()
    odd = [failure(1, f"the Pod answered {status}", Outcome.POD_ANSWERED) for status in range(400, 600)]
    assert len(logged(log, *odd)) == MAX_CAUSES
    assert logged(log, *odd) == []
