"""One registrar followed: its targets fetched by long polls, judged, and kept in a file."""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec
from aiohttp import ClientResponse, ClientSession

from k8s_consul_registrar.admin.file_sd import MODE
from k8s_consul_registrar.admin.http_sd import CLUSTER, CLUSTER_UID, INSTANCE, STALE_SINCE
from k8s_consul_registrar.admin.replacement import Blocking, Replacement, write_problem
from k8s_consul_registrar.admin.view import Owner
from k8s_consul_registrar.backoff import delays
from k8s_consul_registrar.commands.fetch_targets.arguments import REGISTRAR, TOKEN, TargetSource
from k8s_consul_registrar.errors import OperationalError
from k8s_consul_registrar.rotating import Derived, LoadStatus, Rotating
from k8s_consul_registrar.tls import Trust, explain, printable

# The longest answer: that of about 150,000 targets.
SIZE_LIMIT = 128 << 20  # bytes
# Seconds between two requests while everything is well: the file is replaced no more often.
PACE = 1.0
# Seconds between two tries, at first and at most, and while a registrar has only what an earlier process saved.
RETRY_FIRST, RETRY_CAP = 1.0, 30.0
STALE_RETRY = 5.0
# Seconds for a connection, and beyond the wait for the head of an answer and for the whole of it.
CONNECT, HEAD, ANSWER = 5.0, 10.0, 120.0
PIECE = 64 * 1024
MOST_WORDS = 300  # bytes of a refusal that are shown

T = TypeVar("T")


class FetchError(OperationalError):
    """Targets that were not fetched; the text says why and what repairs it, and is the same each time."""


class _Group(msgspec.Struct):
    targets: list[str]
    labels: dict[str, str]


class _OriginRecord(msgspec.Struct):
    cluster: str
    instance: str = ""
    cluster_uid: str = ""


class _ClusterLabels(msgspec.Struct):
    cluster: str = msgspec.field(name="__meta_consul_service_metadata_cluster", default="")


class _GroupOfCluster(msgspec.Struct):
    labels: _ClusterLabels


_groups = msgspec.json.Decoder(list[_Group])
_clusters = msgspec.json.Decoder(list[_GroupOfCluster])
_origin = msgspec.json.Decoder(_OriginRecord)
_DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class TargetFile:
    """The file of one source, and beside it the record of which registrar's targets it holds; its methods block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._origin = path.with_name(f".{path.name}.origin")

    def exists(self) -> bool:
        """Return True if there is a file."""
        return self.path.is_file()

    def replace(self, content: bytes, owner: Owner) -> None:
        """Put the targets of a registrar in the file; raises FetchError if they are another's than before."""
        try:
            _groups.decode(content)
        except _DECODE_ERRORS:
            raise FetchError("its answer holds something that is no target, or is cut off") from None
        before = self._owner()
        if before is not None and (problem := difference(before, owner)):
            raise FetchError(f"{problem}: the file stays as it is. Delete {self.path} if that is right")
        if before != owner:
            _write(self._origin, msgspec.json.encode(_OriginRecord(*owner)))
        if not self.exists() or self.path.read_bytes() != content:
            _write(self.path, content)

    def _owner(self) -> Owner | None:
        """Return whose targets the file holds, None if there is no file or it does not tell."""
        if not self.exists():
            return None
        try:
            found = _origin.decode(self._origin.read_bytes())
            return Owner(found.cluster, found.instance, found.cluster_uid)
        except (OSError, *_DECODE_ERRORS):
            return self._owner_in_labels()

    def _owner_in_labels(self) -> Owner | None:
        try:
            named = {one.labels.cluster for one in _clusters.decode(self.path.read_bytes())}
        except (OSError, *_DECODE_ERRORS):
            return None
        return Owner(min(named - {""})) if named - {""} else None


def difference(before: Owner, now: Owner) -> str:
    """Return why targets are another registrar's than those before; empty if they are not."""
    if before.cluster != now.cluster:
        return f"its targets are of the cluster {printable(now.cluster)}, and the file's of {printable(before.cluster)}"
    if before.instance != now.instance:
        return f"its targets are of the instance {printable(now.instance)!r}, and the file's of {printable(before.instance)!r}"
    if before.cluster_uid and now.cluster_uid and before.cluster_uid != now.cluster_uid:
        return f"the cluster {printable(now.cluster)} is another one than before, with another UID"
    return ""


def _write(path: Path, content: bytes) -> None:
    file = Replacement(path, MODE)
    file.open()
    try:
        file.write(content)
        file.commit()
    finally:
        file.discard()


class Follower:
    """Keeps the file of one source; whatever the registrar or the network does, its last good state stays."""

    def __init__(
        self, source: TargetSource, tls: Derived[Trust], token: Rotating[str], *, wait: float
    ) -> None:
        self.source = source
        self._tls = tls
        self._token = token
        self._wait = wait
        self._file = TargetFile(source.path)
        self._blocking = Blocking()
        # Of the answer that the file holds.
        self._etag = ""
        self._status = LoadStatus(
            source.name,
            failing="targets cannot be fetched; the file stays as it is",
            working="targets are fetched again",
        )

    @property
    def problem(self) -> str:
        """Why the latest try failed, empty if it did not."""
        return self._status.problem

    async def run(self, session: ClientSession) -> None:
        """Follow the registrar; ends only by cancellation."""
        pauses = delays(RETRY_FIRST, RETRY_CAP)
        while True:
            begun = time.monotonic()
            if await self._try(session, self._wait):
                pauses, pause = delays(RETRY_FIRST, RETRY_CAP), begun + PACE - time.monotonic()
            else:
                pause = next(pauses)
            await asyncio.sleep(max(pause, 0.0 if self._etag or self.problem else STALE_RETRY))

    async def fetch_once(self, session: ClientSession) -> str:
        """Fetch the targets of now, and return why that failed; empty if it did not."""
        await self._try(session, 0.0)
        return self.problem

    async def _try(self, session: ClientSession, wait: float) -> bool:
        try:
            await self._fetch(session, wait)
        except Exception as error:  # noqa: BLE001 - no answer ends the process, whatever it makes a library raise
            self._status.failed(self._words(error), has_value=True)
            return False
        self._status.succeeded(is_new=False)
        return True

    async def _fetch(self, session: ClientSession, wait: float) -> None:
        if self._etag and not await self._on_disk(self._file.exists):
            self._etag = ""
        headers = {"Accept": "application/json"}
        if token := self._token.current():
            headers["Authorization"] = f"Bearer {token}"
        if self._etag:
            headers["If-None-Match"] = self._etag
        url = self.source.url.update_query(wait=f"{wait:g}s") if wait else self.source.url
        limit = aiohttp.ClientTimeout(total=wait + ANSWER, sock_connect=CONNECT, sock_read=wait + HEAD)
        async with session.get(
            url, headers=headers, ssl=self._tls.current().context, allow_redirects=False, timeout=limit
        ) as response:
            if response.status == 304 and self._etag:
                return
            if response.status != 200:
                raise FetchError(await _refusal(response))
            owner = _owner_of(response.headers)
            content = await _body(response)
            is_stale, etag = STALE_SINCE in response.headers, response.headers.get("ETag", "")
        if is_stale and await self._on_disk(self._file.exists):
            self._etag = ""  # what the file holds is newer, or the same
            return
        await self._on_disk(lambda: self._file.replace(content, owner))
        self._etag = "" if is_stale else etag

    async def _on_disk(self, work: Callable[[], T]) -> T:
        try:
            return await self._blocking.do(work)
        except (OSError, ValueError) as error:
            raise FetchError(write_problem(self.source.path, error)) from None

    def _words(self, error: Exception) -> str:
        if isinstance(error, OperationalError):
            return str(error)
        trust = self._tls.value
        if explained := explain(error, REGISTRAR, trust.context, trusted=trust.source):
            return str(explained)
        return _plain_words(error)


def _plain_words(error: Exception) -> str:
    match error:
        case TimeoutError():
            return "it does not answer in time"
        case aiohttp.ClientConnectorDNSError():
            return "its host is not found"
        case aiohttp.ClientConnectorError():
            return f"no connection: {error.os_error.strerror or type(error.os_error).__name__}"
        case aiohttp.ClientError():
            return f"its answer broke off, or is no HTTP: {type(error).__name__}"
    return f"its answer cannot be used: {type(error).__name__}"


def _owner_of(headers: Mapping[str, str]) -> Owner:
    if not headers.get(CLUSTER):
        raise FetchError(f"it is no registrar, or an older one: its answer has no {CLUSTER}")
    return Owner(headers[CLUSTER], headers.get(INSTANCE, ""), headers.get(CLUSTER_UID, ""))


async def _body(response: ClientResponse) -> bytes:
    if response.content_type != "application/json":
        raise FetchError("its answer is no JSON")
    content = bytearray()
    async for piece in response.content.iter_chunked(PIECE):
        content += piece
        if len(content) > SIZE_LIMIT:
            raise FetchError(f"its answer is longer than {SIZE_LIMIT >> 20} MiB")
    return bytes(content)


async def _refusal(response: ClientResponse) -> str:
    """Return the words for an answer that is no success."""
    if 300 <= response.status < 400:
        return f"it answers {response.status}: redirects are not followed"
    if response.status == 401:
        return f"it answers 401: {TOKEN} must name a file with a token of HTTP_SD_BEARER_TOKEN_FILE"
    if response.status == 404:
        return "it answers 404: the path of HTTP_SD_PORT is /sd/targets"
    text = (await response.content.read(MOST_WORDS)).decode("ascii", "replace")
    return f"it answers {response.status}: {printable(' '.join(text.split()))}"
