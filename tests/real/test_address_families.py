"""A real Prometheus and VictoriaMetrics scrape Nodes and Pods over IPv6, through the proxy, by each discovery."""

from typing import Any

import pytest
import yaml

from e2e.test_address_families import POD, SIX, a_node, a_proxy, each_cluster
from real.test_http_sd import example_rules
from support.lab import running_lab_with
from support.processes import has_ipv6, reserve_ports
from support.real_servers import (
    NEWER,
    REAL,
    fetched_prometheus,
    fetched_victoria,
    real_consul,
    real_prometheus,
    real_victoria,
)
from support.waiting import until

pytestmark = [
    REAL,
    pytest.mark.long,
    pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1"),
]

# VictoriaMetrics has an interval for each discovery, not for each job.
VICTORIA = {
    "enableTCP6": "true",
    "promscrape.consulSDCheckInterval": "1s",
    "promscrape.fileSDCheckInterval": "1s",
    "promscrape.config.strictParse": "false",
}


@each_cluster
async def test_collectors_scrape_nodes_and_pods_over_ipv6(
    addresses: tuple[str, ...], settings: dict[str, str]
) -> None:
    """By Consul, by HTTP and by file service discovery the same URLs are up, with the rules of the example."""
    discovery_port = reserve_ports(1)[0]
    async with (
        real_consul() as consul,
        running_lab_with(consul.address) as lab,
        a_node(lab, *addresses),
        await a_proxy(lab, **settings) as proxy,
    ):
        await proxy.ready()
        port, file = await proxy.port("port"), lab.folder / "targets.json"
        common = {
            "scrape_interval": "1s",
            "bearer_token_file": str(lab.folder / "shown"),
            "relabel_configs": example_rules(),
        }
        consul_sd = {"server": consul.address, "refresh_interval": "1s"}
        http_sd = {"url": f"http://[{SIX}]:{discovery_port}/sd/targets", "refresh_interval": "1s"}
        by_consul = [{"job_name": "consul", "consul_sd_configs": [consul_sd], **common}]
        by_http = [{"job_name": "http", "http_sd_configs": [http_sd], **common}]
        by_file = [{"job_name": "file", "file_sd_configs": [{"files": [str(file)]}], **common}]
        more = {"POD_ADDRESS": "proxy", "PROXY_NODE_PORT": str(port)}
        more |= {"HTTP_SD_PORT": str(discovery_port), "FILE_SD_PATH": str(file)}
        async with (
            await lab.registrar(**more, **settings) as registrar,
            real_prometheus(yaml.safe_dump({"scrape_configs": by_consul})) as old,
            real_prometheus(
                yaml.safe_dump({"scrape_configs": [*by_http, *by_file]}), tools=fetched_prometheus("2.53")
            ) as new,
            real_victoria(
                yaml.safe_dump({"scrape_configs": [*by_consul, *by_http, *by_file]}),
                binary=fetched_victoria(NEWER),
                flags=VICTORIA,
            ) as victoria,
        ):
            await registrar.ready()
            found: list[dict[str, Any]] = []

            async def are_up() -> bool:
                nonlocal found
                found = [*await old.targets(), *await new.targets(), *await victoria.targets()]
                return len(found) == 12 and all(one["health"] == "up" for one in found)

            await until(
                are_up,
                context=lambda: str([(one["scrapeUrl"], one["health"], one["lastError"]) for one in found]),
            )
            assert {one["labels"]["instance"] for one in found} == {f"[{SIX}]:{port}"}
            assert {one["labels"]["job"] for one in found} == {"consul", "http", "file"}
            ids = {one["discoveredLabels"]["__meta_consul_service_id"] for one in found}
            assert ids == {f"node--{addresses[0]}", POD}
            for prometheus, jobs in ((old, 1), (new, 2)):
                await prometheus.wait_for("a_metric == 1", jobs)
                await prometheus.wait_for('scrape_samples_scraped{kind="node"} > 100', jobs)
