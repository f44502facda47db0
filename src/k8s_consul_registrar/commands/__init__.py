"""The commands: each has a `Command` here, and a module or package of its name with the function `run`.

They are declared in one place because the parser needs all of them, while only the module of the command that
runs may be loaded: the others would make a mode start later and use more memory.
"""

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.settings.common import CommonSettings
from k8s_consul_registrar.settings.consul import NONE
from k8s_consul_registrar.settings.field import Setting
from k8s_consul_registrar.settings.reading import MODES, PROXY, REGISTRAR, SETTINGS, modes_of, read_registrar
from k8s_consul_registrar.settings.reference import OUTPUTS
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.telemetry import configure_logging, get_logger
from k8s_consul_registrar.tls import without_authorities


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of one command beside its settings; a name without dashes is a positional one."""

    name: str
    help: str
    options: Mapping[str, Any]  # of `add_argument`

    def add_to(self, parser: argparse.ArgumentParser) -> argparse.Action:
        """Add it to the command's parser."""
        return parser.add_argument(self.name, help=self.help, **self.options)


def _switch(name: str, help: str) -> Argument:  # noqa: A002 - as in argparse
    return Argument(name, help, {"action": "store_true"})


def _output(help: str, first: str, *others: str) -> Argument:  # noqa: A002 - as in argparse
    return Argument("--output", help, {"choices": (first, *others), "default": first})


def _each_url(name: str, help: str) -> Argument:  # noqa: A002 - as in argparse
    return Argument(name, help, {"action": "append", "default": [], "metavar": "…"})


@dataclass(frozen=True, slots=True)
class Command:
    """A command; the settings of the modes in `settings_of` are flags of it."""

    name: str
    help: str
    arguments: Sequence[Argument] = ()
    notes: str = ""
    settings_of: frozenset[str] = frozenset()

    @property
    def is_mode(self) -> bool:
        """True for a mode, which runs until a signal ends it."""
        return self.name in MODES

    @property
    def settings(self) -> Sequence[Setting[Any]]:
        """The settings that the command heeds."""
        return [one for one in SETTINGS if not self.settings_of.isdisjoint(modes_of(one))]

    def run(self, parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
        """Run it and return its exit code; raises an `OperationalError`."""
        with without_authorities():
            module = import_module(f"{__name__}.{self.name.replace('-', '_')}")
        code: int = module.run(parsed, environment)
        return code


CONFIG = Argument(
    "--config",
    "YAML file of settings, named like the variables; variables and flags take precedence",
    {"metavar": "…"},
)
_OF_REGISTRAR = frozenset({REGISTRAR})
COMMANDS = (
    Command("registrar", "keep Consul equal to what the cluster wants scraped", settings_of=_OF_REGISTRAR),
    Command(
        "proxy",
        "let Prometheus read every node's cAdvisor metrics through one port",
        settings_of=frozenset({PROXY}),
    ),
    Command(
        "check",
        "show what is missing before a mode can do its work, and how to repair it",
        (
            Argument(
                "what",
                "mode to check; unset: the one that the variable MODE names, or all if it names none. delivery: which "
                "targets a collector has",
                {"choices": (*MODES, "all", "delivery"), "nargs": "?"},
            ),
            Argument(
                "--prometheus",
                "with delivery: URL of a Prometheus or VictoriaMetrics",
                {"default": "", "metavar": "…"},
            ),
            Argument(
                "--prometheus-token-file",
                "with delivery: file with the bearer token that it asks for",
                {"default": "", "metavar": "…"},
            ),
            _output("how to show the findings", "table", "json"),
        ),
        "The settings are those of the modes. Nothing is changed anywhere. Exit codes: 0 nothing failed, "
        "1 something did, 2 wrong settings. Check as the account that will run: kubectl exec "
        "deploy/k8s-consul-registrar -c k8s-consul-registrar -- k8s-consul-registrar check",
        frozenset(MODES),
    ),
    Command(
        "plan",
        "show what a resync would do now, and change nothing",
        (_output("how to show it", "diff", "json"),),
        "+ register, ~ update, - deregister, ! left alone and why. Exit codes: 0 nothing to do, 3 changes, "
        "1 failure, 2 wrong settings.",
        _OF_REGISTRAR,
    ),
    Command(
        "explain",
        "say why an object is a target or is not, and what Consul has of it",
        (
            Argument(
                "what",
                "pod NAMESPACE/NAME, node NAME, service NAMESPACE/NAME, or the address of a target",
                {"nargs": "+", "metavar": "WHAT"},
            ),
            _output("how to show it", "text", "json"),
        ),
        "It reads the cluster and Consul as a sync would, and changes nothing. Exit codes: 0 it is a target, "
        "3 it is not, 1 failure, 2 wrong settings or no such kind.",
        _OF_REGISTRAR,
    ),
    Command(
        "lint",
        "say which Pods and Services of manifests would be rejected, without a cluster",
        (
            Argument(
                "files",
                "manifests in YAML or JSON, folders of them, or - for standard input",
                {"nargs": "+", "metavar": "FILE"},
            ),
            _output("how to show the findings", "text", "json", "github"),
        ),
        "Pods and the templates of workloads are decided as the daemon decides a running Pod, Services as it decides "
        "one with an endpoint, if DISCOVER has services. Exit codes: "
        "0 nothing is rejected, 3 something is, 1 a file cannot be read, 2 wrong settings.",
        _OF_REGISTRAR,
    ),
    Command(
        "sync",
        "make one resync, and end",
        (_switch("--once", "has no effect, as there is always one resync"),),
        "For a CronJob. Exit codes: 0 done, 3 the brake holds a mass removal, of which nothing was removed, "
        "1 failure, 2 wrong settings.",
        _OF_REGISTRAR,
    ),
    Command(
        "purge",
        "remove every service of one cluster and instance from Consul",
        (
            _switch("--yes", "remove without asking"),
            Argument(
                "--cluster-uid",
                "UID of the cluster's namespace kube-system, if several clusters have one name; unset: the API "
                "server is asked for it",
                {"default": "", "metavar": "…"},
            ),
        ),
        "Stop the registrar first, or it registers everything again. These settings choose what is removed: "
        "--cluster-name, --instance, --consul-backend, --consul-node-name. The registrar's services at nodes of "
        "agents that are gone are removed too, and its node in the catalog once nothing is left on it. Exit codes: "
        "0 done, 1 not agreed to or failed, 2 wrong settings.",
        _OF_REGISTRAR,
    ),
    Command(
        "fetch-targets",
        "keep files for Prometheus equal to what registrars serve at HTTP_SD_PORT",
        (
            Argument(
                "urls",
                "URL of a registrar's HTTP_SD_PORT, such as https://registrar.example:8443/sd/targets?kind=pod; "
                "with NAME= before it that names its file",
                {"nargs": "+", "metavar": "[NAME=]URL"},
            ),
            Argument(
                "--output",
                "file that ends in .json, or a folder in which each URL has a file",
                {"required": True, "metavar": "…"},
            ),
            _each_url("--bearer-token-file", "file with the token to send"),
            _each_url("--ca-file", "file with the CAs of the registrar; unset: the system's"),
            _each_url("--cert-file", "file with a certificate to show"),
            _each_url("--key-file", "file with the key of that certificate"),
            Argument(
                "--wait",
                "seconds for which a request waits for a change, at most 60; default 25",
                {"type": float, "default": 25.0, "metavar": "…"},
            ),
            Argument(
                "--admin-port",
                "port of /healthz, /readyz and /metrics; unset: off",
                {"type": int, "metavar": "…"},
            ),
            _switch("--once", "fetch each once, and end"),
        ),
        "Runs beside a Prometheus that cannot reach the cluster's Consul, or that must keep its targets over a restart. "
        "An option for each URL is given once for all, or once for each in order. The last good state of each file "
        "stays, whatever its registrar does. Exit codes: 0 done, 1 one was not fetched (--once), 2 wrong arguments.",
    ),
    Command(
        "settings",
        "print every setting with its default and meaning",
        (_output("how to print them", *OUTPUTS),),
        "markdown: tables; json-schema: of the file that --config names; env: a template of a file of variables.",
    ),
    Command(
        "demo",
        "show both modes at work on a sandbox of this machine",
        (_switch("--keep", "keep everything running until Ctrl-C"),),
    ),
    Command(
        "completion",
        "print the completion script of a shell",
        (Argument("shell", "which shell", {"choices": ("bash", "zsh", "fish")}),),
        "bash and zsh: source <(k8s-consul-registrar completion bash); "
        "fish: k8s-consul-registrar completion fish | source",
    ),
)


def start_logs(common: CommonSettings) -> None:
    """Log as the settings say, beginning with their warnings."""
    configure_logging(common.log_level, common.log_format)
    for warning in common.warnings:
        get_logger("app").warning(warning)


def settings_offline(environment: Mapping[str, str], without: Collection[str] = ()) -> RegistrarSettings:
    """Return the settings of a command that ends soon, and log only warnings unless LOG_LEVEL is set.

    Warnings about the settings `without` which the command does its work are left out.
    """
    settings = read_registrar(environment)
    level = settings.common.log_level if environment.get("LOG_LEVEL") else "warning"
    warnings = tuple(one for one in settings.common.warnings if one.split()[0] not in without)
    start_logs(replace(settings.common, log_level=level, warnings=warnings))
    return settings


def settings_for_consul(command: str, environment: Mapping[str, str]) -> RegistrarSettings:
    """Return the settings of a command that works on Consul once; raises a `SettingsError` without a Consul."""
    settings = settings_offline(environment)
    if settings.backend.backend == NONE:
        raise SettingsError([f"{command}: there is no Consul with CONSUL_BACKEND=none"])
    return settings
