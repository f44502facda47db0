"""Sphinx configuration: the pages of this folder as a site, with the tables of the index as its navigation."""

import re
from pathlib import Path

from sphinx.application import Sphinx

project = "k8s-consul-registrar"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
root_doc = "README"
exclude_patterns = ["settings.zh-CN.yaml"]
suppress_warnings = ["misc.highlighting_failure"]  # "hcl" means Terraform's dialect to the highlighter
html_theme = "furo"
html_title = project
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]

HERE = Path(__file__).parent
LINK = re.compile(r"\]\(([\w.-]+)\.md\)")
OUTSIDE = re.compile(r"\[([^]]+)\]\(\.\./([\w./-]+\.md)[^)]*\)")


def navigation(page: Path) -> str:
    """Return a hidden table of contents for each section of an index page, from the pages it links to."""
    trees = []
    for section in page.read_text(encoding="utf-8").split("\n## ")[1:]:
        caption, _, body = section.partition("\n")
        language = ".zh-CN" if page.stem.endswith(".zh-CN") else ""
        pages = [name for name in LINK.findall(body) if name.endswith(".zh-CN") or not language]
        trees.append("\n".join(("```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```")))
    return "\n\n".join(trees)


def adapt(_app: Sphinx, name: str, source: list[str]) -> None:
    """Name pages outside this folder instead of linking to them, and append the navigation to the index pages.

    The Chinese index hangs below the English one.
    """
    source[0] = OUTSIDE.sub(r"\1 (`\2`)", source[0])
    if name == "README":
        chinese = "```{toctree}\n:hidden:\n:caption: 中文\n\nREADME.zh-CN\n```"
        source[0] += f"\n\n{navigation(HERE / 'README.md')}\n\n{chinese}\n"
    elif name == "README.zh-CN":
        source[0] += f"\n\n{navigation(HERE / 'README.zh-CN.md')}\n"


def setup(app: Sphinx) -> None:
    """Register the changes made to pages as they are read; Sphinx calls this."""
    app.connect("source-read", adapt)
