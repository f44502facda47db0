"""Completion scripts for shells, written out of the command's own parser."""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from k8s_consul_registrar.runner import EXIT_OK

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, slots=True)
class Word:
    """One word that can be completed, and what it is for; `values` are those an option can have."""

    text: str
    purpose: str = ""
    values: tuple[str, ...] = ()
    takes_value: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its options, and the words that may stand by themselves."""

    name: str
    purpose: str
    options: tuple[Word, ...]
    words: tuple[Word, ...]


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Print the script of a shell."""
    del environment
    print(script(parsed.shell, parsed.parser), end="")
    return EXIT_OK


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return the completion script of a shell; raises KeyError for one that is none of SHELLS."""
    writers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return writers[shell](parser.prog, commands_of(parser))


def commands_of(parser: argparse.ArgumentParser) -> tuple[Command, ...]:
    """Read the commands out of a parser; the first one, without a name, is the parser itself."""
    (choice,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001 - argparse has no public way to ask
    purposes = {action.dest: action.help or "" for action in choice._choices_actions}  # noqa: SLF001 - the same
    subcommands = [_command(name, purposes.get(name, ""), one) for name, one in choice.choices.items()]
    top = Command("", "", tuple(_options(parser)), tuple(Word(one.name, one.purpose) for one in subcommands))
    return (top, *subcommands)


def _command(name: str, purpose: str, parser: argparse.ArgumentParser) -> Command:
    positional = [action for action in parser._actions if not action.option_strings]  # noqa: SLF001 - the same
    words = tuple(Word(str(value)) for action in positional for value in action.choices or ())
    return Command(name, purpose, tuple(_options(parser)), words)


def _options(parser: argparse.ArgumentParser) -> Iterator[Word]:
    for action in parser._actions:  # noqa: SLF001 - the same
        if action.help == argparse.SUPPRESS:
            continue
        purpose = re.split(r"[.;:] | \(", action.help or "")[0].strip().replace("%%", "%")
        values = tuple(str(value) for value in action.choices or ())
        if action.nargs == "?":
            values = values or ("true", "false")
        for text in action.option_strings:
            yield Word(text, purpose, values, takes_value=action.nargs != 0)


def _function_name(prog: str) -> str:
    return "_" + re.sub(r"\W", "_", prog)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _texts(words: Sequence[Word]) -> str:
    return " ".join(word.text for word in words)


def _valued(command: Command) -> Iterator[tuple[str, str]]:
    """Yield the options of a command that want a value, those with the same values together."""
    wanting = sorted((one for one in command.options if one.takes_value), key=lambda one: one.values)
    for values, options in groupby(wanting, key=lambda one: one.values):
        yield "|".join(option.text for option in options), " ".join(values)


def _bash(prog: str, commands: Sequence[Command]) -> str:
    """Values come first, then options or words; an option whose value can be anything offers files."""
    function = _function_name(prog)
    cases = []
    for command in commands:
        values = [
            f"            {text}) values={_quoted(known)}; wants=1 ;;" for text, known in _valued(command)
        ]
        cases.append(
            "\n".join(
                (
                    f"        {_quoted(command.name)})",
                    f"            options={_quoted(_texts(command.options))}; words={_quoted(_texts(command.words))}",
                    '            case "$previous" in',
                    *values,
                    "            esac ;;",
                )
            )
        )
    body = "\n".join(cases)
    return f"""# bash completion for {prog}; load it with: source <({prog} completion bash)
{function}() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="" command="" options="" words="" values="" wants=""
    COMPREPLY=()
    if (( COMP_CWORD > 1 )); then
        command="${{COMP_WORDS[1]}}"
        previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    fi
    case "$command" in
{body}
    esac
    if [[ -n "$wants" && "$current" != -* ]]; then
        if [[ -n "$values" ]]; then
            COMPREPLY=( $(compgen -W "$values" -- "$current") )
        else
            compopt -o default 2>/dev/null
        fi
    elif [[ "$current" == -* ]]; then
        COMPREPLY=( $(compgen -W "$options" -- "$current") )
    else
        COMPREPLY=( $(compgen -W "$words" -- "$current") )
    fi
}}
complete -F {function} {prog}
"""


def _zsh(prog: str, commands: Sequence[Command]) -> str:
    function = _function_name(prog)
    top, *rest = commands
    named = "\n".join(f"        {_quoted(f'{word.text}:{word.purpose}')}" for word in top.words)
    cases = "\n".join(f"        {one.name}) _arguments {_zsh_arguments(one)} ;;" for one in rest)
    return f"""#compdef {prog}
# zsh completion; load it with: source <({prog} completion zsh)
{function}() {{
    local -a commands
    commands=(
{named}
    )
    if (( CURRENT == 2 )); then
        if [[ "$PREFIX" == -* ]]; then
            _arguments {_zsh_arguments(Command("", "", top.options, ()))}
        else
            _describe command commands
        fi
        return
    fi
    local command="$words[2]"
    shift words
    (( CURRENT-- ))
    case "$command" in
{cases}
    esac
}}
if (( $+functions[compdef] )); then
    compdef {function} {prog}
fi
"""


def _zsh_arguments(command: Command) -> str:
    arguments = []
    for option in command.options:
        purpose = re.sub(r"[\[\]:]", " ", option.purpose)
        value = f": :({' '.join(option.values)})" if option.values else ": :_files"
        arguments.append(_quoted(f"{option.text}[{purpose}]{value if option.takes_value else ''}"))
    if command.words:
        arguments.append(_quoted(f"1: :({_texts(command.words)})"))
    return " ".join(arguments)


def _fish(prog: str, commands: Sequence[Command]) -> str:
    top, *rest = commands
    lines = [
        f"# fish completion for {prog}; load it with: {prog} completion fish | source",
        f"complete -c {prog} -f",
    ]
    lines += [
        f"complete -c {prog} -n __fish_use_subcommand -a {word.text} -d {_quoted(word.purpose)}"
        for word in top.words
    ]
    for command in commands:
        condition = f"__fish_seen_subcommand_from {command.name}" if command.name else "__fish_use_subcommand"
        lines += [
            f"complete -c {prog} -n {_quoted(condition)} {_fish_option(one)}" for one in command.options
        ]
    for command in rest:
        if command.words:
            condition = _quoted(f"__fish_seen_subcommand_from {command.name}")
            lines.append(f"complete -c {prog} -n {condition} -a {_quoted(_texts(command.words))}")
    return "\n".join(lines) + "\n"


def _fish_option(option: Word) -> str:
    name = f"-l {option.text[2:]}" if option.text.startswith("--") else f"-s {option.text[1:]}"
    value = ""
    if option.takes_value:
        value = f" -x -a {_quoted(' '.join(option.values))}" if option.values else " -r -F"
    return f"{name}{value} -d {_quoted(option.purpose)}"
