"""Settings that both modes have."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from k8s_consul_registrar.model import Selector
from k8s_consul_registrar.settings import parsers as parse
from k8s_consul_registrar.settings.field import Reader, Section, Setting, section
from k8s_consul_registrar.targets.scrape_config import FAMILIES, PRIMARY
from k8s_consul_registrar.telemetry import FORMATS, LEVELS

COMMON = "Both modes"


@dataclass(frozen=True, slots=True)
class CommonSettings(Section, group=COMMON):
    """Settings of either mode; `environment` holds the texts of all sources, for credentials to be found in."""

    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    kubeconfig: str = Setting("KUBECONFIG", parse.file).means(
        "Kubeconfig file, or several joined with `:` and merged as kubectl does. Unset: the service account "
        "inside a cluster, `~/.kube/config` elsewhere"
    )
    admin_port: int = Setting("ADMIN_PORT", parse.port, "8081").means(
        "Port of `/healthz`, `/readyz` and `/metrics`. 0: the system picks one"
    )
    log_level: str = Setting("LOG_LEVEL", parse.choice(*LEVELS), "info").means(
        "Least severe level that is logged: `debug`, `info`, `warning` or `error`"
    )
    log_format: str = Setting("LOG_FORMAT", parse.choice(*FORMATS)).means(
        "`json` or `console`. Unset: `console` on a terminal, `json` elsewhere. Logs go to stderr"
    )
    node_ip_family: str = Setting("NODE_IP_FAMILY", parse.choice(*FAMILIES), PRIMARY).means(
        "Address of a dual-stack Node at which Prometheus reaches it, and Pods with `POD_ADDRESS=proxy` or `host`, and the "
        "proxy its kubelet: `primary`, `ipv4` or `ipv6`. The same for both modes"
    )
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PodSelection(Section):
    """The Pods that are discovered, and what their annotations begin with."""

    namespaces: tuple[str, ...] = Setting("NAMESPACES", parse.namespaces, group=COMMON).means(
        "Comma-separated namespaces whose Pods are discovered. Each is listed separately, so a Role in each is "
        "enough. Unset: all namespaces"
    )
    pod_label_selector: str = Setting("POD_LABEL_SELECTOR", parse.selector, group=COMMON).means(
        "Kubernetes label selector for Pods. Set `INSTANCE` with it if several registrars share a cluster"
    )
    excluded_namespaces: tuple[str, ...] = Setting(
        "EXCLUDE_NAMESPACES", parse.namespaces, group=COMMON
    ).means(
        "Comma-separated namespaces of which nothing is discovered, such as `kube-system`: the API server leaves them "
        "out. Not with `NAMESPACES`, which names what is discovered"
    )
    annotation_prefix: str = Setting(
        "ANNOTATION_PREFIX", parse.annotation_prefix, "prometheus.io/", group=COMMON
    ).means("Prefix of the Pod annotations that are read: a DNS name and a slash")

    ip_family: str = Setting("POD_IP_FAMILY", parse.choice(*FAMILIES), PRIMARY, group=COMMON).means(
        "Address of a dual-stack Pod that is scraped: `primary`, `ipv4` or `ipv6`; the annotation `ip-family` names another one. "
        "The same for both modes"
    )

    @property
    def pod_selector(self) -> Selector:
        """The Pods that are listed and watched."""
        return self.outside_excluded(self.pod_label_selector)

    def outside_excluded(self, labels: str = "") -> Selector:
        """Return the selector of objects with these labels that are in no excluded namespace."""
        excluded = [f"metadata.namespace!={one}" for one in sorted(self.excluded_namespaces)]
        return Selector(labels, "" if self.namespaces else ",".join(excluded))

    def check(self, reader: Reader) -> None:
        """Report namespaces that are both chosen and excluded, and warn of an exclusion without effect."""
        if both := sorted({*self.namespaces} & {*self.excluded_namespaces}):
            reader.problem("EXCLUDE_NAMESPACES", f"names {', '.join(both)}, which NAMESPACES names too")
        elif self.namespaces and self.excluded_namespaces:
            reader.warnings.append("EXCLUDE_NAMESPACES has no effect: NAMESPACES leaves those namespaces out")


@dataclass(frozen=True, slots=True)
class ModeSettings(Section):
    """All settings of a mode."""

    common: CommonSettings = section(CommonSettings)
