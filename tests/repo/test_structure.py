"""The structure of the code: its size, and what only one module may do."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.files import PACKAGE

CORE = ("kube", "registrar", "targets")
MOST_CORE_MODULES = 45  # 69 before the core was rebuilt on the controller pattern
MOST_LINES = 400  # of one module
# Modules outside the sandbox, and their lines: both rise with features only.
MOST_MODULES = 147
MOST_LINES_IN_ALL = 35_875


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
    """The number of modules rises only with what the program does."""
    assert len([path for path in modules() if path.name != "__init__.py"]) <= MOST_MODULES


def test_code_outside_the_sandbox_has_a_bound() -> None:
    """The whole rises only with what the program does; where it can be said shorter, it falls."""
    assert sum(map(lines_of, modules())) <= MOST_LINES_IN_ALL


# What makes, loads or judges certificates; names of the module ssl and of its contexts and errors.
OF_TLS = {
    "create_default_context",
    "load_cert_chain",
    "load_default_certs",
    "load_verify_locations",
    "verify_code",
    "verify_flags",
    "verify_message",
    "verify_mode",
    "check_hostname",
    "SSLCertVerificationError",
    "SSLError",
}
# Where bytes are encrypted and decrypted: an error there ends one connection.
STEPS = ("proxy/secure_connection.py", "proxy/tls_stream.py", "proxy/upstream.py")


def uses_of_tls(tree: ast.AST) -> Iterator[str]:
    """Yield the names of ssl that a module uses, except for the type of a context."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (
            node.attr in OF_TLS or node.attr.startswith(("VERIFY_", "CERT_"))
        ):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("SSLContext"):
            yield "SSLContext()"


def test_tls_is_made_and_explained_in_one_module() -> None:
    """No context, key pair, verification flag or explanation of a TLS error outside of tls.py."""
    used = {
        str(path.relative_to(PACKAGE)): set(uses_of_tls(ast.parse(path.read_text(encoding="utf-8"))))
        for path in modules()
    }
    assert {"SSLContext()", "VERIFY_X509_STRICT", "SSLError"} <= used.pop("tls.py")
    assert {used.pop(name) == {"SSLError"} for name in STEPS} == {True}
    assert {name: names for name, names in used.items() if names} == {}


def public_types(module: Path) -> Iterator[str]:
    """Yield the public classes of a module, and its aliases of types, which are written as classes are."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id="TypeVar"))):
                continue
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if name[0].isupper() and not name.isupper():
                    yield name


def test_name_of_a_class_has_one_meaning() -> None:
    """Outside the sandbox no two modules define a public class, or an alias of a type, of one name."""
    defined: dict[str, list[str]] = defaultdict(list)
    for module in modules():
        for name in public_types(module):
            defined[name].append(str(module.relative_to(PACKAGE)))
    assert {name: homes for name, homes in defined.items() if len(homes) > 1} == {}


@pytest.mark.parametrize("words", [{"/metrics/probes"}, {"metrics_path", "namespace"}])
def test_list_with_telling_words_stands_in_one_module(words: set[str]) -> None:
    """Permitted kubelet paths, and the registrar's own meta keys, are listed once each."""

    def lists_them(node: ast.AST) -> bool:
        items = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else []
        return words <= {one.value for one in items if isinstance(one, ast.Constant)}

    homes = [
        str(module.relative_to(PACKAGE))
        for module in modules()
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if lists_them(node)
    ]
    assert len(homes) == 1, homes
