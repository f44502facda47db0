"""The file of HTTP_SD_STATE_FILE: read at the start, kept up to date, served until live targets are complete."""

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from k8s_consul_registrar.admin.replacement import Replacement, check_folder, in_thread, remove_leftovers
from k8s_consul_registrar.admin.saved_state import (
    MAX_AGE,
    SIZE_LIMIT,
    Origin,
    SavedState,
    UnusableState,
    decode_state,
    encode_end,
    encode_head,
    encode_target,
)
from k8s_consul_registrar.admin.view import Completeness, View
from k8s_consul_registrar.asyncio_tools import in_slices
from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.cluster import ClusterUid
from k8s_consul_registrar.kube.source_state import Failed
from k8s_consul_registrar.rotating import LoadStatus, contained, read_file, reason
from k8s_consul_registrar.telemetry import get_logger

SETTING = "HTTP_SD_STATE_FILE"
# Seconds between two saves.
SAVE_EVERY = 30.0
# Seconds after which targets that stay the same are saved again, so that the file does not become too old.
RENEW_EVERY = 300.0
# Seconds between two checks for something to save.
LOOK_EVERY = 1.0
# Seconds that the API server has to tell the cluster's UID, before it counts as one that cannot be asked.
UID_PATIENCE = 2.0
# Seconds that the last save may take.
LAST_SAVE = 10.0
# Targets encoded between two turns of the event loop: a few milliseconds.
SLICE = 500
PIECE = 1 << 20  # bytes written at once

log = get_logger("state_file")


def read_state(path: Path, origin: Origin, now: float) -> SavedState | None:
    """Return the targets that the file holds, None if there is no file; raises an AccessError.

    The error says why a file cannot be used; `now` is in seconds of the epoch. A symbolic link is refused: this registrar never makes one.
    """
    if not os.path.lexists(path):
        return None
    with contained(SETTING):
        content = read_file(path, SETTING, size_limit=SIZE_LIMIT, follows_links=False)
        try:
            return decode_state(content, origin, now)
        except UnusableState as error:
            raise AccessError(f"{SETTING}: {path} is not used: {error}") from None


def open_state(path: Path, origin: Origin) -> SavedState | None:
    """Return the saved targets at a start; raises an AccessError only where none could ever be saved."""
    check_folder(path, SETTING)
    remove_leftovers(path)
    try:
        saved = read_state(path, origin, time.time())
    except AccessError as error:
        log.warning("saved targets are not used", problem=str(error))
        return None
    if saved is not None:
        log.info("saved targets were read", targets=saved.count, age=round(time.time() - saved.since, 1))
    return saved


class SavedTargetsGate:
    """Saved targets, while they may be served.

    That is until every source was listed in this process, and only for the cluster that they are about. While
    the API server cannot tell which cluster it is, they are believed to be about it.
    """

    def __init__(
        self,
        saved: SavedState | None,
        view: View,
        cluster_uid: ClusterUid,
        *,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._saved = saved
        self._view = view
        self._cluster_uid = cluster_uid
        self._wall_clock = wall_clock
        self._clock = clock
        self._began_at = clock()
        self._is_serving = False

    def current(self) -> SavedState | None:
        """Return the targets, None if they may not be served now."""
        self.refresh()
        saved = self._saved
        if saved is None or not self._is_cluster_settled():
            return None
        if not self._is_serving:
            self._is_serving = True
            log.warning(
                "serving targets that an earlier process saved",
                targets=saved.count,
                age=round(self._wall_clock() - saved.since, 1),
                problem=self._view.unlisted(),
            )
        return saved

    def refresh(self) -> bool:
        """Drop the targets once they may never be served again; return True while they are still there."""
        saved = self._saved
        if saved is None:
            return False
        uid = self._cluster_uid.uid
        if not self._view.unlisted():
            why = "every source is listed"
        elif uid and uid != saved.cluster_uid:
            why = "they are about another cluster"
        else:
            why = saved.obstacle(self._wall_clock())
        if why:
            self._saved = None
            log.info("saved targets are dropped", why=why)
        return self._saved is not None

    async def run(self) -> None:
        """Drop the targets, and so their memory, as soon as they are not needed any more."""
        while self.refresh():  # noqa: ASYNC110 - nothing announces that the file has become too old
            await asyncio.sleep(LOOK_EVERY)

    def _is_cluster_settled(self) -> bool:
        """Return True if the cluster is the right one, or cannot be asked."""
        cluster = self._cluster_uid
        return bool(cluster.uid) or cluster.was_asked or self._clock() - self._began_at >= UID_PATIENCE


class StateKeeper:
    """Saves the targets whenever they are complete and have changed, at most every `every` seconds."""

    def __init__(
        self,
        path: Path,
        origin: Origin,
        view: View,
        *,
        is_settled: Callable[[], bool],
        every: float = SAVE_EVERY,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._origin = origin
        self._view = view
        self._is_settled = is_settled
        self._every = every
        self._wall_clock = wall_clock
        self._clock = clock
        self._status = LoadStatus(
            SETTING, failing="targets cannot be saved", working="targets are saved again"
        )
        self._complete = Completeness(view, clock)
        self._tried_at = float("-inf")
        # The generation, the digest and the time of the targets in the file.
        self._generation: int | None = None
        self._digest = b""
        self._up_to_date_at = 0.0

    async def run(self) -> None:
        """Save when it is due; ends only by cancellation."""
        while True:
            await asyncio.sleep(min(LOOK_EVERY, self._every))
            if self._complete and self._clock() - self._tried_at >= self._every and self._is_due():
                await self.save()

    async def save_at_end(self) -> None:
        """Save once more before the process ends."""
        if not self._view.unlisted():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_SAVE):
                    await self.save(new_enough=0.0)

    async def save(self, new_enough: float = RENEW_EVERY) -> None:
        """Replace the file, unless it holds the same targets and is younger than the given seconds.

        A failure is logged, and the file stays as it was.
        """
        self._tried_at = self._clock()
        generation, written_at = self._view.generation, self._as_of()
        if self._wall_clock() - written_at > MAX_AGE:
            return
        try:
            await self._write(written_at, new_enough)
        except (OSError, ValueError) as error:
            self._status.failed(f"{SETTING}: cannot write {self._path}: {_text(error)}", has_value=True)
            return
        self._status.succeeded(is_new=False)
        self._generation = generation

    def _is_due(self) -> bool:
        if self._view.generation != self._generation:
            return True
        return self._as_of() - self._up_to_date_at >= RENEW_EVERY

    def _as_of(self) -> float:
        """Return until when the targets are known to be up to date, in seconds of the epoch."""
        now, moment = self._wall_clock(), self._clock()
        failed = [
            moment - status.state.since
            for status in self._view.sources().values()
            if isinstance(status.state, Failed)
        ]
        return now - max(failed, default=0.0)

    async def _write(self, written_at: float, new_enough: float) -> None:
        """Write the file, unless it holds the same targets and is younger than the given seconds."""
        desired = self._view.desired
        uid, is_settled = desired.cluster_uid, self._is_settled()
        head = encode_head(self._origin, cluster_uid=uid, written_at=written_at, is_settled=is_settled)
        digest = hashlib.blake2b(f"{uid} {is_settled}".encode())
        text, size, is_first = bytearray(head), 0, True
        file = Replacement(self._path)
        try:
            await in_thread(file.open)
            async for target in in_slices(self._view.targets(), SLICE):
                if not target.is_target:
                    continue
                piece = encode_target(target, is_first=is_first)
                is_first = False
                digest.update(piece)
                text += piece
                if len(text) >= PIECE:
                    size += len(text)
                    if size > SIZE_LIMIT:
                        raise ValueError(f"it would be larger than {SIZE_LIMIT >> 20} MiB")
                    await in_thread(file.writer(bytes(text)))
                    text.clear()
            text += encode_end()
            if uid != desired.cluster_uid:
                raise ValueError("the cluster changed meanwhile")
            is_same = digest.digest() == self._digest and written_at - self._up_to_date_at < new_enough
            if not is_same:
                await in_thread(file.writer(bytes(text)))
                await in_thread(file.commit)
                self._digest, self._up_to_date_at = digest.digest(), written_at
        finally:
            await in_thread(file.discard)


def _text(error: Exception) -> str:
    return reason(error) if isinstance(error, OSError) else str(error)
