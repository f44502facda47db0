"""Write the tables of the settings into their pages, between the markers; `--check` only compares."""

import re
import sys
from pathlib import Path

import yaml

from k8s_consul_registrar.settings.reading import SETTINGS
from k8s_consul_registrar.settings.reference import tables

ROOT = Path(__file__).resolve().parent.parent
TRANSLATION = ROOT / "docs" / "settings.zh-CN.yaml"
MARKED = re.compile(r"(<!-- settings: (.+?) -->\n).*?(<!-- end of settings -->\n)", re.DOTALL)


def translated() -> dict[str, str]:
    """Return the Chinese help texts; exits if one is missing or none is needed."""
    helps: dict[str, str] = yaml.safe_load(TRANSLATION.read_text(encoding="utf-8"))
    differing = {one.env for one in SETTINGS} ^ helps.keys()
    if differing:
        sys.exit(f"{TRANSLATION.name} must have a text for each setting and no other: {sorted(differing)}")
    return helps


def filled(text: str, new: dict[str, str]) -> str:
    """Return a document with the new tables; exits if it lacks a table."""
    missing = new.keys() - {group for _, group, _ in MARKED.findall(text)}
    if missing:
        sys.exit(f"a document lacks the markers of {sorted(missing)}: <!-- settings: … -->")
    return MARKED.sub(lambda found: f"{found[1]}{new[found[2]]}{found[3]}", text)


def main() -> int:
    """Return 1 if a document was to be checked and is not up to date."""
    documents = {
        ROOT / "docs" / "configuration.md": tables(),
        ROOT / "docs" / "configuration.zh-CN.md": tables(translated(), "变量 | 默认值 | 含义"),
    }
    is_check = "--check" in sys.argv
    is_stale = False
    for path, new in documents.items():
        text = path.read_text(encoding="utf-8")
        if filled(text, new) != text:
            is_stale = True
            if not is_check:
                path.write_text(filled(text, new), encoding="utf-8")
            print(f"{'not up to date' if is_check else 'updated'}: {path.name}")
    return int(is_check and is_stale)


if __name__ == "__main__":
    sys.exit(main())
