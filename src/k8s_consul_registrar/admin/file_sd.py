"""The file of FILE_SD_PATH: the groups of HTTP service discovery, replaced whenever they change."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import msgspec

from k8s_consul_registrar.admin.documents import LEAST as LEAST_PAUSE
from k8s_consul_registrar.admin.documents import PACE, Documents
from k8s_consul_registrar.admin.replacement import (
    Blocking,
    Replacement,
    check_folder,
    remove_leftovers,
    write_problem,
)
from k8s_consul_registrar.admin.target_groups import Group, texts
from k8s_consul_registrar.admin.view import Completeness, View
from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.registrar.brake import LEAST, SHARE, BrakeRules
from k8s_consul_registrar.rotating import LoadStatus, read_file
from k8s_consul_registrar.telemetry import get_logger

SETTING = "FILE_SD_PATH"
# Prometheus runs as another user; the file holds addresses and names, no secrets.
MODE = 0o644
# Seconds between two looks for a change, and between two looks at the file itself.
LOOK_EVERY = 0.1
CHECK_EVERY = 5.0
# Seconds between two changes of the file at most, and the multiple of a write's CPU time that is waited for.
LONGEST_PACE = 5.0
COST = 500.0
# Seconds after a failure until the next try.
RETRY_EVERY = 5.0
# Seconds that the last write may take.
LAST_WRITE = 10.0
# The longest file that is read: that of 300,000 targets.
SIZE_LIMIT = 256 << 20  # bytes

log = get_logger("file_sd")


class _Labels(msgspec.Struct):
    id: str = msgspec.field(name="__meta_consul_service_id", default="")


class _Group(msgspec.Struct):
    labels: _Labels


_decoder = msgspec.json.Decoder(_Group)


def groups_by_id(content: bytes) -> Mapping[str, bytes]:
    """Return the groups of a file that a registrar wrote, by service ID; of other content what looks like them."""
    found: dict[str, bytes] = {}
    for line in content.splitlines():
        group = line.rstrip(b",]")
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            if service_id := _decoder.decode(group).labels.id:
                found[service_id] = group
    return found


def groups_before(path: Path) -> Mapping[str, bytes]:
    """Return the groups that an earlier process wrote; raises an AccessError if no file can ever be written."""
    check_folder(path, SETTING)
    remove_leftovers(path)
    try:
        return groups_by_id(read_file(path, SETTING, size_limit=SIZE_LIMIT, follows_links=False))
    except AccessError as error:
        if path.exists():
            log.warning("targets of an earlier process cannot be read", problem=str(error))
        return {}


class FileSd:
    """Replaces the file when the targets have changed, at most once a second, and only by complete knowledge.

    `before` are the groups of an earlier process. The brake does not know them: without Consul, or while it cannot
    be read, a wrong kubeconfig would empty the file. So if the first targets of this process lack enough of
    them that it would be a mass removal, those stay in the file for `confirm_start` seconds.
    """

    def __init__(
        self,
        path: Path,
        view: View,
        documents: Documents,
        *,
        before: Mapping[str, bytes],
        brake: BrakeRules,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._view = view
        self._documents = documents
        self._before = dict(before)
        self._brake = brake
        self._clock = clock
        self._complete = Completeness(view, clock)
        self._status = LoadStatus(
            SETTING, failing="targets cannot be written", working="targets are written again"
        )
        self._blocking = Blocking()
        # The version of the groups in the file, None if it is not known to hold any, and the position of the view.
        self._written: object | None = None
        self._position = -1
        self._due = self._checked_at = self._failed_at = float("-inf")
        # None until the first targets were compared with those of an earlier process.
        self._keeps_until: float | None = None

    async def run(self) -> None:
        """Write when it is due; ends only by cancellation."""
        while True:
            await asyncio.sleep(max(LOOK_EVERY, self._due - time.monotonic()))
            if self._complete and await self._is_due():
                await self.write()

    async def write_at_end(self) -> None:
        """Write what changed before the process ends; the file stays."""
        if self._complete:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WRITE):
                    await self.write()

    async def write(self) -> None:
        """Replace the file unless it holds these targets already; a failure is logged and the file stays."""
        begun, groups = time.monotonic(), await self._documents.groups()
        version, self._position = groups.version, groups.position
        self._due = begun + LEAST_PAUSE
        if self._written is version and not self._before and not self._status.problem:
            return
        shown = tuple(groups.by_id.values())
        try:
            cost = await self._blocking.do(lambda: self._replace(shown))
        except (OSError, ValueError) as error:
            self._written, self._failed_at = None, self._clock()
            self._status.failed(f"{SETTING}: {write_problem(self._path, error)}", has_value=True)
            return
        self._status.succeeded(is_new=False)
        self._written = version
        self._due = begun + min(LONGEST_PACE, max(PACE, COST * cost))

    async def _is_due(self) -> bool:
        now = self._clock()
        if self._written is None:
            return now - self._failed_at >= RETRY_EVERY
        if self._documents.is_old(self._position) or self._is_over(now):
            return time.monotonic() >= self._due
        if now - self._checked_at < CHECK_EVERY:
            return False
        self._checked_at = now
        with contextlib.suppress(OSError):
            if not await self._blocking.do(self._path.exists):
                self._written = None
        return self._written is None

    def _replace(self, groups: Sequence[Group]) -> float:
        """Write the file and return the CPU time of that; blocks."""
        used = time.thread_time()
        file = Replacement(self._path, MODE)
        file.open()
        try:
            begin = b"["
            for text in chain(texts(groups), self._texts_before(groups)):
                file.write(begin + text)
                begin = b","
            file.write(b"[]\n" if begin == b"[" else b"]\n")
            file.commit()
        finally:
            file.discard()
        return time.thread_time() - used

    def _texts_before(self, groups: Sequence[Group]) -> list[bytes]:
        """Return the groups of an earlier process that stay in the file."""
        if not self._before:
            return []
        held = len(self._before)
        # What this process has shown itself follows its own rules from then on.
        for one in groups:
            self._before.pop(one.id, None)
        if not self._is_kept(held, shown=len(groups)):
            self._before = {}
        return [b"\n" + group for group in self._before.values()]

    def _is_kept(self, held: int, *, shown: int) -> bool:
        """Return True if what is left of `held` groups of an earlier process stays in the file for now."""
        now, missing = self._clock(), len(self._before)
        if self._keeps_until is None:
            is_mass = missing >= LEAST and missing > SHARE * held
            is_held = (is_mass or (missing and not shown)) and not self._brake.allow_mass
            self._keeps_until = now + self._brake.confirm_start if is_held else now
            if is_held:
                log.warning(
                    "the file keeps targets of an earlier process that the cluster does not show",
                    targets=missing,
                    seconds=self._brake.confirm_start,
                )
        elif missing and self._is_over(now):
            log.info("the file drops targets of an earlier process", targets=missing)
        return bool(missing) and not self._is_over(now)

    def _is_over(self, now: float) -> bool:
        return bool(self._before) and self._keeps_until is not None and now >= self._keeps_until
