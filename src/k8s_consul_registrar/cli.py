"""The command: which mode, with which settings."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import fill

from k8s_consul_registrar import __version__
from k8s_consul_registrar.app.completion import SHELLS, script
from k8s_consul_registrar.app.lifecycle import EXIT_OK, EXIT_SETTINGS, complain, run_mode
from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.settings.backend_options import NONE
from k8s_consul_registrar.settings.modes import CommonSettings, read_proxy, read_registrar
from k8s_consul_registrar.settings.option import MODES, PROXY, REGISTRAR, Option
from k8s_consul_registrar.settings.options import OPTIONS, options_of
from k8s_consul_registrar.telemetry import configure_logging

DEMO = "demo"
CHECK = "check"
PLAN = "plan"
SYNC = "sync"
PURGE = "purge"
ALL = "all"
OUTPUTS = ("table", "json")
COMPLETION = "completion"
COMMANDS = {
    REGISTRAR: "keep Consul equal to what the cluster wants scraped",
    PROXY: "let Prometheus read every node's cAdvisor metrics through one port",
    CHECK: "tell what is missing before a mode can do its work, and how to repair it",
    PLAN: "show what a pass of the registrar would do now, and change nothing",
    SYNC: "make one pass of the registrar, and end",
    PURGE: "remove every service of one cluster and instance from Consul",
    DEMO: "show both modes at work on a sandbox of this machine",
    COMPLETION: "print the completion script of a shell",
}
_WIDTH = 100
_INDENT = "      "


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 failed, 2 wrong settings, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    environment = dict(os.environ if environment is None else environment)
    parser = build_parser()
    if not arguments or arguments[0] not in {*COMMANDS, "-h", "--help", "--version"}:
        if arguments and not arguments[0].startswith("-"):
            return _wrong_mode(arguments[0], "command", COMMANDS)
        mode = environment.get("MODE", "").strip().lower() or REGISTRAR
        if mode not in MODES:
            return _wrong_mode(mode, "MODE", MODES)
        arguments = [mode, *arguments]
    return _carry_out(parser.parse_args(arguments), parser, environment)


def _carry_out(
    parsed: argparse.Namespace, parser: argparse.ArgumentParser, environment: Mapping[str, str]
) -> int:
    if parsed.command == DEMO:
        from k8s_consul_registrar.app.demo import run_demo  # noqa: PLC0415 - needs the extra [sandbox]

        return run_demo(keep=parsed.keep)
    if parsed.command == COMPLETION:
        print(script(parsed.shell, parser), end="")
        return EXIT_OK
    flags = {option.env: getattr(parsed, option.env) for option in OPTIONS if hasattr(parsed, option.env)}
    given = {name: value for name, value in flags.items() if value is not None}
    environment = {**environment, **given}
    if parsed.command == CHECK:
        from k8s_consul_registrar.app.check import run_check  # noqa: PLC0415 - a mode does without it

        return run_check(_checked(parsed.what, environment), environment, output=parsed.output)
    if parsed.command in (PLAN, SYNC, PURGE):
        return _once(parsed, environment)
    return _run(parsed.command, environment)


def _once(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Run a command that reads the registrar's settings, does one thing and ends."""
    try:
        settings = read_registrar({"LOG_LEVEL": "warning", **environment})
    except SettingsError as error:
        return complain(error)
    if settings.backend.backend == NONE:
        print(f"{parsed.command}: there is no Consul with CONSUL_BACKEND=none", file=sys.stderr)
        return EXIT_SETTINGS
    _configure_logging(settings.common)
    if parsed.command == PURGE:
        from k8s_consul_registrar.app.purge import run_purge  # noqa: PLC0415 - a mode does without it

        if settings.has_default_name:
            print("purge: name the cluster by CLUSTER_NAME or --cluster-name", file=sys.stderr)
            return EXIT_SETTINGS
        return run_purge(settings, is_agreed=parsed.yes, cluster_uid=parsed.cluster_uid)
    from k8s_consul_registrar.app.once import run_plan, run_sync  # noqa: PLC0415 - the same

    return run_plan(settings, output=parsed.output) if parsed.command == PLAN else run_sync(settings)


def _checked(asked: str | None, environment: Mapping[str, str]) -> Sequence[str]:
    """Return the modes to check: those asked for, else the one of this Pod, else all."""
    mode = asked or environment.get("MODE", "").strip().lower()
    return (mode,) if mode in MODES else MODES


def _run(mode: str, environment: Mapping[str, str]) -> int:
    try:
        if mode == PROXY:
            from k8s_consul_registrar.app.proxy import run_proxy  # noqa: PLC0415 - each mode loads its own

            proxy = read_proxy(environment)
            _configure_logging(proxy.common)
            return run_mode(lambda stop: run_proxy(proxy, stop))
        from k8s_consul_registrar.app.registrar import run_registrar  # noqa: PLC0415 - the same

        registrar = read_registrar(environment)
        _configure_logging(registrar.common)
        return run_mode(lambda stop: run_registrar(registrar, stop))
    except SettingsError as error:
        return complain(error)


def _configure_logging(common: CommonSettings) -> None:
    configure_logging(common.log_level, common.log_format)


def _wrong_mode(given: str, what: str, choices: Iterable[str]) -> int:
    print(f"{what} {given!r} is not one of: {', '.join(choices)}", file=sys.stderr)
    return EXIT_SETTINGS


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; every setting is a flag of the modes that heed it."""
    parser = argparse.ArgumentParser(
        prog="k8s-consul-registrar",
        description="Keeps Consul equal to what a Kubernetes cluster wants scraped, and relays node metrics.",
        epilog=_every_variable(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=purpose,
            description=purpose[0].upper() + purpose[1:] + ".",
            epilog=_secrets_of(name),
            allow_abbrev=False,
        )
        if name in _ADDITIONS:
            _ADDITIONS[name](command)
        for option in _options_of(name):
            _add_flag(command, option)
    return parser


def _options_of(command: str) -> Iterable[Option]:
    """Return the settings that a command heeds."""
    if command == CHECK:
        return OPTIONS
    return options_of(REGISTRAR if command in (PLAN, SYNC, PURGE) else command)


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", choices=("diff", "json"), default="diff", help="how to show it")
    command.epilog = (
        "+ register, ~ update, - deregister, ! left alone and why. Exit codes: 0 nothing to do, 3 changes, "
        "1 failure, 2 wrong settings."
    )


def _add_sync(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--once", action="store_true", help="one pass; said for clarity, there is no other way"
    )
    command.epilog = (
        "For a CronJob. Exit codes: 0 done, 3 a mass removal is held by the brake and nothing of it was "
        "removed, 1 failure, 2 wrong settings."
    )


def _add_purge(command: argparse.ArgumentParser) -> None:
    command.add_argument("--yes", action="store_true", help="remove without asking")
    command.add_argument(
        "--cluster-uid",
        default="",
        metavar="…",
        help="UID of the namespace kube-system of the cluster that is meant, where several have one name; "
        "asked of the API server unless given",
    )
    command.epilog = (
        "Stop the registrar first, or it registers everything again. Settings aim it: --cluster-name, "
        "--instance, --consul-backend, --consul-node-name. What is ours at nodes of agents that are gone is "
        "removed too, and a catalog's node of our making once nothing is left on it. Exit codes: 0 done, 1 not "
        "agreed to or failed, 2 wrong settings."
    )


def _add_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--keep", action="store_true", help="stay up for exploring until Ctrl-C")


def _add_check(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "what",
        nargs="?",
        choices=(*MODES, ALL),
        help="which mode's needs; what the variable MODE says, else all",
    )
    command.add_argument("--output", choices=OUTPUTS, default=OUTPUTS[0], help="how to show what was found")
    command.epilog = (
        "Settings are those of the modes. Nothing is changed anywhere. Exit codes: 0 nothing failed, "
        "1 something did, 2 wrong settings. Check as the account that will run: kubectl exec "
        "deploy/k8s-consul-registrar -c k8s-consul-registrar -- k8s-consul-registrar check"
    )


def _add_completion(command: argparse.ArgumentParser) -> None:
    command.add_argument("shell", choices=SHELLS, help="which shell")
    command.epilog = (
        "bash and zsh: source <(k8s-consul-registrar completion bash); "
        "fish: k8s-consul-registrar completion fish | source"
    )


_ADDITIONS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    DEMO: _add_demo,
    CHECK: _add_check,
    PLAN: _add_plan,
    SYNC: _add_sync,
    PURGE: _add_purge,
    COMPLETION: _add_completion,
}


def _add_flag(command: argparse.ArgumentParser, option: Option) -> None:
    default = f" (default {option.default})" if option.default else ""
    text = f"{option.help}{default}; variable {option.env}".replace("%", "%%")
    if option.is_secret:
        return
    if option.is_boolean:
        command.add_argument(
            option.flag, dest=option.env, nargs="?", const="true", metavar="true|false", help=text
        )
    else:
        command.add_argument(option.flag, dest=option.env, metavar="…", help=text)


def _secrets_of(command: str) -> str | None:
    secrets = [option for option in options_of(command) if option.is_secret]
    return "".join(f"Variable {option.env}: {option.help}." for option in secrets) or None


def _every_variable() -> str:
    lines = [
        "Without a command the variable MODE chooses: registrar (default) or proxy.",
        "Every setting is a variable, and a flag of the command; the flag counts. [r] registrar, [p] proxy:",
        "",
    ]
    for option in OPTIONS:
        marks = "".join(f"[{mode[0]}]" for mode in MODES if mode in option.modes)
        default = f" Default: {option.default}." if option.default else ""
        lines.append(f"  {option.env} {marks}")
        lines.append(
            fill(
                f"{option.help}.{default}",
                _WIDTH,
                initial_indent=_INDENT,
                subsequent_indent=_INDENT,
                break_on_hyphens=False,
            )
        )
    lines += ["", "Exit codes: 0 done, 1 failed, 2 wrong settings, 130 interrupted."]
    return "\n".join(lines)
