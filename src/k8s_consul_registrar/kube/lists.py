"""Lists out of the API server's JSON, in pages, and how far one has got."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, NamedTuple

import msgspec

from k8s_consul_registrar.errors import ClusterRefused
from k8s_consul_registrar.kube.objects import (
    MAKERS,
    VERSION_LENGTH,
    Item,
    ItemT,
    decode_object,
)
from k8s_consul_registrar.kube.responses import ApiAction
from k8s_consul_registrar.kube.service_objects import Wire, WireService, WireSlice, problem_of
from k8s_consul_registrar.kube.wire import WireNamespace, WireNode, WirePod
from k8s_consul_registrar.model import Kind, ObjectKey

LIST_KINDS = {
    Kind.POD: "PodList",
    Kind.NODE: "NodeList",
    Kind.SERVICE: "ServiceList",
    Kind.ENDPOINT: "EndpointSliceList",
    Kind.NAMESPACE: "NamespaceList",
}
# Pages in a row that may begin with no new object, and pages that a list may have: 5,000,000 objects.
MOST_IDLE_PAGES, MOST_PAGES = 20, 20_000


class Page(NamedTuple):
    """A part of a list; `continue_token` is the one of the whole page that the server sent."""

    items: tuple[Item, ...]
    resource_version: str
    continue_token: str


class _ListMetadata(Wire):
    resource_version: Annotated[str, msgspec.Meta(min_length=1, max_length=VERSION_LENGTH)]
    continue_token: str = msgspec.field(name="continue", default="")


class _List(Wire, Generic[ItemT], gc=True):
    """A list; `items` is required, so that a body without them is never taken for an empty cluster."""

    kind: str
    metadata: _ListMetadata
    items: list[ItemT] | None


_LISTS: Mapping[Kind, msgspec.json.Decoder[_List[Any]]] = {
    Kind.POD: msgspec.json.Decoder(_List[WirePod]),
    Kind.NODE: msgspec.json.Decoder(_List[WireNode]),
    Kind.SERVICE: msgspec.json.Decoder(_List[WireService]),
    Kind.ENDPOINT: msgspec.json.Decoder(_List[WireSlice]),
    Kind.NAMESPACE: msgspec.json.Decoder(_List[WireNamespace]),
}
_RAW_LIST = msgspec.json.Decoder(_List[msgspec.Raw])


class RawPage(NamedTuple):
    """One page whose items are not ours yet: as they were sent, or as bytes where one of them cannot be read."""

    kind: Kind
    items: Sequence[Wire | msgspec.Raw]
    resource_version: str
    continue_token: str

    def decode(self, part: slice = slice(None)) -> Page:
        """Convert a part of the items; one that cannot be read becomes an `Undecodable` in its place."""
        items = tuple([_item(item, self.kind) for item in self.items[part]])
        return Page(items, self.resource_version, self.continue_token)


def split_page(body: bytes, kind: Kind) -> RawPage:
    """Read one answer to a list request: its items, and where the list goes on.

    Items are read in one go, which costs a third less than one by one; only a page with an item that cannot be
    read is taken apart. Raises ClusterRefused where the body is not a list of this kind as a whole.
    """
    expected = LIST_KINDS[kind]
    try:
        answer = _LISTS[kind].decode(body)
    except (ValueError, RecursionError):
        answer = _split_list(body, expected)
    if answer.kind != expected:
        raise ClusterRefused(f"the answer is not a {expected} but a {answer.kind[:60]!r}", 200)
    return RawPage(kind, answer.items or [], answer.metadata.resource_version, answer.metadata.continue_token)


def _split_list(body: bytes, expected: str) -> _List[msgspec.Raw]:
    try:
        return _RAW_LIST.decode(body)
    except (ValueError, RecursionError) as error:
        raise ClusterRefused(f"the answer is not a {expected}: {problem_of(error)}", 200) from None


def _item(item: Wire | msgspec.Raw, kind: Kind) -> Item:
    return decode_object(item, kind) if isinstance(item, msgspec.Raw) else MAKERS[kind](item)


def read_page(body: bytes, kind: Kind, action: ApiAction) -> RawPage:
    """Return what `split_page` does; its error names the action."""
    try:
        return split_page(body, kind)
    except ClusterRefused as error:
        raise ClusterRefused(f"cannot {action}: {error}", error.status) from None


class Paging:
    """The progress of one list in pages, which a server could go on with without end."""

    def __init__(self, action: ApiAction) -> None:
        self._action = action
        self._pages = self._idle = 0
        self._firsts: set[ObjectKey] = set()

    def add(self, beginning: Sequence[Item]) -> None:
        """Note a page by its first object, if it has any; raises ClusterRefused for a list that gets nowhere."""
        first = beginning[0].key if beginning else None
        self._pages += 1
        self._idle = self._idle + 1 if first is None or first in self._firsts else 0
        if first is not None:
            self._firsts.add(first)
        if self._idle > MOST_IDLE_PAGES or self._pages > MOST_PAGES:
            raise ClusterRefused(f"cannot {self._action}: the API server repeats pages without end", 200)
