"""Settings that both modes have."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from k8s_consul_registrar.settings import parsers as parse
from k8s_consul_registrar.settings.field import Section, section, setting
from k8s_consul_registrar.settings.parsers import TEXT, Parser
from k8s_consul_registrar.telemetry import FORMATS, LEVELS

COMMON = "Both modes"
# Kubernetes, "Object Names and IDs": the names of namespaces are RFC 1123 labels.
_NAMESPACE = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# The same: the prefix of a key is a DNS subdomain of at most 253 characters, its labels are as above.
_PREFIX = r"(?=.{1,253}/$)[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*/"


def _selector(given: str) -> str:
    if not given.isprintable():
        raise ValueError("is not printable")
    return given


def _namespace(name: str) -> str:
    if not re.fullmatch(_NAMESPACE, name):
        raise ValueError(f"{name!r} is no namespace: lower-case letters, digits and '-', at most 63")
    return name


# The API server parses it.
selector = Parser(_selector, TEXT)


@dataclass(frozen=True, slots=True)
class CommonSettings(Section):
    """Settings of either mode; `environment` holds the texts of all sources, for credentials to be found in."""

    GROUP: ClassVar[str] = COMMON

    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    kubeconfig: str = setting(
        "KUBECONFIG",
        parse.file,
        "Kubeconfig file, or several joined with `:` and merged as kubectl does. Unset: the service account "
        "inside a cluster, `~/.kube/config` elsewhere",
    )
    admin_port: int = setting(
        "ADMIN_PORT",
        parse.port,
        "Port of `/healthz`, `/readyz` and `/metrics`. 0: the system picks one",
        default="8081",
    )
    log_level: str = setting(
        "LOG_LEVEL",
        parse.choice(*LEVELS),
        "Least severe level that is logged: `debug`, `info`, `warning` or `error`",
        default="info",
    )
    log_format: str = setting(
        "LOG_FORMAT",
        parse.choice(*FORMATS),
        "`json` or `console`. Unset: `console` on a terminal, `json` elsewhere. Logs go to stderr",
    )
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PodSelection(Section):
    """The Pods that are discovered, and what their annotations begin with."""

    namespaces: tuple[str, ...] = setting(
        "NAMESPACES",
        parse.entries(_namespace, empty="names no namespace", pattern=f"^{_NAMESPACE}$"),
        "Comma-separated namespaces whose Pods are discovered. Each is listed separately, so a Role in each is "
        "enough. Unset: all namespaces",
        group=COMMON,
    )
    pod_label_selector: str = setting(
        "POD_LABEL_SELECTOR",
        selector,
        "Kubernetes label selector for Pods. Set `INSTANCE` with it if several registrars share a cluster",
        group=COMMON,
    )
    annotation_prefix: str = setting(
        "ANNOTATION_PREFIX",
        parse.matching(_PREFIX, "is not a DNS name in lower case and a slash"),
        "Prefix of the Pod annotations that are read: a DNS name and a slash",
        default="prometheus.io/",
        group=COMMON,
    )


@dataclass(frozen=True, slots=True)
class ModeSettings(Section):
    """All settings of a mode."""

    common: CommonSettings = section(CommonSettings)
