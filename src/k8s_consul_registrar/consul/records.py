"""Cuts the records out of a list that is too large to be kept whole, as it arrives."""

import re
from collections.abc import Iterator

import msgspec

from k8s_consul_registrar.errors import ConsulRefused

# Where one record may end and the next begin. It may also be inside a record, in a string even; but no
# beginning of a JSON object is itself a JSON object, so trying whether a piece is whole settles it.
_BOUNDARY = re.compile(rb"\}\s*,\s*\{")
# No structural quote is escaped and every quote inside a string is, so these are found nowhere else.
NODE_SERVICES = re.compile(rb'"Services"\s*:\s*(?:(\[)|null)')
ARRAY = re.compile(rb"^\s*(?:(\[)|null)")
# What comes before the first record is a node at most.
LONGEST_HEAD = 1024 * 1024

_raw = msgspec.json.Decoder(msgspec.Raw)


class Records:
    """The objects of one JSON array inside a body, which comes in pieces of any size.

    `opening` finds the array, in a group, or null in its place; `closing` is what follows the array. Each
    record is yielded as it was sent. Raises `ConsulRefused` when the body is something else or ends early.
    """

    def __init__(self, opening: re.Pattern[bytes], closing: bytes = b"") -> None:
        self._opening = opening
        self._closing = closing
        self._rest = b""
        self._searched = 0
        self._is_open = False
        self._is_null = False
        self.head = b""  # what stands before the array, once a record was yielded or the end was reached

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the records that are complete with this piece."""
        self._rest += chunk
        if self._is_null or not (self._is_open or self._open()):
            return
        start = 0
        for boundary in _BOUNDARY.finditer(self._rest, self._searched):
            end = boundary.start() + 1
            if _is_whole(record := self._rest[start:end]):
                yield record
                start = boundary.end() - 1
        self._rest = self._rest[start:]
        # A boundary may itself be cut: it is looked for again from the last brace that may begin one.
        self._searched = max(self._rest.rfind(b"}"), 0)

    def finish(self) -> Iterator[bytes]:
        """Yield the last record, once the body has ended."""
        if not (self._is_open or self._is_null):
            raise ConsulRefused("the list is not what Consul sends")
        rest = self._rest.strip()
        if self._closing:
            if not rest.endswith(self._closing):
                raise ConsulRefused("the list ends too soon")
            rest = rest.removesuffix(self._closing).rstrip()
        if self._is_null:
            if rest:
                raise ConsulRefused("the list is not what Consul sends")
            return
        record = rest.removesuffix(b"]").strip()
        if not rest.endswith(b"]") or (record and not _is_whole(record)):
            raise ConsulRefused("the list ends too soon")
        if record:
            yield record

    def _open(self) -> bool:
        found = self._opening.search(self._rest)
        if found is None:
            if len(self._rest) > LONGEST_HEAD:
                raise ConsulRefused("the list is not what Consul sends")
            return False
        self.head = self._rest[: found.start()]
        self._rest = self._rest[found.end() :].lstrip()
        self._is_open, self._is_null = bool(found[1]), not found[1]
        return self._is_open


def _is_whole(text: bytes) -> bool:
    try:
        _raw.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return text.lstrip().startswith(b"{")
