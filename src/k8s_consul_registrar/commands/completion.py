"""The command completion: prints the script that makes a shell complete commands, flags and known values."""

import argparse
import re
from collections.abc import Mapping

import shtab

from k8s_consul_registrar.commands import COMMANDS, CONFIG
from k8s_consul_registrar.runner import EXIT_OK

PROG = "k8s-consul-registrar"
# shtab's zsh script registers itself only if it is evaluated; the documented `source <(…)` is a file.
_EVALUATED = "$zsh_eval_context[-1] == eval "
_SOURCED = "$zsh_eval_context[-1] == (eval|file) "


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Print the script of a shell."""
    del environment
    print(script(parsed.shell))
    return EXIT_OK


def script(shell: str) -> str:
    """Return the completion script of a shell."""
    text: str = shtab.complete(_parser(), shell=shell)
    return text.replace(_EVALUATED, _SOURCED)


def _parser() -> argparse.ArgumentParser:
    """Build the parser of the command line with one phrase as each help text, and known values as choices."""
    parser = argparse.ArgumentParser(prog=PROG)
    parser.add_argument("--version", action="store_true", help="print the version")
    subparsers = parser.add_subparsers()
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        for argument in command.arguments:
            argument.add_to(subparser).help = _phrase(argument.help)
        if command.settings_of:
            CONFIG.add_to(subparser).help = _phrase(CONFIG.help)
        for option in command.settings:
            if option.is_secret:
                continue
            subparser.add_argument(
                option.flag,
                nargs="?" if option.is_boolean else None,
                choices=("true", "false") if option.is_boolean else option.parser.schema.get("enum"),
                help=_phrase(option.plain_help),
            )
    return parser


def _phrase(text: str) -> str:
    return re.split(r"[.;] | \(", text)[0].strip().replace("%", "%%")
