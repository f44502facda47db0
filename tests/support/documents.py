"""The commands in the documents: those that the tests run, and those that are examples for a reason.

A block that no test runs has the comment `<!-- example: reason -->` on the line before it.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.files import ROOT

SHELLS = frozenset({"bash", "console", "sh", "shell"})
PAGES = (
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "charts").rglob("*.md")),
)
_BLOCK = re.compile(
    r"(?:^ *<!-- example: (?P<reason>[^>]+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block; `reason` says why it is an example, and is empty where tests run it."""

    page: Path
    line: int
    language: str
    text: str
    reason: str

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a shell, without comments; one that goes on over several lines is whole."""
        found, begun = [], ""
        for line in self.text.splitlines(keepends=True):
            begun += line
            if not _is_whole(begun):
                continue
            if shlex.split(begun, comments=True):
                found.append(begun.strip())
            begun = ""
        return found


def _is_whole(text: str) -> bool:
    if text.endswith("\\\n"):
        return False
    heredoc = re.search(r"<<(\w+)", text)
    if heredoc and not re.search(rf"^\s*{heredoc[1]}$", text, re.MULTILINE):
        return False
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, those within lists too."""
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("indent")) + 1
        yield Block(page, line, found["language"], found["text"], found["reason"] or "")


def shell_blocks() -> Iterator[Block]:
    """Yield every block of commands in the documents of either language."""
    for page in PAGES:
        yield from (block for block in blocks_of(page) if block.language in SHELLS)


def commands_to_run(*pages: Path) -> list[str]:
    """Return the commands of all blocks that are no examples, each once, in the order of the pages."""
    commands = [
        command
        for block in shell_blocks()
        if not block.reason and (not pages or block.page in pages)
        for command in block.commands
    ]
    return list(dict.fromkeys(commands))
