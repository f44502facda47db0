"""The settings of leader election: defaults, every mistake by name, and which backends it fits."""

import pytest

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.registrar.election import ElectionTiming
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.settings.registrar import ElectionSettings, election_problem


def election(**environment: str) -> ElectionSettings:
    """Read the settings of an election that is wanted."""
    wanted = {"CLUSTER_NAME": "lab", "LEADER_ELECTION": "true", "CONSUL_BACKEND": "catalog"}
    settings = read_registrar({**wanted, **environment}).election
    assert settings is not None
    return settings


def problems(**environment: str) -> tuple[str, ...]:
    """Return the mistakes of an environment."""
    with pytest.raises(SettingsError) as raised:
        read_registrar({"CLUSTER_NAME": "lab", "CONSUL_BACKEND": "catalog", **environment})
    return raised.value.problems


def test_single_replica_holds_no_election() -> None:
    """Without being asked for there is no election."""
    assert read_registrar({"CLUSTER_NAME": "lab"}).election is None


def test_defaults_are_client_go_s() -> None:
    """15, 10 and 2 seconds; name and namespace are found out where they are used."""
    assert election() == ElectionSettings("", "", 15, 10, 2, is_agent_shared=False)
    assert election().timing == ElectionTiming(15, 10, 2)


def test_everything_can_be_chosen() -> None:
    """Each variable reaches its field."""
    chosen = election(
        LEASE_NAME="the.lease",
        LEASE_NAMESPACE="monitoring",
        LEASE_DURATION="60",
        LEASE_RENEW_DEADLINE="40.5",
        LEASE_RETRY_PERIOD="5",
        CONSUL_AGENT_SHARED="true",
    )
    assert chosen == ElectionSettings("the.lease", "monitoring", 60, 40.5, 5, is_agent_shared=True)


def test_every_mistake_at_once() -> None:
    """All are reported by the names of their variables, whether or not an election is wanted."""
    wrong = {
        "LEADER_ELECTION": "perhaps",
        "LEASE_NAME": "Not_A_Name",
        "LEASE_NAMESPACE": "x" * 64,
        "LEASE_DURATION": "15.5",
        "LEASE_RENEW_DEADLINE": "soon",
        "LEASE_RETRY_PERIOD": "0",
        "CONSUL_AGENT_SHARED": "?",
    }
    found = problems(**wrong)
    for name in wrong:
        assert [problem for problem in found if problem.startswith(f"{name}: ")], name


@pytest.mark.parametrize(
    ("duration", "deadline", "retry", "word"),
    [
        ("10", "10", "2", "lease duration"),
        ("15", "2.4", "2", "renew deadline"),
        ("5", "10", "2", "lease duration"),
    ],
)
def test_times_that_do_not_fit_together(duration: str, deadline: str, retry: str, word: str) -> None:
    """Under which two could write, or a healthy leader lose its lease: one problem that names all three."""
    (problem,) = problems(
        LEADER_ELECTION="true",
        LEASE_DURATION=duration,
        LEASE_RENEW_DEADLINE=deadline,
        LEASE_RETRY_PERIOD=retry,
    )
    names, _, text = problem.partition(": ")
    assert names == "LEASE_DURATION, LEASE_RENEW_DEADLINE, LEASE_RETRY_PERIOD"
    assert text.startswith(f"the {word}")


@pytest.mark.parametrize("name", ["-a", "a-", "a..b", ".a", "A", "a_b", "a/b", "x" * 254])
def test_name_kubernetes_would_refuse(name: str) -> None:
    """A Lease's name is a DNS subdomain; nothing else gets near a URL."""
    (problem,) = problems(LEASE_NAME=name)
    assert problem.startswith("LEASE_NAME: ")


def test_election_over_agents_is_refused_by_name() -> None:
    """Reading the settings applies the rule."""
    (problem,) = problems(LEADER_ELECTION="true", CONSUL_BACKEND="agent")
    assert problem.startswith("LEADER_ELECTION: true needs CONSUL_BACKEND=catalog")


def test_agent_of_each_replica_s_own_takes_no_election() -> None:
    """A stalled leader's own agent would keep a second whole set of services alive."""
    assert election_problem("agent", None) == ""
    assert election_problem("catalog", election()) == ""
    assert election_problem("none", election()) == ""
    assert "CONSUL_AGENT_SHARED=true" in election_problem("agent", election())
    assert election_problem("agent", election(CONSUL_AGENT_SHARED="true")) == ""
