"""The name and the tags of a service, as the operator's templates have them."""

import re
from collections.abc import Sequence

from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.targets.reasons import Reason, Refused
from k8s_consul_registrar.targets.templates import (
    FIELDS,
    SHARD_PLACEHOLDER,
    EmptyField,
    Subject,
    Template,
    parse_template,
    with_shard,
)
from k8s_consul_registrar.targets.text import quoted

# Consul sets no limit of its own to a name (over 63 bytes its DNS does not find it, which its agent only
# warns of: agent/agent.go, validateService). The default name reaches 323: 7 characters, a namespace of 63
# and a Pod of 253. 512 is what Consul allows a value of meta.
LONGEST_NAME = 512
LONGEST_TAG = 512
# Prometheus and others ask for `/v1/health/service/<name>` and do not escape it: the unreserved characters
# of a URL (RFC 3986, 2.3), and the colon of an IPv6 address.
_NAME = re.compile(r"[A-Za-z0-9._~:-]*")
# The name under which Consul's servers are found.
RESERVED_NAMES = frozenset({"consul"})

DEFAULT_POD_NAME = "pod--{namespace}--{pod}"
DEFAULT_NODE_NAME = "node--{node_ip}"


def parse_name(text: str, kind: Kind) -> Template:
    """Read the template of a service name; raises ValueError, fit for an operator.

    It begins with text of its own or with the cluster: a name made only of what the objects are called
    would let whoever may create a Pod choose among all service names.
    """
    template = parse_template(text, FIELDS[kind])
    if not template.parts or not (isinstance(first := template.parts[0], str) or first.name == "cluster"):
        raise ValueError(f"{text!r} must begin with text or {{cluster}}")
    if not is_fit_for_name(template.literal):
        raise ValueError(f"{text!r} has characters other than letters, digits, '.', '_', '~', ':' and '-'")
    if len(template.literal) > LONGEST_NAME:
        raise ValueError(f"is over {LONGEST_NAME} characters")
    return template


def parse_tag(text: str) -> Template:
    """Read the template of a tag; raises ValueError, fit for an operator."""
    template = parse_template(text)
    if not template.literal.isprintable() or len(template.literal.encode()) > LONGEST_TAG:
        raise ValueError(f"{text[:40]!r} is over {LONGEST_TAG} bytes or not printable")
    return template


def is_fit_for_name(text: str) -> bool:
    """Whether a text may be part of a service name."""
    return _NAME.fullmatch(text) is not None


def service_name(template: Template, subject: Subject, longest_shard: int) -> str:
    """Return an object's service name, the shard still to be filled in (`sharded_name`).

    `longest_shard` is how many bytes the longest shard path has. Raises `Refused` for a name that is
    empty in one of its fields, too long, or of characters that Consul's readers do not escape.
    """
    try:
        name = template.render(subject)
    except EmptyField as empty:
        raise Refused(Reason.EMPTY_NAME, f"the service name needs a value where {empty}") from None
    fixed = with_shard(name, "")
    if not is_fit_for_name(fixed) or name.lower() in RESERVED_NAMES:
        raise Refused(
            Reason.INVALID_NAME, f"the service name {quoted(name)} is not one that can be looked up"
        )
    if _size(name, longest_shard) > LONGEST_NAME:
        raise Refused(Reason.NAME_TOO_LONG, f"the service name {quoted(name)} is over {LONGEST_NAME} bytes")
    return name


def service_tags(templates: Sequence[Template], subject: Subject, longest_shard: int) -> tuple[str, ...]:
    """Return an object's tags, sorted, without repeats and without those that have nothing to say.

    A tag one of whose fields is empty (a namespace, for a Node) says nothing. Raises `Refused` for one
    that is too long or not printable.
    """
    if not templates:
        return ()
    tags: set[str] = set()
    for template in templates:
        try:
            tag = template.render(subject)
        except EmptyField:
            continue
        if not tag.isprintable() or _size(tag, longest_shard) > LONGEST_TAG:
            raise Refused(
                Reason.INVALID_TAG, f"the tag {quoted(tag)} is over {LONGEST_TAG} bytes or not printable"
            )
        tags.add(tag)
    return tuple(sorted(tags - {""}))


def sharded_name(name: str, shard: str) -> str:
    """Return the name with its shard."""
    return with_shard(name, shard)


def sharded_tags(tags: Sequence[str], shard: str) -> tuple[str, ...]:
    """Return the tags with their shard, sorted and without repeats; without a shard those about it go."""
    if not tags or not any(SHARD_PLACEHOLDER in tag for tag in tags):
        return tuple(tags)
    kept = (tag for tag in tags if shard or SHARD_PLACEHOLDER not in tag)
    return tuple(sorted({with_shard(tag, shard) for tag in kept}))


def _size(text: str, longest_shard: int) -> int:
    shards = text.count(SHARD_PLACEHOLDER)
    size = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    return size + shards * (longest_shard - len(SHARD_PLACEHOLDER))


POD_NAME = parse_name(DEFAULT_POD_NAME, Kind.POD)
NODE_NAME = parse_name(DEFAULT_NODE_NAME, Kind.NODE)
