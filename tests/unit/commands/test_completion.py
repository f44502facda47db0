"""Completion scripts, tried in the shells themselves where they are there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from k8s_consul_registrar.cli import main
from k8s_consul_registrar.commands import COMMANDS
from k8s_consul_registrar.commands.completion import script
from k8s_consul_registrar.settings.reading import SETTINGS, settings_of
from k8s_consul_registrar.telemetry import LEVELS

PROG = "k8s-consul-registrar"
FUNCTION = "_shtab_k8s_consul_registrar"
SHELLS = ("bash", "zsh", "fish")


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
    ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; {FUNCTION}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    return run("bash", f"{script('bash')}\n{ask}").split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not on PATH")
class TestBash:
    """The words that bash offers."""

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
        assert bash_completions("proxy", "--log-level", "") == list(LEVELS)
        assert bash_completions("check", "") == ["registrar", "proxy", "all", "delivery"]
        assert bash_completions("completion", "") == list(SHELLS)
        assert bash_completions("registrar", "") == []

    def test_real_completion_request(self) -> None:
        """The script registers itself for the command's name."""
        assert PROG in run("bash", f"{script('bash')}\ncomplete -p {PROG}")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not on PATH")
def test_zsh_takes_the_script(tmp_path: Path) -> None:
    """Zsh sources it without a complaint and registers it for the command's name."""
    file = tmp_path / "script"
    file.write_text(script("zsh"), encoding="utf-8")
    shown = run("zsh", f"autoload -U compinit && compinit -D\nsource {file}\nprint $_comps[{PROG}]")
    assert shown.strip() == FUNCTION


def test_script_for_zsh_registers_itself_when_sourced() -> None:
    """The documented `source <(…)` is a file to zsh, for which the generator's own script does nothing."""
    assert "zsh_eval_context[-1] == (eval|file) " in script("zsh")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not on PATH")
def test_fish_offers_commands_and_flags() -> None:
    """Fish offers the commands, then the flags of the one chosen."""
    text = script("fish")
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


def test_description_in_a_script_is_one_phrase() -> None:
    """A shell shows one phrase beside a word, where `--help` has whole sentences."""
    descriptions = re.findall(r" -d '?(.*?)'?$", script("fish"), re.MULTILINE)
    assert len(descriptions) > len(SETTINGS)
    assert [text for text in descriptions if ". " in text or "%" in text] == []


def test_unknown_shell_is_exit_2() -> None:
    """The shells there are, are named by the parser."""
    with pytest.raises(SystemExit) as raised:
        main(["completion", "tcsh"], {})
    assert raised.value.code == 2
