"""The documents against the code: what they list exists, and both languages say the same."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from k8s_consul_registrar import runner
from k8s_consul_registrar.admin.metrics import new_registry
from k8s_consul_registrar.cli import build_parser
from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.proxy.metrics import ProxyCollector
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.proxy.stats import ProxyStats
from k8s_consul_registrar.registrar.decide import Kept
from k8s_consul_registrar.registrar.metrics import (
    PASS_OUTCOMES,
    WRITE_OUTCOMES,
    WRITE_VERBS,
    Figures,
    RegistrarCollector,
    RegistrarMetrics,
)
from k8s_consul_registrar.registrar.orphans import Stays
from k8s_consul_registrar.settings.reading import PROXY, REGISTRAR, SETTINGS, modes_of
from support.files import ROOT
from support.waiting import PATIENCE

PACKAGE = ROOT / "src" / "k8s_consul_registrar"
DOCS = ROOT / "docs"
README = ROOT / "README.md"
ARCHITECTURE, OPERATIONS = DOCS / "architecture.md", DOCS / "operations.md"
DOCUMENTS = (
    README,
    ROOT / "README.zh-CN.md",
    *sorted(DOCS.glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
)
CHINESE = ".zh-CN.md"
# Pages in both languages: the English one of each.
TRANSLATED = [one for one in DOCUMENTS if (one.parent / f"{one.stem}{CHINESE}").exists()]

MOST_LINES_OF_README = 200
UNSET = "–"  # noqa: RUF001 - how a table shows a setting without a default

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"(^|\s)# .*$", re.MULTILINE)
# What stays in its own spelling whatever the language: settings, metrics, headers, labels, paths, flags.
NAME = re.compile(
    r"`(?:[A-Z][A-Z0-9]*_[A-Z0-9_]+|k8s_consul_registrar\w+|X-[\w-]+|__\w+|/[\w/.-]+|--[\w-]+)`"
)
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def in_each_language(name: str) -> pytest.MarkDecorator:
    """Run a test on a page of `docs/` in English and in Chinese."""
    pages = (DOCS / f"{name}.md", DOCS / f"{name}{CHINESE}")
    return pytest.mark.parametrize("page", pages, ids=lambda path: path.name)


def text_of(document: Path) -> str:
    """Return a document whole."""
    return document.read_text(encoding="utf-8")


def prose_of(document: Path) -> str:
    """Return a document without its fenced blocks."""
    return FENCE.sub("", text_of(document))


def headings(document: Path) -> list[tuple[int, str]]:
    """Return the level and the words of each heading, in order."""
    return [(len(marks), words) for marks, words in HEADING.findall(prose_of(document))]


def sections(page: Path) -> list[str]:
    """Return what stands under each heading; the same index means the same section in both languages."""
    return re.split(r"^#+ .+$", prose_of(page), flags=re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return language and text of each fenced block, without comments, which are translated."""
    return [(language, COMMENT.sub("", text)) for language, text in FENCE.findall(text_of(page))]


def first_cells(text: str) -> list[list[str]]:
    """Return the pieces of code in the first cell of each row of tables."""
    return [re.findall(r"`[^`]+`", cell) for cell in re.findall(r"^\| (.*?) \|", text, re.MULTILINE)]


def rows(text: str) -> dict[str, str]:
    """Return the tables' rows whose first cell is one piece of code, by it, with their second cell."""
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]*?) \|", text, re.MULTILINE))


def anchor(words: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")


def metric_names() -> set[str]:
    """Return the names of all our metrics, as Prometheus shows them; a histogram's without its suffixes."""
    registry: CollectorRegistry = new_registry("registrar")
    RegistrarMetrics(registry)
    stats = ProxyStats(dict.fromkeys(Outcome, 0), 0, 0, 0, 0, 0, 0, 0, 0, 0, nodes_known=True, workers=1)
    registry.register(RegistrarCollector(Figures))
    families = [*registry.collect(), *ProxyCollector(lambda: stats).collect()]
    names = {f"{one.name}_total" if one.type == "counter" else one.name for one in families}
    return {name for name in names if name.startswith("k8s_consul_registrar")}


def default_cell(default: str) -> str:
    """Return how a table shows a default."""
    return f"`{default}`" if default else UNSET


@in_each_language("configuration")
def test_every_setting_is_documented_with_its_default(page: Path) -> None:
    """The configuration tables hold every setting with its default, under its mode, and nothing else."""
    index = next(i for i, part in enumerate(sections(page)) if "<!-- settings: Both modes -->" in part)
    both, registrar, proxy = sections(page)[index : index + 3]
    for table, modes in ((both, {REGISTRAR, PROXY}), (registrar, {REGISTRAR}), (proxy, {PROXY})):
        expected = {one.env: default_cell(one.default) for one in SETTINGS if set(modes_of(one)) == modes}
        assert rows(table) == expected
    assert "`MODE`" in both


@pytest.mark.parametrize("script", ["update_docs.py", "update_chart.py"])
def test_derived_texts_are_up_to_date(script: str) -> None:
    """Tables of the settings, and the chart's schema, table and alerts; `make docs` repairs them."""
    command = (sys.executable, ROOT / "scripts" / script, "--check")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stdout + done.stderr) == (0, ""), "run make docs"


@in_each_language("annotations")
def test_every_reason_is_documented(page: Path) -> None:
    """The table of rejections holds the reasons of the code."""
    (table,) = [part for part in sections(page) if "| `no_ip` |" in part]
    assert set(rows(table)) == {reason.value for reason in Reason}


@in_each_language("metrics")
def test_every_metric_is_documented(page: Path) -> None:
    """The tables of metrics hold every name the code shows, and no other."""
    text = prose_of(page)
    assert {name for name in rows(text) if name.startswith("k8s_")} == metric_names()
    labels = (*PASS_OUTCOMES, *WRITE_VERBS, *WRITE_OUTCOMES, *(why.value for why in (*Kept, *Stays)))
    assert [label for label in labels if f"`{label}`" not in text] == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.name)
def test_no_metric_is_named_that_does_not_exist(page: Path) -> None:
    """A metric named anywhere in the text is one of the code's."""
    parts = re.compile(r"_(bucket|sum|count)$")  # of a histogram
    named = {parts.sub("", name) for name in re.findall(r"\bk8s_consul_registrar_\w+", prose_of(page))}
    assert named - {parts.sub("", name) for name in metric_names()} == set()


@in_each_language("commands")
def test_exit_codes_are_documented(page: Path) -> None:
    """The table of exit codes holds the codes of the code."""
    codes = {value for name, value in vars(runner).items() if name.startswith("EXIT_")}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", sections(page)[-1], re.MULTILINE)} == codes


def test_readmes_are_short() -> None:
    """A README is an entrance; all else has a page of its own."""
    lines = {
        one.name: len(text_of(one).splitlines())
        for one in DOCUMENTS
        if one.parent == ROOT and "README" in one.name
    }
    assert {name: count for name, count in lines.items() if count > MOST_LINES_OF_README} == {}


@pytest.mark.parametrize("language", ["", "zh-CN"])
def test_every_page_is_in_the_index(language: str) -> None:
    """The index of each language leads to every page, in its language where there is one."""
    suffix = f".{language}.md" if language else ".md"
    linked = {target.partition("#")[0] for target in LINK.findall(text_of(DOCS / f"README{suffix}"))}
    pages = {one.name for one in DOCS.glob("*.md") if CHINESE not in one.name and one.stem != "README"}
    if language:
        pages = {
            Path(one).stem + CHINESE if (DOCS / f"{Path(one).stem}{CHINESE}").exists() else one
            for one in pages
        }
    assert pages - linked == set()


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda path: path.name)
def test_languages_are_level(page: Path) -> None:
    """Both languages have headings of the same levels, the same commands, tables, list entries and names."""
    chinese = page.parent / f"{page.stem}{CHINESE}"
    assert [level for level, _ in headings(page)] == [level for level, _ in headings(chinese)]
    assert blocks(page) == blocks(chinese)
    for start in ("|", "- "):
        english, translated = (
            [sum(line.startswith(start) for line in part.splitlines()) for part in sections(one)]
            for one in (page, chinese)
        )
        assert english == translated
    for part, its_chinese in zip(sections(page), sections(chinese), strict=True):
        assert first_cells(part) == first_cells(its_chinese)
        assert set(NAME.findall(part)) == set(NAME.findall(its_chinese))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Every link within the project leads to a file, and to a heading where it names one."""
    for target in LINK.findall(prose_of(document)):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if fragment:
            assert fragment in {anchor(words) for _, words in headings(file)}, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(document: Path) -> None:
    """Every `make` command a document shows is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    shown = re.findall(r"(?:^|`)make ([a-z-]+)", text_of(document), re.MULTILINE)
    assert set(shown) <= targets


def test_manifests_named_exist() -> None:
    """The files of `deploy/` that the page names are there, and those with lines to change are all named."""
    for page in (DOCS / "deployment.md", DOCS / f"deployment{CHINESE}"):
        named = set(re.findall(r"[a-z-]+\.yaml|prometheus\.yml", text_of(page)))
        assert all((ROOT / "deploy" / name).exists() for name in named)
        files = [path for path in (ROOT / "deploy").iterdir() if path.is_file()]
        changed = {path.name for path in files if "CHANGE" in text_of(path)}
        assert changed <= named


def test_demo_tells_what_the_readme_shows() -> None:
    """Every step of the demo that the README and the quick start show is one the demo takes."""
    shown = text_of(README) + text_of(DOCS / "quick-start.md")
    steps = re.findall(r"^== ([^:\n]+)", shown, re.MULTILINE)
    told = text_of(PACKAGE / "commands" / "demo.py")
    assert steps
    assert [step for step in steps if step not in told] == []


def test_architecture_s_layers_are_the_contract_s() -> None:
    """The layers drawn are those that import-linter holds."""
    config = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    contracts = {one["name"]: one for one in config["tool"]["importlinter"]["contracts"]}
    layers = contracts["Imports point one way"]["layers"]
    drawn = [block.splitlines() for _, block in FENCE.findall(text_of(ARCHITECTURE))]
    assert layers in drawn
    pure = contracts["Decisions are pure: no loop, no sockets, no telemetry"]["source_modules"]
    prose = prose_of(ARCHITECTURE)
    named = [module.removeprefix("k8s_consul_registrar.").replace(".", "/") for module in pure]
    assert [module for module in named if f"`{module}`" not in prose] == []


def test_modules_the_architecture_names_exist() -> None:
    """A module named as `folder/module` is a file of the package; every top-level module has its row."""
    named = re.findall(r"`([a-z_]+/[a-z_]+)`", prose_of(ARCHITECTURE))
    elsewhere = {"tests/data"}
    missing = [name for name in named if name not in elsewhere and not (PACKAGE / f"{name}.py").exists()]
    assert named
    assert missing == []
    top = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert [name for name in sorted(top - {"__init__"}) if f"`{name}`" not in prose_of(ARCHITECTURE)] == []


def test_modules_that_contributing_names_exist() -> None:
    """Each file that a contributor is sent to exists."""
    named = re.findall(r"`([a-z_]+/\w+\.py)`", text_of(ROOT / "CONTRIBUTING.md"))
    assert named
    assert [name for name in named if not (PACKAGE / name).exists()] == []


def test_help_mentions_every_variable() -> None:
    """The help of the command names every variable, as a line of its own, and `MODE`."""
    shown = build_parser().format_help()
    assert "variable MODE" in shown
    for option in SETTINGS:
        assert re.search(rf"^  {option.env} \[", shown, re.MULTILINE), option.env


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_shown_are_understood(document: Path) -> None:
    """Every `k8s-consul-registrar` command line in a block is one that the parser takes."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", text_of(document), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    for line in lines:
        if line.startswith("k8s-consul-registrar "):
            words = shlex.split(line)[1:]
            if words != ["--help"]:
                build_parser().parse_args(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_variables_named_are_settings(document: Path) -> None:
    """A word that looks like one of our variables is one."""
    known = {option.env for option in SETTINGS}
    families = {name.split("_")[0] for name in known if "_" in name} - {"LOG", "MAX"}
    named = re.findall(rf"`((?:{'|'.join(sorted(families))})_[A-Z_]+)\b", prose_of(document))
    assert sorted(set(named) - known) == []


def test_texts_that_troubleshooting_quotes_are_in_the_code() -> None:
    """Each text quoted as a symptom is one that the code says."""
    quoted = re.findall(
        r"^\| (?:\d+, )?`([^`]+)`[^|]* \| [^|]* \| [^|]* \|$",
        text_of(DOCS / "troubleshooting.md"),
        re.MULTILINE,
    )
    code = " ".join(
        text_of(path) for path in PACKAGE.rglob("*.py") if "sandbox" not in path.relative_to(PACKAGE).parts
    )
    joined = re.sub(r'"\s*f?"', "", code)  # a text may be written over several lines
    assert len(quoted) > 10
    assert [text for text in quoted if text not in joined] == []


def test_findings_that_operations_lists_are_found() -> None:
    """Each finding named in the table of `check` is one that a check gives."""
    table = text_of(OPERATIONS).split("| finding | what |")[1].split("\n\n")[0]
    named = {
        name.removesuffix(" …")
        for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", cell)
    }
    code = " ".join(text_of(path) for path in (PACKAGE / "commands" / "check").rglob("*.py"))
    assert len(named) > 10
    assert [name for name in sorted(named - {"list pods"}) if f'"{name}' not in code] == []
