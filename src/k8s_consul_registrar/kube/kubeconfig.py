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
from k8s_consul_registrar.kube.credentials import read_bytes


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


@dataclass(frozen=True, slots=True)
class Chosen:
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
    """Parse one file, None where it is not there.

    No error text quotes the file: what is wrong may stand next to a secret, or be one.
    """
    setting = f"kubeconfig {path}"
    try:
        path.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        pass  # reading it says why
    text = read_bytes(path, setting)
    try:
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" (line {mark.line + 1})" if mark else ""
        raise AccessError(f"{setting}: not YAML{line}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise AccessError(f"{setting}: not YAML") from None
    try:
        return msgspec.convert(_without_nulls(content if content is not None else {}), _File)
    except (msgspec.ValidationError, RecursionError) as error:
        raise AccessError(f"{setting}: {error}") from None


def _without_nulls(value: Any) -> Any:
    """Drop what is null: to kubectl a null field is an absent one."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value if part is not None]
    return value
