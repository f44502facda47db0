"""Whether replicas elect the one that writes, over which Lease, and how patiently."""

from dataclasses import dataclass

from k8s_consul_registrar.registrar.election import ElectionTiming
from k8s_consul_registrar.settings.reader import Reader

# The longest that makes sense; a dead leader's lease is waited for as long.
LONGEST_LEASE = 3600
SHORTEST_RETRY = 0.1
LONGEST_NAME = 253
LONGEST_NAMESPACE = 63


@dataclass(frozen=True, slots=True)
class ElectionSettings:
    """How replicas elect a leader.

    An empty `lease_name` is made of cluster and instance, an empty `lease_namespace` is the Pod's own.
    """

    lease_name: str
    lease_namespace: str
    timing: ElectionTiming
    is_agent_shared: bool


def read_election(reader: Reader) -> ElectionSettings | None:
    """Read what leader election needs, None where there is none; mistakes in it count all the same."""
    settings = ElectionSettings(
        lease_name=reader.object_name("LEASE_NAME", LONGEST_NAME),
        lease_namespace=reader.object_name("LEASE_NAMESPACE", LONGEST_NAMESPACE),
        timing=_timing(reader),
        is_agent_shared=reader.boolean("CONSUL_AGENT_SHARED"),
    )
    return settings if reader.boolean("LEADER_ELECTION") else None


def election_problem(backend: str, election: ElectionSettings | None) -> str:
    """Return what is wrong with electing a leader over this backend, empty where nothing is.

    Each replica with an agent of its own would leave a whole set of services there, and a stalled leader's
    agent would keep it alive beside the new leader's.
    """
    if election is None or backend != "agent" or election.is_agent_shared:
        return ""
    return (
        "true needs CONSUL_BACKEND=catalog, since each replica's own agent would hold a set of services; "
        "CONSUL_AGENT_SHARED=true says that all replicas use one agent"
    )


def _timing(reader: Reader) -> ElectionTiming:
    duration = reader.integer("LEASE_DURATION", 1, LONGEST_LEASE)
    deadline = reader.seconds("LEASE_RENEW_DEADLINE")
    retry = reader.seconds("LEASE_RETRY_PERIOD", SHORTEST_RETRY)
    try:
        return ElectionTiming(duration, deadline, retry)
    except ValueError as error:
        reader.problem("LEASE_DURATION, LEASE_RENEW_DEADLINE, LEASE_RETRY_PERIOD", str(error))
        return ElectionTiming()
