"""The command line: the parser built from the commands and the settings, and the call of one command."""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill

from k8s_consul_registrar import __version__
from k8s_consul_registrar.commands import COMMANDS, Command
from k8s_consul_registrar.runner import EXIT_SETTINGS, exit_code
from k8s_consul_registrar.settings.option import MODES, REGISTRAR, Option
from k8s_consul_registrar.settings.options import OPTIONS

_WIDTH = 100
_INDENT = "      "


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Run the command and return its exit code, one of `runner`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    environment = dict(os.environ if environment is None else environment)
    commands = {command.name: command for command in COMMANDS}
    if not arguments or arguments[0] not in {*commands, "-h", "--help", "--version"}:
        if arguments and not arguments[0].startswith("-"):
            return _unknown("command", arguments[0], commands)
        mode = environment.get("MODE", "").strip().lower() or REGISTRAR
        if mode not in MODES:
            return _unknown("MODE", mode, MODES)
        arguments = [mode, *arguments]
    parsed = build_parser().parse_args(arguments)
    command = commands[parsed.command]
    flags = {option.env: getattr(parsed, option.env, None) for option in command.settings}
    given = {name: value for name, value in flags.items() if value is not None}
    return exit_code(lambda: command.run(parsed, {**environment, **given}), is_mode=command.is_mode)


def _unknown(what: str, given: str, choices: Iterable[str]) -> int:
    print(f"{what} {given!r} is not one of: {', '.join(choices)}", file=sys.stderr)
    return EXIT_SETTINGS


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; every setting is a flag of the commands that heed it."""
    parser = argparse.ArgumentParser(
        prog="k8s-consul-registrar",
        description="Keeps Consul equal to what a Kubernetes cluster wants scraped, and relays node metrics.",
        epilog=_every_variable(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", title="commands")
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=command.notes or _secrets_of(command),
            allow_abbrev=False,
        )
        for argument in command.arguments:
            argument.add_to(subparser)
        for option in command.settings:
            _add_flag(subparser, option)
    return parser


def _add_flag(parser: argparse.ArgumentParser, option: Option) -> None:
    default = f" (default {option.default})" if option.default else ""
    text = f"{option.help}{default}; variable {option.env}".replace("%", "%%")
    if option.is_secret:
        return
    if option.is_boolean:
        parser.add_argument(
            option.flag, dest=option.env, nargs="?", const="true", metavar="true|false", help=text
        )
    else:
        parser.add_argument(option.flag, dest=option.env, metavar="…", help=text)


def _secrets_of(command: Command) -> str:
    secrets = [option for option in command.settings if option.is_secret]
    return "".join(f"Variable {option.env}: {option.help}." for option in secrets)


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
