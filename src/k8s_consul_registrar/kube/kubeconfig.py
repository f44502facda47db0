"""kubeconfig files: read, merged as kubectl merges them, and one context chosen.

Rules: Kubernetes, "Organizing Cluster Access Using kubeconfig Files".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import yaml

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.rotating import read_file

# More than any kubeconfig of SIZE_LIMIT has without aliases.
MOST_NODES = 4_000_000


class _Extension(msgspec.Struct):
    name: str
    extension: Any = None


class Cluster(msgspec.Struct, rename="kebab"):
    """A `clusters` entry."""

    server: str = ""
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""
    extensions: list[_Extension] = []


class _Variable(msgspec.Struct):
    name: str
    value: str = ""


class Exec(msgspec.Struct, rename="camel"):
    """The `exec` part of a user."""

    command: str = ""
    api_version: str = ""
    args: list[str] = []
    env: list[_Variable] = []
    install_hint: str = ""
    interactive_mode: str = ""
    provide_cluster_info: bool = False


class User(msgspec.Struct, rename="kebab"):
    """A `users` entry."""

    token: str = ""
    token_file: str = msgspec.field(name="tokenFile", default="")
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    username: str = ""
    password: str = ""
    exec: Exec | None = None
    auth_provider: Any = None
    impersonate: str = msgspec.field(name="as", default="")


class Context(msgspec.Struct):
    """A `contexts` entry; without a user we are anonymous."""

    cluster: str = ""
    user: str = ""


class _NamedCluster(msgspec.Struct):
    name: str
    cluster: Cluster = msgspec.field(default_factory=Cluster)


class _NamedUser(msgspec.Struct):
    name: str
    user: User = msgspec.field(default_factory=User)


class _NamedContext(msgspec.Struct):
    name: str
    context: Context = msgspec.field(default_factory=Context)


class _File(msgspec.Struct, rename="kebab"):
    current_context: str = ""
    clusters: list[_NamedCluster] = []
    users: list[_NamedUser] = []
    contexts: list[_NamedContext] = []


EntryT = TypeVar("EntryT")


@dataclass(frozen=True, slots=True)
class Entry(Generic[EntryT]):
    """A named entry and the file it stands in: relative paths in it start there."""

    name: str
    value: EntryT = field(repr=False)
    file: Path

    def setting(self, part: str) -> str:
        """Name a field of this entry for an error text."""
        kind = type(self.value).__name__.lower()
        return f"kubeconfig {self.file}: {kind} {self.name!r}: {part}"

    def path(self, text: str) -> Path:
        """Return a path written in this entry, resolved against the folder of its file."""
        return self.file.absolute().parent / text


class Chosen(msgspec.Struct, frozen=True):
    """The current context: its cluster, and its user (None is anonymous)."""

    context: str
    cluster: Entry[Cluster]
    user: Entry[User] | None


def choose_context(paths: Sequence[Path]) -> Chosen:
    """Read the files and return what the current context names.

    Of entries with the same name the first file's counts, whole; so does the first current-context. Files
    that are not there are skipped unless none is. Raises AccessError.
    """
    files = [(path, content) for path in paths if (content := _read(path)) is not None]
    if not files:
        raise AccessError(f"kubeconfig: there is no {' and no '.join(str(path) for path in paths)}")
    current, current_file = next(
        ((content.current_context, path) for path, content in files if content.current_context), ("", None)
    )
    if not current:
        raise AccessError(
            f"kubeconfig {':'.join(str(path) for path, _ in files)}: names no current-context; "
            "set one with kubectl config use-context"
        )
    clusters: dict[str, Entry[Cluster]] = {}
    users: dict[str, Entry[User]] = {}
    contexts: dict[str, Entry[Context]] = {}
    for path, content in files:
        _merge(clusters, [Entry(c.name, c.cluster, path) for c in content.clusters])
        _merge(users, [Entry(u.name, u.user, path) for u in content.users])
        _merge(contexts, [Entry(c.name, c.context, path) for c in content.contexts])
    context = contexts.get(current)
    if context is None:
        raise AccessError(f"kubeconfig {current_file}: current-context {current!r} is not among the contexts")
    cluster = clusters.get(context.value.cluster)
    if cluster is None:
        raise AccessError(f"{context.setting('cluster')} {context.value.cluster!r} is not among the clusters")
    if not context.value.user:
        return Chosen(current, cluster, None)
    user = users.get(context.value.user)
    if user is None:
        raise AccessError(f"{context.setting('user')} {context.value.user!r} is not among the users")
    return Chosen(current, cluster, user)


def _merge(known: dict[str, Entry[EntryT]], entries: Sequence[Entry[EntryT]]) -> None:
    """Add the entries of one file under names not known yet."""
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            raise AccessError(entry.setting("stands more than once in the file"))
        known.setdefault(entry.name, entry)


def _read(path: Path) -> _File | None:
    """Parse one file, None if it is not there.

    No error text quotes the file: what is wrong may stand next to a secret, or be one.
    """
    setting = f"kubeconfig {path}"
    try:
        path.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        pass  # reading it says why
    text = read_file(path, setting)
    try:
        content = yaml.load(text, _Loader)  # noqa: S506 - it derives from SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" (line {mark.line + 1})" if mark else ""
        raise AccessError(f"{setting}: not YAML{line}") from None
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError):
        # `!!bool x`, `!!timestamp x` and their like make SafeLoader's constructors raise any of these.
        raise AccessError(f"{setting}: not YAML") from None
    try:
        return msgspec.convert(_Pruning().without_nulls(content if content is not None else {}), _File)
    except msgspec.ValidationError as error:
        raise AccessError(f"{setting}: {error}") from None
    except RecursionError:
        raise AccessError(f"{setting}: nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """YAML as kubectl reads it: a date is text, and so is every scalar in the place of a name."""

    def get_single_node(self) -> yaml.Node | None:
        """Return the document with its names as text: a context named 1.10 is not the number 1.1."""
        root = super().get_single_node()
        for key, value in _fields(root):
            if key == "current-context":
                _make_text(value)
            elif key in ("clusters", "users", "contexts") and isinstance(value, yaml.SequenceNode):
                for entry in value.value:
                    _make_names_text(entry)
        return root


# kubectl's decoder (goyaml.v2) gives timestamps as the text they are.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _fields(node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    """Return the fields of a mapping whose keys are text, none of any other node."""
    if not isinstance(node, yaml.MappingNode):
        return []
    return [(key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]


def _make_names_text(entry: yaml.Node) -> None:
    for key, value in _fields(entry):
        if key == "name":
            _make_text(value)
        elif key == "context":
            for part, named in _fields(value):
                if part in ("cluster", "user"):
                    _make_text(named)


def _make_text(node: yaml.Node) -> None:
    """Take a scalar as text; null stays null, which to kubectl is an absent field."""
    if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null":
        node.tag = "tag:yaml.org,2002:str"


class _Pruning:
    """Removal of what is null, each shared part (a YAML alias) once."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[Any, Any, int]] = {}

    def without_nulls(self, value: Any) -> Any:
        """Return the value without null fields and entries; raises RecursionError if it is too large.

        A few lines of aliases of aliases can stand for billions of nodes.
        """
        pruned, size = self._pruned(value)
        if size > MOST_NODES:
            raise RecursionError
        return pruned

    def _pruned(self, value: Any) -> tuple[Any, int]:
        if not isinstance(value, (dict, list)):
            return value, 1
        known = self._done.get(id(value))
        if known is not None:
            return known[1], known[2]
        if isinstance(value, dict):
            parts = {key: self._pruned(part) for key, part in value.items() if part is not None}
            pruned: Any = {key: part for key, (part, _) in parts.items()}
            size = 1 + sum(size for _, size in parts.values())
        else:
            entries = [self._pruned(part) for part in value if part is not None]
            pruned = [part for part, _ in entries]
            size = 1 + sum(size for _, size in entries)
        self._done[id(value)] = (value, pruned, size)
        return pruned, size
