"""A real Prometheus reads files of targets, also after a restart, and the labels of kubernetes_sd."""

import signal
from pathlib import Path
from typing import Any

import yaml

from k8s_consul_registrar.admin.http_sd import SD_PATH, HttpSdServer
from support.daemon import Daemon
from support.lab import running_lab
from support.real_servers import REAL, RealPrometheus, fetched_prometheus, real_prometheus
from support.seen import Registrar, node_target, pod_target
from support.waiting import until

pytestmark = REAL

WEB = "pod--shop--web-1"
# Of the job kubernetes-pods of the community's chart for Prometheus.
CHART_RULES = """
- {source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_scrape], action: keep, regex: true}
- {source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_scheme], action: replace, regex: '(https?)',
   target_label: __scheme__}
- {source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_path], action: replace, target_label: __metrics_path__,
   regex: '(.+)'}
- {source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_port, __meta_kubernetes_pod_ip], action: replace,
   regex: '(\\d+);((([0-9]+?)(\\.|$)){4})', replacement: '$2:$1', target_label: __address__}
- {action: labelmap, regex: '__meta_kubernetes_pod_annotation_prometheus_io_param_(.+)', replacement: __param_$1}
- {action: labelmap, regex: '__meta_kubernetes_pod_label_(.+)'}
- {source_labels: [__meta_kubernetes_namespace], action: replace, target_label: namespace}
- {source_labels: [__meta_kubernetes_pod_name], action: replace, target_label: pod}
- {source_labels: [__meta_kubernetes_pod_phase], regex: Pending|Succeeded|Failed|Completed, action: drop}
- {source_labels: [__meta_kubernetes_pod_node_name], action: replace, target_label: node}
"""


async def jobs_of(prometheus: RealPrometheus) -> set[str]:
    """Return the jobs that have the Pod as an active target."""
    return {
        one["labels"]["job"]
        for one in await prometheus.targets()
        if one["discoveredLabels"]["__meta_consul_service_id"] == WEB
    }


async def test_prometheus_that_restarts_while_every_registrar_is_down_has_its_targets_again() -> None:
    """From the file of the registrar itself, and from that of fetch-targets; both programs are gone by then."""
    async with running_lab() as lab:
        ours, fetched = lab.folder / "ours.json", lab.folder / "fetched.json"
        jobs = [
            {"job_name": name, "scrape_interval": "1h", "file_sd_configs": [{"files": [str(path)]}]}
            for name, path in (("ours", ours), ("fetched", fetched))
        ]
        config = yaml.safe_dump({"scrape_configs": jobs})
        settings = {"CONSUL_BACKEND": "none", "FILE_SD_PATH": str(ours), "HTTP_SD_PORT": "0"}
        async with (
            real_prometheus(config, tools=fetched_prometheus("2.53")) as prometheus,
            await lab.registrar(**settings) as registrar,
        ):
            url = f"http://127.0.0.1:{await registrar.port('http_sd_port')}"
            arguments = ("fetch-targets", url, "--output", str(fetched))
            async with Daemon(arguments, {}, lab.folder) as command:
                await lab.cluster.add_pod()

                async def has_both() -> bool:
                    return await jobs_of(prometheus) == {"ours", "fetched"}

                await until(has_both, context=lambda: registrar.output + command.output)
                for one in (registrar, command):
                    one.send(signal.SIGKILL)
                    await one.ended()
                await prometheus.program.stop()
                await prometheus.start()
                await until(has_both)


async def test_job_of_kubernetes_sd_moves_by_replacing_its_discovery(tmp_path: Path) -> None:
    """The chart's own rules keep, address and label a Pod as they do by kubernetes_sd; a Node has its name."""
    registrar = Registrar()
    registrar.put(
        pod_target(
            "web-1", meta={"label_app": "web", "param_module": "x", "metrics_path": "/m", "scheme": "https"}
        ),
        node_target(7),
    )
    async with HttpSdServer(port=0, view=registrar) as server:

        def job(kind: str, **more: Any) -> dict[str, Any]:
            url = f"http://127.0.0.1:{server.port}{SD_PATH}?labels=kubernetes&kind={kind}"
            return {"job_name": kind, "scrape_interval": "1h", "http_sd_configs": [{"url": url}], **more}

        config = {"scrape_configs": [job("pod", relabel_configs=yaml.safe_load(CHART_RULES)), job("node")]}
        async with real_prometheus(yaml.safe_dump(config), tools=fetched_prometheus("2.53")) as prometheus:

            async def has_both() -> bool:
                return len(await prometheus.targets()) == 2

            await until(has_both, context=prometheus.program.tail)
            targets = {one["labels"]["job"]: one for one in await prometheus.targets()}
    assert targets["pod"]["scrapeUrl"] == "https://198.51.100.10:9102/m?module=x"
    assert targets["pod"]["labels"] == {
        "app": "web", "instance": "198.51.100.10:9102", "job": "pod", "namespace": "shop", "node": "node-1",
        "pod": "web-1",
    }  # fmt: skip
    assert targets["node"]["labels"] == {"instance": "node-7", "job": "node"}
