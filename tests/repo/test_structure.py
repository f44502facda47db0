"""The size of the code: modules of the core, lines of each module, and lines in all."""

from collections.abc import Iterator
from pathlib import Path

from support.files import PACKAGE

CORE = ("kube", "registrar", "targets")
MOST_CORE_MODULES = 45  # 69 before the core was rebuilt on the controller pattern
MOST_LINES = 400  # of one module
# Modules outside the sandbox, and their lines: both go down as what only passes on is folded.
MOST_MODULES = 152
MOST_LINES_IN_ALL = 26_450


def modules(*folders: str) -> Iterator[Path]:
    """Yield the modules of some folders of the package, or all outside the sandbox."""
    for path in sorted(PACKAGE.rglob("*.py")):
        top = path.relative_to(PACKAGE).parts[0]
        if top in folders if folders else top != "sandbox":
            yield path


def lines_of(module: Path) -> int:
    """Return the number of lines of a module."""
    return len(module.read_text(encoding="utf-8").splitlines())


def test_core_modules_are_few() -> None:
    """The three packages of the core have at most 45 modules together."""
    core = [path for path in modules(*CORE) if path.name != "__init__.py"]
    assert len(core) <= MOST_CORE_MODULES, sorted(str(path.relative_to(PACKAGE)) for path in core)


def test_module_of_any_package_is_short() -> None:
    """No module has more than 400 lines; past that it hides a second concept."""
    long = {str(path.relative_to(PACKAGE)): lines_of(path) for path in modules()}
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES} == {}


def test_modules_outside_the_sandbox_are_few() -> None:
    """The number of modules does not grow."""
    assert len([path for path in modules() if path.name != "__init__.py"]) <= MOST_MODULES


def test_code_outside_the_sandbox_does_not_grow() -> None:
    """The whole does not grow further; where it can be said shorter, this bound goes down."""
    assert sum(map(lines_of, modules())) <= MOST_LINES_IN_ALL
