"""Targets saved for the next start, as a JSON document of one target a line, and the rules for using them. Pure."""

import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from k8s_consul_registrar.admin.view import TargetRow, TargetState
from k8s_consul_registrar.model import Kind, ObjectKey, Service

FORMAT = 1
# Seconds after which saved targets are too old to be used.
MAX_AGE = 900.0
# Seconds that a file may be ahead of this machine's clock, which is corrected now and then.
MAX_AHEAD = 5.0
# The longest file that is written or read; 100,000 targets are a third of it.
SIZE_LIMIT = 128 << 20  # bytes
# The longest line. Consul takes 64 pairs of meta of at most 640 bytes.
LINE_LIMIT = 1 << 20  # bytes
# Bytes that are unpacked at once.
_PIECE = 64 * 1024
_HEAD_END = b',"targets":['
_END = b"]}"

_KINDS: Mapping[Kind, Literal["pod", "node", "endpoint"]] = {
    Kind.POD: "pod",
    Kind.NODE: "node",
    Kind.ENDPOINT: "endpoint",
}

_encoder = msgspec.json.Encoder()


class UnusableState(Exception):
    """Saved targets that are not to be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The registrar that targets belong to: its names, and the digest of its selection."""

    cluster: str
    instance: str
    selection: str


class _Head(msgspec.Struct, kw_only=True):
    """Everything in the file but the targets.

    `written_at` is when the targets were last known to be up to date, in seconds of the epoch. `is_settled`
    is True if Consul held all of them by then and the brake held nothing, or if that was so before.
    """

    format: int
    written_at: float
    cluster_uid: str
    cluster: str
    instance: str
    selection: str
    is_settled: bool


class _Record(msgspec.Struct, frozen=True, gc=False):
    """One target."""

    kind: Literal["pod", "node", "endpoint"]
    namespace: str
    object: str
    id: Annotated[str, msgspec.Meta(min_length=1)]
    name: str
    address: str
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    meta: dict[str, str]
    tags: list[str]


_head_decoder = msgspec.json.Decoder(_Head)
_decoder = msgspec.json.Decoder(_Record)


@dataclass(frozen=True, slots=True)
class SavedState:
    """Targets that an earlier process saved, kept packed.

    `since` is when they were last known to be up to date, in seconds of the epoch.
    """

    since: float
    cluster_uid: str
    is_settled: bool
    count: int
    packed: bytes

    @property
    def generation(self) -> int:
        """Always the same: these targets never change."""
        return 0

    @property
    def position(self) -> int:
        """Always the same."""
        return 0

    def changed_since(self, position: int) -> None:
        """Return None: these targets are read as a whole."""

    def row(self, service_id: str) -> None:
        """Return None: these targets are read as a whole."""

    def targets(self) -> Iterator[TargetRow]:
        """Yield every target."""
        unpacking, rest, begun = zlib.decompressobj(), self.packed, b""
        while rest or not unpacking.eof:
            *lines, begun = (begun + unpacking.decompress(rest, _PIECE)).split(b"\n")
            rest = unpacking.unconsumed_tail
            for line in lines:
                yield _row(_decoder.decode(line))

    def obstacle(self, now: float) -> str:
        """Return why these targets are too old, or not to be believed, at a time; empty if they are not."""
        if self.since > now + MAX_AHEAD:
            return "it is from the future"
        if now - self.since > MAX_AGE:
            return f"it is older than {MAX_AGE / 60:g} minutes"
        return ""


def encode_head(origin: Origin, *, cluster_uid: str, written_at: float, is_settled: bool) -> bytes:
    """Return the beginning of the file, up to the first target; `written_at` is in seconds of the epoch."""
    head = _Head(
        format=FORMAT,
        written_at=written_at,
        cluster_uid=cluster_uid,
        cluster=origin.cluster,
        instance=origin.instance,
        selection=origin.selection,
        is_settled=is_settled,
    )
    return _encoder.encode(head).removesuffix(b"}") + _HEAD_END


def encode_target(target: TargetRow, *, is_first: bool) -> bytes:
    """Return a target with what separates it from the one before; raises ValueError."""
    key, service = target.key, target.service
    record = _Record(
        _KINDS[key.kind],
        key.namespace,
        key.name,
        service.id,
        service.name,
        service.address,
        service.port,
        dict(service.meta),
        list(service.tags),
    )
    return (b"\n" if is_first else b",\n") + _encoder.encode(record)


def encode_end() -> bytes:
    """Return the end of the file."""
    return b"\n" + _END + b"\n"


def decode_state(content: bytes, origin: Origin, now: float) -> SavedState:
    """Read a file, every target of it; `now` is in seconds of the epoch. Raises `UnusableState`."""
    lines = io.BytesIO(content)
    head = _head(lines)
    if head.format != FORMAT:
        raise UnusableState(f"its format is {head.format}, not {FORMAT}")
    for what in ("cluster", "instance", "selection"):
        if getattr(head, what) != getattr(origin, what):
            raise UnusableState(f"it was written under another {what}")
    packing = zlib.compressobj(1)
    packed, count = bytearray(), 0
    while (line := lines.readline(LINE_LIMIT).rstrip(b"\n")) != _END:
        try:
            record = _decoder.decode(line.removesuffix(b","))
        except (msgspec.MsgspecError, RecursionError, ValueError):
            raise UnusableState("it holds something that is no target, or is cut off") from None
        packed += packing.compress(_encoder.encode(record) + b"\n")
        count += 1
    packed += packing.flush()
    state = SavedState(head.written_at, head.cluster_uid, head.is_settled, count, bytes(packed))
    if obstacle := state.obstacle(now):
        raise UnusableState(obstacle)
    return state


def _head(lines: io.BytesIO) -> _Head:
    line = lines.readline(LINE_LIMIT).rstrip(b"\n")
    try:
        return _head_decoder.decode(line.removesuffix(_HEAD_END) + b"}")
    except (msgspec.MsgspecError, RecursionError, ValueError):
        raise UnusableState("it does not hold saved targets") from None


def _row(record: _Record) -> TargetRow:
    service = Service(
        id=record.id,
        name=record.name,
        address=record.address,
        port=record.port,
        meta=tuple(sorted(record.meta.items())),
        tags=tuple(record.tags),
    )
    # What became of a target since is not known, so it stays as it was.
    return TargetRow(service, ObjectKey(Kind(record.kind), record.namespace, record.object), TargetState.KEPT)
