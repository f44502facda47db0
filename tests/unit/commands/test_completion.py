"""Completion scripts, tried in the shells themselves where they are there."""

import re
import shutil
import subprocess

import pytest

from k8s_consul_registrar.cli import build_parser, main
from k8s_consul_registrar.commands import COMMANDS
from k8s_consul_registrar.commands.completion import SHELLS, commands_of, script
from k8s_consul_registrar.settings.reading import SETTINGS, settings_of

PROG = "k8s-consul-registrar"


def run(shell: str, text: str) -> str:
    """Run a program of a shell's and return what it prints; fail on any complaint."""
    done = subprocess.run(
        [shell, "-c", text],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def bash_completions(*words: str) -> list[str]:
    """Return what bash offers for the last of these words."""
    typed = " ".join(f"'{word}'" for word in (PROG, *words))
    ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _k8s_consul_registrar; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    return run("bash", f"{script('bash', build_parser())}\n{ask}").split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not on PATH")
class TestBash:
    """What bash offers."""

    def test_commands(self) -> None:
        """The first word is a command, completed from what is typed."""
        assert set(bash_completions("")) == {one.name for one in COMMANDS}
        assert bash_completions("reg") == ["registrar"]
        assert "--version" in bash_completions("--")

    @pytest.mark.parametrize("mode", ["registrar", "proxy"])
    def test_flags_of_a_mode(self, mode: str) -> None:
        """After a mode come its flags, all of them and no other mode's."""
        expected = {option.flag for option in settings_of(mode) if not option.is_secret}
        assert set(bash_completions(mode, "--")) == {*expected, "--config", "--help"}

    def test_values(self) -> None:
        """Known values are offered after their flag, words where a command takes them."""
        assert bash_completions("registrar", "--allow-mass-deregister", "t") == ["true"]
        assert bash_completions("check", "--output", "") == ["table", "json"]
        assert bash_completions("check", "") == ["registrar", "proxy", "all"]
        assert bash_completions("completion", "") == list(SHELLS)
        assert bash_completions("registrar", "") == []

    def test_a_real_completion_request(self) -> None:
        """The script registers itself for the command's name."""
        assert PROG in run("bash", f"{script('bash', build_parser())}\ncomplete -p {PROG}")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not on PATH")
def test_zsh_takes_the_script() -> None:
    """Zsh reads it without a complaint and registers it for the command's name."""
    text = script("zsh", build_parser())
    shown = run("zsh", f"autoload -U compinit && compinit -D\n{text}\nprint $_comps[{PROG}]")
    assert shown.strip() == "_k8s_consul_registrar"


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not on PATH")
def test_fish_offers_commands_and_flags() -> None:
    """Fish offers the commands, then the flags of the one chosen."""
    text = script("fish", build_parser())
    offered = run("fish", f"{text}\ncomplete -C '{PROG} '")
    assert {line.split("\t")[0] for line in offered.splitlines()} == {one.name for one in COMMANDS}
    offered = run("fish", f"{text}\ncomplete -C '{PROG} proxy --'")
    assert "--proxy-paths" in offered
    assert "--cluster-name" not in offered


@pytest.mark.parametrize("shell", SHELLS)
def test_every_flag_is_in_every_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a script that names each command and each flag, and no secret."""
    assert main(["completion", shell], {}) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"\b{command.name}\b", shown)
    for option in SETTINGS:
        flag = option.flag[2:]
        assert (re.search(rf"(--|-l ){flag}(?![\w-])", shown) is None) is option.is_secret, option.env


def test_purposes_are_short_and_plain() -> None:
    """What a shell shows beside a word is one phrase without characters that a shell would heed."""
    for command in commands_of(build_parser()):
        for word in (*command.options, *command.words):
            assert "\n" not in word.purpose
            assert "%" not in word.purpose


def test_an_unknown_shell_is_exit_2() -> None:
    """The shells there are, are named by the parser."""
    with pytest.raises(SystemExit) as raised:
        main(["completion", "tcsh"], {})
    assert raised.value.code == 2
