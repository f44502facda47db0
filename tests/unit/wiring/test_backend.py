"""The choice of CONSUL_BACKEND=auto, as a function of what Consul answered, and the settings that must fit it."""

import pytest

from k8s_consul_registrar.consul.acl import AgentSelf
from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.wiring.backend import Answers, choose


def agent(node: str, *, is_server: bool = False) -> AgentSelf:
    """Return what an agent says of itself."""
    return AgentSelf("1.22.2", node, is_server)


ALONE = (agent("node-a"),) * 3


@pytest.mark.parametrize(
    ("answers", "backend", "reason"),
    [
        (Answers(ALONE, "k8s-lab"), "agent", "one client agent answers, node node-a"),
        (Answers(ALONE, "k8s-lab", services=2), "catalog", "node k8s-lab in the catalog has 2 services"),
        (Answers((agent("s-1", is_server=True),) * 3), "catalog", "a Consul server answers, node s-1"),
        (Answers((*ALONE, agent("s-1", is_server=True))), "catalog", "a Consul server answers, node s-1"),
        (
            Answers((agent("b"), agent("a"), agent("b"))),
            "catalog",
            "agents of several nodes answer: a, b",
        ),
        (Answers(is_elected=True), "catalog", "LEADER_ELECTION is true"),
        (Answers(ALONE, "k8s-lab", is_elected=True), "catalog", "LEADER_ELECTION is true"),
    ],
)
def test_choice_is_the_agent_only_where_a_single_client_agent_can_hold_everything(
    answers: Answers, backend: str, reason: str
) -> None:
    """A server, several nodes, an election or services in the catalog each decide for the catalog."""
    choice = choose(answers)
    assert choice.backend == backend
    assert reason in choice.reason


def test_readiness_is_judged_once_the_backend_is_chosen() -> None:
    """An agent has no place for it: the problem names the setting and why `auto` chose the agent."""
    settings = read_registrar(
        {
            "CLUSTER_NAME": "lab",
            "CONSUL_BACKEND": "auto",
            "REGISTER_READINESS": "true",
        }
    )
    assert settings.decided("catalog", "a server answers").backend.reason == "a server answers"
    with pytest.raises(SettingsError) as raised:
        settings.decided("agent", "one client agent answers")
    (problem,) = raised.value.problems
    assert problem.startswith("REGISTER_READINESS: needs CONSUL_BACKEND=catalog")
    assert "CONSUL_BACKEND=auto chose agent: one client agent answers" in problem


def test_election_is_allowed_with_auto() -> None:
    """It always chooses the catalog then."""
    settings = read_registrar({"CLUSTER_NAME": "lab", "CONSUL_BACKEND": "auto", "LEADER_ELECTION": "true"})
    assert settings.election is not None
    assert settings.decided("catalog", "LEADER_ELECTION is true").backend.backend == "catalog"
