"""How targets are named, tagged, sharded and described in Consul."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from k8s_consul_registrar.consul.codec import MetaKeys, parse_meta_keys
from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.settings.reader import Reader
from k8s_consul_registrar.targets.resolve import LONGEST_META_VALUE, LabelMeta, parse_labels
from k8s_consul_registrar.targets.service_names import (
    NODE_NAME,
    POD_NAME,
    Template,
    is_fit_for_name,
    kind_of_id,
    parse_name,
    parse_shard_paths,
    parse_tag,
)

RANDOM = "random"
HASH = "hash"

_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True, slots=True)
class NamingSettings:
    """The templates of names and tags, and what else of a service is the operator's to choose."""

    id_prefix: str
    pod_name: Template
    node_name: Template
    tags: tuple[Template, ...]
    labels: tuple[LabelMeta, ...]
    meta_keys: MetaKeys
    shard_paths: tuple[str, ...]
    shard_strategy: str

    @property
    def longest_shard(self) -> int:
        """How many bytes the longest shard path has."""
        return max((len(path.encode()) for path in self.shard_paths), default=0)


def read_naming(reader: Reader) -> NamingSettings:
    """Read every template once, together with what fills it in."""
    settings = NamingSettings(
        id_prefix=_id_prefix(reader),
        pod_name=_name(reader, "POD_SERVICE_NAME", Kind.POD),
        node_name=_name(reader, "NODE_SERVICE_NAME", Kind.NODE),
        tags=_tags(reader),
        labels=_parsed(reader, "POD_LABELS_AS_META", parse_labels, ()),
        meta_keys=_parsed(reader, "META_KEYS", parse_meta_keys, MetaKeys()),
        shard_paths=_shard_paths(reader),
        shard_strategy=reader.choice("SHARD_STRATEGY", (RANDOM, HASH)),
    )
    _check_shards_in_names(reader, settings)
    return settings


def _parsed(
    reader: Reader, name: str, parse: Callable[[tuple[str, ...]], _Parsed], otherwise: _Parsed
) -> _Parsed:
    try:
        return parse(reader.entries(name))
    except ValueError as error:
        reader.problem(name, str(error))
        return otherwise


def _name(reader: Reader, name: str, kind: Kind) -> Template:
    try:
        return parse_name(reader.text(name), kind)
    except ValueError as error:
        reader.problem(name, str(error))
        return POD_NAME if kind is Kind.POD else NODE_NAME


def _tags(reader: Reader) -> tuple[Template, ...]:
    tags: list[Template] = []
    for entry in reader.entries("SERVICE_TAGS"):
        try:
            tags.append(parse_tag(entry))
        except ValueError as error:
            reader.problem("SERVICE_TAGS", str(error))
    return tuple(tags)


def _id_prefix(reader: Reader) -> str:
    prefix = reader.name("SERVICE_ID_PREFIX")
    if kind_of_id(prefix) is not None:
        reader.problem("SERVICE_ID_PREFIX", f"{prefix!r} begins as an ID without a prefix does")
    return prefix


def _shard_paths(reader: Reader) -> tuple[str, ...]:
    paths = parse_shard_paths(reader.text("SHARD_PATHS"))
    for path in paths:
        if not path.isprintable() or len(path.encode()) > LONGEST_META_VALUE:
            reader.problem(
                "SHARD_PATHS", f"{path[:40]!a} is over {LONGEST_META_VALUE} bytes or not printable"
            )
    return tuple(path for path in paths if path.isprintable())


def _check_shards_in_names(reader: Reader, settings: NamingSettings) -> None:
    templates = {"POD_SERVICE_NAME": settings.pod_name, "NODE_SERVICE_NAME": settings.node_name}
    for name in (name for name, template in templates.items() if template.has_shard):
        if not settings.shard_paths:
            reader.problem(name, "has {shard_path}, and SHARD_PATHS names none")
        for path in settings.shard_paths:
            if not is_fit_for_name(path):
                reader.problem(
                    name,
                    f"has {{shard_path}}, and {path!r} of SHARD_PATHS has characters other than letters, "
                    "digits, '.', '_', '~', ':' and '-'",
                )
