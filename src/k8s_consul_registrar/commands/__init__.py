"""The commands: each has a `Command` here, and a module or package of its name with the function `run`.

They are declared in one place because the parser needs all of them, while only the module of the command that
runs may be loaded: the others would make a mode start later and use more memory.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.settings.common import CommonSettings
from k8s_consul_registrar.settings.consul import NONE
from k8s_consul_registrar.settings.field import Setting
from k8s_consul_registrar.settings.reading import MODES, PROXY, REGISTRAR, SETTINGS, modes_of, read_registrar
from k8s_consul_registrar.settings.reference import MARKDOWN, OUTPUTS
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.telemetry import configure_logging


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of one command beside its settings; a name without dashes is a positional one."""

    name: str
    help: str
    choices: Sequence[str] = ()
    default: str | None = None
    is_switch: bool = False
    is_optional: bool = False

    def add_to(self, parser: argparse.ArgumentParser) -> argparse.Action:
        """Add it to the command's parser."""
        if self.is_switch:
            return parser.add_argument(self.name, action="store_true", help=self.help)
        return parser.add_argument(
            self.name,
            choices=self.choices or None,
            metavar=None if self.choices else "…",
            default=self.default,
            nargs="?" if self.is_optional else None,
            help=self.help,
        )


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
        code: int = import_module(f"{__name__}.{self.name}").run(parsed, environment)
        return code


CONFIG = Argument(
    "--config", "YAML file of settings, named like the variables; variables and flags take precedence"
)
COMMANDS = (
    Command(
        "registrar", "keep Consul equal to what the cluster wants scraped", settings_of=frozenset({REGISTRAR})
    ),
    Command(
        "proxy",
        "let Prometheus read every node's cAdvisor metrics through one port",
        settings_of=frozenset({PROXY}),
    ),
    Command(
        "check",
        "tell what is missing before a mode can do its work, and how to repair it",
        (
            Argument(
                "what",
                "which mode's needs; what the variable MODE says, else all",
                (*MODES, "all"),
                is_optional=True,
            ),
            Argument("--output", "how to show what was found", ("table", "json"), "table"),
        ),
        "Settings are those of the modes. Nothing is changed anywhere. Exit codes: 0 nothing failed, "
        "1 something did, 2 wrong settings. Check as the account that will run: kubectl exec "
        "deploy/k8s-consul-registrar -c k8s-consul-registrar -- k8s-consul-registrar check",
        settings_of=frozenset(MODES),
    ),
    Command(
        "plan",
        "show what a pass of the registrar would do now, and change nothing",
        (Argument("--output", "how to show it", ("diff", "json"), "diff"),),
        "+ register, ~ update, - deregister, ! left alone and why. Exit codes: 0 nothing to do, 3 changes, "
        "1 failure, 2 wrong settings.",
        settings_of=frozenset({REGISTRAR}),
    ),
    Command(
        "sync",
        "make one pass of the registrar, and end",
        (Argument("--once", "one pass; said for clarity, there is no other way", is_switch=True),),
        "For a CronJob. Exit codes: 0 done, 3 a mass removal is held by the brake and nothing of it was "
        "removed, 1 failure, 2 wrong settings.",
        settings_of=frozenset({REGISTRAR}),
    ),
    Command(
        "purge",
        "remove every service of one cluster and instance from Consul",
        (
            Argument("--yes", "remove without asking", is_switch=True),
            Argument(
                "--cluster-uid",
                "UID of the namespace kube-system of the cluster that is meant, where several have one name; "
                "asked of the API server unless given",
                default="",
            ),
        ),
        "Stop the registrar first, or it registers everything again. Settings aim it: --cluster-name, "
        "--instance, --consul-backend, --consul-node-name. What is ours at nodes of agents that are gone is "
        "removed too, and a catalog's node of our making once nothing is left on it. Exit codes: 0 done, 1 not "
        "agreed to or failed, 2 wrong settings.",
        settings_of=frozenset({REGISTRAR}),
    ),
    Command(
        "settings",
        "print every setting with its default and meaning",
        (Argument("--output", "how to print them", OUTPUTS, MARKDOWN),),
        "markdown: tables; json-schema: of the file that --config names; env: a template of a file of variables.",
    ),
    Command(
        "demo",
        "show both modes at work on a sandbox of this machine",
        (Argument("--keep", "stay up for exploring until Ctrl-C", is_switch=True),),
    ),
    Command(
        "completion",
        "print the completion script of a shell",
        (Argument("shell", "which shell", ("bash", "zsh", "fish")),),
        "bash and zsh: source <(k8s-consul-registrar completion bash); "
        "fish: k8s-consul-registrar completion fish | source",
    ),
)


def configure_logs(common: CommonSettings) -> None:
    """Log as the settings say."""
    configure_logging(common.log_level, common.log_format)


def settings_for_consul(command: str, environment: Mapping[str, str]) -> RegistrarSettings:
    """Return the settings of a command that works on Consul once, and log only warnings unless told otherwise."""
    settings = read_registrar(environment)
    if settings.backend.backend == NONE:
        raise SettingsError([f"{command}: there is no Consul with CONSUL_BACKEND=none"])
    level = settings.common.log_level if environment.get("LOG_LEVEL") else "warning"
    configure_logging(level, settings.common.log_format)
    return settings
