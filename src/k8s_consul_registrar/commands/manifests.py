"""Manifests in files of YAML or JSON: their objects, or why they cannot be read. Whatever is in a file, it ends."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import yaml

MOST_VALUES = 1_000_000  # of one document: aliases of YAML can make a small file huge
DEEPEST = 200  # values inside one another

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One object of a file, and the line to show for it, from 1."""

    file: str
    line: int
    values: Values


@dataclass(frozen=True, slots=True)
class BadManifest:
    """A place in a file from which on it cannot be read."""

    line: int
    detail: str


class _Loader(yaml.CSafeLoader):
    """A loader with a bound for values inside one another: libyaml's ends the process at the end of its stack."""

    _depth = 0

    def descend_resolver(self, current_node: yaml.Node | None, _: object) -> None:
        """Go into a value; called for each one."""
        self._depth += 1
        if self._depth > DEEPEST:
            mark = None if current_node is None else current_node.start_mark
            raise yaml.MarkedYAMLError(problem=f"values inside more than {DEEPEST} others", problem_mark=mark)

    def ascend_resolver(self) -> None:
        """Leave a value."""
        self._depth -= 1


def read_manifests(file: str, text: bytes, prefix: str) -> Iterator[Manifest | BadManifest]:
    """Yield the objects of a file of YAML or JSON documents; a list yields its items."""
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        yield BadManifest(1, _yaml_problem(error, text))
        return
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is None or not _is_bounded(node):
                yield BadManifest(_line(node), f"a document of more than {MOST_VALUES:,} values")
                return
            for part in _parts(node):
                values = loader.construct_document(part)
                if isinstance(values, dict) and isinstance(values.get("kind"), str):
                    yield Manifest(file, _line(_find(part, f"{prefix}scrape") or part), values)
                elif values is not None:
                    yield BadManifest(_line(part), "a document that is no Kubernetes object")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        yield BadManifest(_line_of(error), _yaml_problem(error, text))
    finally:
        loader.dispose()


def _parts(node: yaml.Node) -> Iterable[yaml.Node]:
    """Return the items of a list (`kind: List`, `PodList` and the like), or the object itself."""
    if isinstance(node, yaml.MappingNode):
        fields = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        kind, items = fields.get("kind"), fields.get("items")
        if (
            isinstance(items, yaml.SequenceNode)
            and isinstance(kind, yaml.ScalarNode)
            and kind.value.endswith("List")
        ):
            return cast("list[yaml.Node]", items.value)
    return (node,)


def _children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [one for pair in node.value for one in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _is_bounded(node: yaml.Node) -> bool:
    """Return True if the document with all its aliases written out has at most `MOST_VALUES` values."""
    waiting, seen = [node], 0
    while waiting:
        seen += 1
        if seen > MOST_VALUES:
            return False
        waiting += _children(waiting.pop())
    return True


def _find(node: yaml.Node, key: str) -> yaml.Node | None:
    """Return the first key of this name, at any depth."""
    waiting = deque([node])
    while waiting:
        one = waiting.popleft()
        if isinstance(one, yaml.MappingNode):
            for name, _ in one.value:
                if isinstance(name, yaml.ScalarNode) and name.value == key:
                    return name
        waiting += _children(one)
    return None


def _line(node: yaml.Node | None) -> int:
    return 1 if node is None else node.start_mark.line + 1


def _line_of(error: Exception) -> int:
    mark = getattr(error, "problem_mark", None)
    return 1 if mark is None else mark.line + 1


def _yaml_problem(error: Exception, text: bytes) -> str:
    problem = getattr(error, "problem", None) or str(error) or type(error).__name__
    hint = "; render the template first, for example with helm template" if b"{{" in text else ""
    return f"not YAML: {problem}{hint}".replace("\n", " ")
