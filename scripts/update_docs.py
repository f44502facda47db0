"""Write the tables of the settings and of the reasons into their pages, between the markers; `--check` only compares."""

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.settings.reading import SETTINGS
from k8s_consul_registrar.settings.reference import tables

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(
    r"(<!-- (settings: .+?|reasons) -->\n).*?(<!-- end of (?:settings|reasons) -->\n)", re.DOTALL
)
REASONS = "reasons"


def translated(name: str, keys: Iterable[str]) -> dict[str, str]:
    """Return the Chinese texts of the settings or reasons; exits if one is missing or is not needed."""
    path = ROOT / "docs" / f"{name}s.zh-CN.yaml"
    texts: dict[str, str] = yaml.safe_load(path.read_text(encoding="utf-8"))
    differing = set(keys) ^ texts.keys()
    if differing:
        sys.exit(f"{path.name} must have a text for each {name} and no other: {sorted(differing)}")
    return texts


def settings(tables: Mapping[str, str]) -> dict[str, str]:
    """Return the tables of the settings by their marker."""
    return {f"settings: {group}": table for group, table in tables.items()}


def reasons(texts: Mapping[str, str], head: str) -> dict[str, str]:
    """Return the table of the reasons by its marker."""
    lines = (f"| {head} |", "|---|---|", *(f"| `{one}` | {text} |" for one, text in texts.items()))
    return {REASONS: "".join(f"{line}\n" for line in lines)}


def filled(text: str, new: Mapping[str, str]) -> str:
    """Return a document with the new tables; exits if it lacks a table."""
    missing = new.keys() - {marker for _, marker, _ in MARKED.findall(text)}
    if missing:
        sys.exit(f"a document lacks the markers of {sorted(missing)}: <!-- … -->")
    return MARKED.sub(lambda found: f"{found[1]}{new[found[2]]}{found[3]}", text)


def main() -> int:
    """Return 1 if a document was to be checked and is not up to date."""
    helps = translated("setting", (one.env for one in SETTINGS))
    causes = translated("reason", Reason)
    documents = {
        "configuration.md": settings(tables()),
        "configuration.zh-CN.md": settings(tables(helps, "变量 | 默认值 | 含义")),
        "annotations.md": reasons({one: one.meaning for one in Reason}, "reason | cause"),
        "annotations.zh-CN.md": reasons({one: causes[one] for one in Reason}, "原因 | 说明"),
    }
    is_check = "--check" in sys.argv
    is_stale = False
    for name, new in documents.items():
        path = ROOT / "docs" / name
        text = path.read_text(encoding="utf-8")
        if filled(text, new) != text:
            is_stale = True
            if not is_check:
                path.write_text(filled(text, new), encoding="utf-8")
            print(f"{'not up to date' if is_check else 'updated'}: {path.name}")
    return int(is_check and is_stale)


if __name__ == "__main__":
    sys.exit(main())
