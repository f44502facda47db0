"""Findings about the services that Consul holds already."""

import pytest

from k8s_consul_registrar.commands.check.report import Result
from k8s_consul_registrar.commands.check.services import holdings, judge_holdings
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.targets.meta import OWN_KEYS
from support.builders import make_service

LAB = Identity("lab")


@pytest.mark.parametrize("key", sorted(OWN_KEYS - {"managed_by"}))
def test_foreign_service_with_a_meta_key_of_ours_is_a_warning(key: str) -> None:
    """Prometheus may relabel by any key that the registrar writes, so another's use of it is named."""
    foreign = make_service("web", {key: "x", "team": "a"})
    (finding,) = [one for one in judge_holdings(holdings([foreign], LAB, ""), LAB) if one.name == "meta keys"]
    assert finding.outcome is Result.WARN
    assert f"the registrar uses {key} itself" in finding.detail
