"""The prose of source, tests and documents: plain English, as the Kubernetes documentation is written."""

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from support.files import PACKAGE, ROOT

# Words of translated or old English, and pronouns without a noun.
STILTED = re.compile(
    r"\b(anew|for ever|whoever|somebody|nobody|of ours|so many|to be had|whom|took in|takes in|take in"
    r"|is told|was told|are told|is heard|was heard)\b",
    re.IGNORECASE,
)
# A docstring begins with a noun or a verb.
QUESTION = re.compile(r"(What|Whether|Whom|How)\b")
MOST = 1


def texts_of(module: Path) -> Iterator[str]:
    """Yield the comments and docstrings of a module."""
    source = module.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def stilted(text: str) -> list[str]:
    """Return the phrases of a text that no one would say to a colleague."""
    return STILTED.findall(text) + ([text[:30]] if QUESTION.match(text) else [])


def test_prose_is_plain() -> None:
    """Source, tests, scripts and pages together keep below a handful of such phrases."""
    found: Counter[str] = Counter()
    for folder in (PACKAGE, *(ROOT / name for name in ("tests", "benchmarks", "scripts"))):
        for module in folder.rglob("*.py"):
            for text in texts_of(module):
                found.update(f"{module.relative_to(ROOT)}: {phrase}" for phrase in stilted(text))
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        if ".zh-CN" not in page.name:
            found.update(
                f"{page.name}: {phrase}" for phrase in STILTED.findall(page.read_text(encoding="utf-8"))
            )
    assert found.total() <= MOST, sorted(found)


def test_stilted_phrases_are_found() -> None:
    """The check sees a phrase, a question, and nothing in plain prose."""
    assert stilted("What nobody is told.") == ["nobody", "is told", "What nobody is told."]
    assert stilted("Return the services of this registrar.") == []
