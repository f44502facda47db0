"""The registrar's status for its probes."""

import time

from k8s_consul_registrar.registrar.status import HANG, AgentProblem, AgentsSeen, RegistrarStatus


def test_liveness_of_a_loop_that_hangs_is_lost() -> None:
    """The kubelet restarts a registrar whose loop has not turned for long, and no other."""
    now = time.monotonic()
    assert RegistrarStatus(ticked_at=now).is_alive()
    assert RegistrarStatus(ticked_at=now - HANG / 2).is_alive()
    assert not RegistrarStatus(ticked_at=now - HANG - 1).is_alive()


def test_agents_seen_one_client_agent_is_no_problem() -> None:
    """However often it answers."""
    seen = AgentsSeen()
    for _ in range(5):
        seen = seen.looked(["a", "a", "a"], [])
        assert seen.problems() == {}


def test_agents_seen_server_is_a_problem_while_it_answers() -> None:
    """The text names its node and the remedy."""
    seen = AgentsSeen()
    for _ in range(4):
        seen = seen.looked(["s"], ["s"])
        assert [*seen.problems()] == [AgentProblem.SERVER]
        assert "node s." in seen.problems()[AgentProblem.SERVER]
    assert seen.looked(["s"], []).problems() == {}


def test_agents_seen_servers_in_turn_are_all_named() -> None:
    """So the text does not change with each look."""
    seen = AgentsSeen()
    for node in "abcab":
        seen = seen.looked([node], [node])
    assert "node a, b, c." in seen.problems()[AgentProblem.SERVER]
    assert "answer: a, b, c." in seen.problems()[AgentProblem.SEVERAL_NODES]


def test_agents_seen_several_nodes_are_a_problem_until_looks_agree() -> None:
    """A load balancer may well lead to one agent twice in a row; a node that was renamed is settled in the end."""
    seen = AgentsSeen().looked(["a"], [])
    for nodes in (["b"], ["a"], ["a"], ["b", "a"], ["b"], ["b"]):
        seen = seen.looked(nodes, [])
        assert "answer: a, b." in seen.problems()[AgentProblem.SEVERAL_NODES]
    assert seen.looked(["b"], []).problems() == {}
