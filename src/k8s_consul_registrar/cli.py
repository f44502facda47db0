"""The command line: the parser built from the commands and the settings, and the call of one command."""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence

from k8s_consul_registrar import __version__
from k8s_consul_registrar.commands import COMMANDS, CONFIG, Command
from k8s_consul_registrar.runner import EXIT_SETTINGS, exit_code
from k8s_consul_registrar.settings.reading import MODES, REGISTRAR, gather
from k8s_consul_registrar.settings.reference import add_flags, help_on_variables


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
    parsed = build_parser(commands.get(arguments[0])).parse_args(arguments)
    command = commands[parsed.command]
    flags = {one.env: getattr(parsed, one.env, None) for one in command.settings}
    given = {name: value for name, value in flags.items() if value is not None}

    def run() -> int:
        return command.run(parsed, gather(environment, given, getattr(parsed, "config", None)))

    return exit_code(run, is_mode=command.is_mode)


def _unknown(what: str, given: str, choices: Iterable[str]) -> int:
    print(f"{what} {given!r} is not one of: {', '.join(choices)}", file=sys.stderr)
    return EXIT_SETTINGS


def build_parser(chosen: Command | None = None) -> argparse.ArgumentParser:
    """Build the parser; every setting is a flag of the commands that have it.

    With a chosen command it has only that one's flags: a start that needs no others is quicker.
    """
    parser = argparse.ArgumentParser(
        prog="k8s-consul-registrar",
        description="Keeps Consul equal to what a Kubernetes cluster wants scraped, and relays node metrics.",
        epilog=None if chosen else _every_variable(),
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
        if chosen not in (None, command):
            continue
        for argument in command.arguments:
            argument.add_to(subparser)
        if command.settings_of:
            CONFIG.add_to(subparser)
            add_flags(subparser, command.settings)
    return parser


def _secrets_of(command: Command) -> str:
    secrets = [one for one in command.settings if one.is_secret]
    return " ".join(f"Variable {one.env}: {one.plain_help}." for one in secrets)


def _every_variable() -> str:
    return f"""\
Without a command the variable MODE chooses: registrar (default) or proxy.
Every setting is a variable, a flag of the command, and a key of the file that --config names. The flag takes
precedence, then the variable. [r] registrar, [p] proxy:
{help_on_variables()}

Exit codes: 0 done, 1 failed, 2 wrong settings, 130 interrupted."""
