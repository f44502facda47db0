"""`check delivery` against a real Prometheus: what it has, what its relabelling drops, what it cannot scrape."""

import yaml

from support.lab import running_lab
from support.real_servers import REAL, fetched_prometheus, real_prometheus
from support.waiting import until

pytestmark = REAL


async def test_check_delivery_names_what_a_prometheus_lacks() -> None:
    """One target is active and down, one is dropped by relabelling; exit 1 while one is missing."""
    async with running_lab() as lab:
        settings = {
            "CONSUL_BACKEND": "none",
            "FILE_SD_PATH": str(lab.folder / "targets.json"),
            "DISCOVER": "pods",
        }
        job = {
            "job_name": "pods",
            "scrape_interval": "1s",
            "file_sd_configs": [{"files": [settings["FILE_SD_PATH"]]}],
            "relabel_configs": [
                {"source_labels": ["__meta_consul_service_metadata_pod"], "regex": "web-2", "action": "drop"}
            ],
        }
        config = yaml.safe_dump({"scrape_configs": [job]})
        async with (
            real_prometheus(config, tools=fetched_prometheus("2.53")) as prometheus,
            await lab.registrar(**settings) as registrar,
        ):
            await lab.cluster.add_pod(ips=["127.0.0.2"])
            await lab.cluster.add_pod("web-2", ips=["127.0.0.3"])

            async def is_scraped() -> bool:
                return [one["health"] for one in await prometheus.targets()] == ["down"]

            await until(is_scraped, context=lambda: registrar.output + prometheus.program.tail())
            shown = {"CLUSTER_NAME": "lab", "DISCOVER": "pods", "CONSUL_BACKEND": "none", "HTTP_SD_PORT": "0"}
            async with lab.daemon("check", "delivery", "--prometheus", prometheus.url, **shown) as check:
                assert await check.ended() == 1
                output = check.output
        assert "1 of 2 are missing: pod--shop--web-2: the relabelling of the job 'pods' drops them" in output
        assert "1 of 1 are down: pod--shop--web-1" in output
