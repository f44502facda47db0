"""Hostile clusters and faults: no secret comes to light, and annotations made to hurt break nothing."""

import asyncio

import pytest

from k8s_consul_registrar.sandbox import objects
from support.daemon import Daemon
from support.lab import ANNOTATIONS, chaos, chaos_lab
from support.real_servers import make_token, real_consul

pytestmark = chaos("chaos-restarts")

RULES = 'node_prefix "" { policy = "write" } service_prefix "" { policy = "write" } agent_prefix "" { policy = "read" }'
PAGES = ("/", "/metrics", "/readyz", "/healthz", "/api/v1/status", "/api/v1/targets", "/sd")
HOSTILE = {
    "control": {"path": "/m\x00\x1b[31m\r\nX: y", "port": "80"},
    "newlines": {"path": '/metrics\n{"level": "error"}', "port": "80"},
    "huge": {"path": "/" + "x" * 1_000_000, "port": "80"},
    "traversal": {"path": "/../../v1/agent/service/deregister/pod--shop--good", "port": "80"},
    "bidi": {"path": "/\u202egnp.\u2066x\u2069", "port": "80"},
    "surrogates": {"path": "/\ud7ff\ufffe\U0001f4a9", "port": "80"},
    "json": {"path": '/","ID":"pod--shop--good","x":"', "port": "80"},
    "scheme": {"path": "/", "port": "80", "scheme": "http://evil.example/?"},
    "port": {"path": "/", "port": "80\r\nHost: evil"},
    "param": {"path": "/", "port": "80", "param-a": '"}]}\u0000'},
    "digits": {"path": "/", "port": "\u0661\u0662"},
    "fraction": {"path": "/", "port": "8e1"},
}  # fmt: skip


async def test_secrets_stay_in_through_every_fault() -> None:
    """Neither side's token is in the log, on a page or in a metric, whatever goes wrong and however loud."""
    async with real_consul(acl=True) as consul, chaos_lab(consul) as lab:
        token = await make_token(consul, "registrar", RULES)
        async with await lab.chaotic(CONSUL_HTTP_TOKEN=token.secret, LOG_LEVEL="debug") as daemon:
            lab.put_pods(5)
            await lab.equal(daemon)
            secrets = [token.secret, lab.token_file.read_text()]
            for status in (401, 403, 500):
                lab.api.refuse(status)
                lab.consul.refuse(status)
                lab.api_wire.cut()
                lab.put_pod(f"new-{status}")
                await asyncio.sleep(1)
            pages = [(await daemon.admin(path))[1] for path in PAGES]
            lab.api_wire.refuse()
            lab.consul_wire.refuse()
            await asyncio.sleep(1)
            lab.api.heal()
            lab.consul.heal()
            await lab.api_wire.heal()
            await lab.consul_wire.heal()
            await lab.equal(daemon)
            pages += [(await daemon.admin(path))[1] for path in PAGES]
            for secret in secrets:
                assert secret not in daemon.output
                assert not any(secret in page for page in pages)


@pytest.mark.parametrize("backend", ["catalog", "agent"])
async def test_hostile_annotations(backend: str) -> None:
    """Each is refused or carried as it is; the log stays one JSON object a line, and the good Pod is served."""
    async with real_consul() as consul, chaos_lab(consul) as lab:
        node = consul.node if backend == "agent" else lab.node
        async with await lab.chaotic(CONSUL_BACKEND=backend) as daemon:
            for name, annotations in HOSTILE.items():
                written = {
                    "prometheus.io/scrape": "true",
                    **{f"prometheus.io/{key}": value for key, value in annotations.items()},
                }
                lab.sandbox.kube.create(
                    objects.pod(name, namespace="shop", ip="198.51.100.66", annotations=written)
                )
            lab.put_pod("good")

            async def is_there() -> bool:
                return "pod--shop--good" in await lab.records(node)

            await daemon.until(is_there)
            await daemon.ready()
            assert not daemon.said("Consul refuses a service"), "what we take Consul takes"
            held = await lab.records(node)
            assert held["pod--shop--good"].held == lab.wanted["pod--shop--good"]
            assert held.keys() <= {f"pod--shop--{name}" for name in (*HOSTILE, "good")}
            rejected = {line["object"].rpartition("/")[2] for line in daemon.said("rejected")}
            services = {key.rpartition("--")[2] for key in held} - {"good"}
            assert rejected | services == set(HOSTILE)
            assert rejected & services == set()
            assert {"control", "newlines", "huge", "scheme", "port", "fraction"} <= rejected
            _assert_log_is_sound(daemon)
            lab.assert_nothing_wrongful()


def _assert_log_is_sound(daemon: Daemon) -> None:
    """Fail unless each line is one JSON object of a bearable length that moves no terminal."""
    lines = daemon.output.splitlines()
    assert len(lines) == len(daemon.lines), "every line is one JSON object"
    assert max(map(len, lines)) < 5000
    assert "\x1b" not in daemon.output


TWISTED = (
    "../../../v1/agent/service/deregister/pod--shop--good", "..", "%2e%2e%2f", "a/b", "x?dc=other&ns=y#z",
    "a\r\nX-Evil: 1", "nul\x00", "\x1b[2J", "\u202egnp.exe", "\u0430pi", '"},{"ID":"x', "x" * 600,
)  # fmt: skip


@pytest.mark.parametrize("backend", ["catalog", "agent"])
async def test_twisted_names_and_labels(backend: str) -> None:
    """Names and labels that no API server accepts come back unchanged or are refused, in reads and in writes."""
    async with real_consul() as consul, chaos_lab(consul) as lab:
        node = consul.node if backend == "agent" else lab.node
        settings = {
            "CONSUL_BACKEND": backend,
            "POD_SERVICE_NAME": "app-{label:app}",
            "SERVICE_TAGS": "app={label:app}",
            "POD_LABELS_AS_META": "app",
        }
        async with await lab.chaotic(**settings) as daemon:
            for number, twisted in enumerate(TWISTED):
                for name, label in ((twisted, "shop"), (f"by-label-{number}", twisted)):
                    pod = objects.pod(
                        name,
                        namespace="shop",
                        ip="198.51.100.66",
                        labels={"app": label},
                        annotations=ANNOTATIONS,
                    )
                    lab.sandbox.kube.create(pod)
            good = objects.pod(
                "good", namespace="shop", ip="198.51.100.10", labels={"app": "good"}, annotations=ANNOTATIONS
            )
            lab.sandbox.kube.create(good)
            lab.consul.is_wanted = "pod--shop--good".__eq__

            async def is_there() -> bool:
                return "pod--shop--good" in await lab.records(node)

            await daemon.until(is_there)
            await daemon.ready()
            await daemon.until_said("resync")
            held = await lab.records(node)
            assert held.keys() <= {"pod--shop--good"} | {
                f"pod--shop--{name}"
                for number, twisted in enumerate(TWISTED)
                for name in (twisted, f"by-label-{number}")
            }
            for name in (*TWISTED, *(f"by-label-{number}" for number in range(len(TWISTED)))):
                lab.sandbox.kube.delete("Pod", name, "shop")

            async def is_alone() -> bool:
                return (await lab.records(node)).keys() == {"pod--shop--good"}

            await daemon.until(is_alone)
            assert (await lab.records(node))["pod--shop--good"] == held["pod--shop--good"]
            _assert_log_is_sound(daemon)
            lab.assert_nothing_wrongful()
