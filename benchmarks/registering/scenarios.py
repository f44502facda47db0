"""The scenarios of the registrar's benchmark by name: each runs one checkout once and returns its figures."""

from collections.abc import Awaitable, Callable

from registering.bench import Bench, Measured
from registering.beside import (
    beside_failed,
    beside_foreign_at_agent,
    beside_foreign_in_catalog,
    beside_rejected,
)
from registering.endpoints import endpoint_change, endpoint_memory
from registering.following import (
    at_rest,
    cold_start,
    during_removals,
    during_resyncs,
    hour_of_churn,
    new_pod_during_removals,
    steady,
)
from registering.stage import Checkout

Scenario = Callable[[Bench, Checkout, int], Awaitable[Measured]]

SCENARIOS: dict[str, Scenario] = {
    "cold-catalog": lambda bench, checkout, size: cold_start(bench, checkout, size, "catalog"),
    "cold-agent": lambda bench, checkout, size: cold_start(bench, checkout, size, "agent"),
    "steady": steady,
    "resync": during_resyncs,
    "removals-catalog": during_removals,
    "removals-agent": new_pod_during_removals,
    "rejected": beside_rejected,
    "failed": beside_failed,
    "foreign-agent": beside_foreign_at_agent,
    "foreign-catalog": beside_foreign_in_catalog,
    "endpoint": endpoint_change,
    "endpoints": endpoint_memory,
    "rest": at_rest,
    "hour": hour_of_churn,
}
