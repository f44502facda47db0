"""Values loaded from files that change: the last good one stays, whatever the files become meanwhile."""

import gc
import os
import re
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from k8s_consul_registrar.admin.metrics import new_registry
from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.rotating import (
    LOOK_EVERY,
    RETRY_EVERY,
    SIZE_LIMIT,
    Derived,
    LoadStatus,
    Rotating,
    clean_token,
    fixed,
    read_file,
    refuse_truncated,
)
from support.waiting import PATIENCE

BEGINS = "changed files cannot be used; those before stay in use"
ENDS = "changed files are in use"


class Pair:
    """Two files that count only together."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / "left", folder / "right"]
        # Of its own in each test: what an earlier test left in a traceback still counts in the metric.
        self.of = folder.name
        self.loads = 0
        self.now = 100.0
        self.write("1", "1")

    def write(self, left: str, right: str) -> None:
        """Replace both files."""
        for path, text in zip(self.paths, (left, right), strict=True):
            path.with_suffix(".new").write_text(text)
            path.with_suffix(".new").replace(path)

    def load(self) -> str:
        """Read both."""
        self.loads += 1
        left, right = (path.read_text() for path in self.paths)
        if left != right:
            raise AccessError("they do not belong together")
        return left

    def rotating(
        self, load: Callable[[], str] | None = None, *, max_age: float | None = None
    ) -> Rotating[str]:
        """Return the value of these files, by this test's clock."""
        return Rotating(self.of, self.paths, load or self.load, max_age=max_age, clock=lambda: self.now)


def gauge(of: str) -> float | None:
    """Return what /metrics shows of a setting."""
    gc.collect()
    return new_registry("registrar").get_sample_value("k8s_consul_registrar_rotating_file_ok", {"of": of})


def test_value_is_loaded_again_when_a_file_changed(tmp_path: Path) -> None:
    """Unchanged files are not read; unusable ones are retried, and change nothing."""
    pair = Pair(tmp_path)
    rotating = pair.rotating()
    assert (rotating.value, rotating.refresh(), pair.loads) == ("1", False, 1)
    pair.write("2", "1")
    assert (rotating.refresh(), rotating.value, rotating.problem) == (
        False,
        "1",
        "they do not belong together",
    )
    pair.write("2", "2")
    assert (rotating.refresh(), rotating.value, rotating.problem) == (True, "2", "")
    pair.paths[0].unlink()
    assert (rotating.refresh(), rotating.value) == (False, "2")
    assert rotating.problem == f"{pair.of} cannot be used: No such file or directory"
    pair.write("2", "2")
    assert (rotating.refresh(), rotating.problem) == (False, "")


def test_load_that_failed_is_repeated_though_no_file_changed(tmp_path: Path) -> None:
    """A right that was given late, or no free descriptor: neither shows in the files."""
    pair = Pair(tmp_path)
    hindrance: Exception | None = None

    def load() -> str:
        if hindrance:
            raise hindrance
        return pair.load()

    rotating = pair.rotating(load)
    pair.write("2", "2")
    hindrance = PermissionError(13, "Permission denied")
    assert not rotating.refresh()
    loads = pair.loads
    hindrance = None
    assert not rotating.refresh(), "not before RETRY_EVERY"
    pair.now += RETRY_EVERY
    assert rotating.refresh()
    assert (rotating.value, pair.loads) == ("2", loads + 1)
    pair.now += RETRY_EVERY
    assert not rotating.refresh()
    assert pair.loads == loads + 1


ODD: list[Exception] = [
    OSError(5, "Input/output error"),
    ssl.SSLError(1, "x"),
    UnicodeDecodeError("utf-8", b"s3cr3t", 0, 1, "s3cr3t"),
    ValueError("s3cr3t"),
    TypeError("s3cr3t"),
    RecursionError("s3cr3t"),
    KeyError("s3cr3t"),
    AttributeError("s3cr3t"),
    ZeroDivisionError("s3cr3t"),
]


@pytest.mark.parametrize("error", ODD, ids=lambda error: type(error).__name__)
def test_any_exception_of_a_load_is_contained_without_its_text(tmp_path: Path, error: Exception) -> None:
    """At the start it is an AccessError that names the setting; later the last good value stays."""
    pair = Pair(tmp_path)
    errors: list[Exception] = [error]

    def load() -> str:
        if errors:
            raise errors[0]
        return pair.load()

    with pytest.raises(AccessError, match=rf"^{re.escape(pair.of)} cannot be used: ") as caught:
        pair.rotating(load)
    assert "s3cr3t" not in str(caught.value)
    errors.clear()
    rotating = pair.rotating(load)
    errors.append(error)
    pair.write("2", "2")
    with capture_logs() as logs:
        assert (rotating.refresh(), rotating.value) == (False, "1")
    assert [(line["event"], line["of"]) for line in logs] == [(BEGINS, pair.of)]
    assert "s3cr3t" not in str(logs)


def test_memory_that_ran_out_is_not_contained(tmp_path: Path) -> None:
    """No part can go on without memory."""

    def load() -> str:
        raise MemoryError

    with pytest.raises(MemoryError):
        Pair(tmp_path).rotating(load)


def test_problem_is_logged_when_it_begins_changes_and_ends_and_shown_as_a_metric(tmp_path: Path) -> None:
    """One line each, however often the value is asked for."""
    pair = Pair(tmp_path)
    rotating = pair.rotating()
    assert gauge(pair.of) == 1
    with capture_logs() as logs:
        for left, right in (("2", "1"), ("3", "1")):
            pair.write(left, right)
            for _ in range(3):
                pair.now += LOOK_EVERY
                assert rotating.current() == "1"
        assert gauge(pair.of) == 0
        pair.paths[0].unlink()
        pair.now += LOOK_EVERY
        assert rotating.current() == "1"
        pair.write("3", "3")
        pair.now += LOOK_EVERY
        assert rotating.current() == "3"
        assert rotating.current() == "3"
    assert [(line["event"], line.get("problem")) for line in logs] == [
        (BEGINS, "they do not belong together"),
        (BEGINS, f"{pair.of} cannot be used: No such file or directory"),
        (ENDS, None),
    ]
    assert gauge(pair.of) == 1
    del rotating
    assert gauge(pair.of) is None


def test_one_bad_of_two_with_one_name_shows_in_the_metric() -> None:
    """The worst of them counts."""
    good, bad = LoadStatus("TWO"), LoadStatus("TWO")
    assert gauge("TWO") == 1
    bad.failed("x", has_value=False)
    assert gauge("TWO") == 0
    good.succeeded(is_new=False)
    assert gauge("TWO") == 0


def test_current_looks_at_the_files_after_some_seconds(tmp_path: Path) -> None:
    """Not each time it is asked."""
    pair = Pair(tmp_path)
    rotating = pair.rotating()
    pair.write("2", "2")
    pair.now += LOOK_EVERY - 0.1
    assert rotating.current() == "1"
    pair.now += 0.2
    assert rotating.value == "1"
    assert rotating.current() == "2"
    pair.write("3", "3")
    assert rotating.current() == "2"


def test_lazy_value_is_loaded_by_the_first_who_asks_until_it_loads(tmp_path: Path) -> None:
    """Until then each ask raises."""
    pair = Pair(tmp_path)
    pair.paths[0].unlink()
    rotating = Rotating(pair.of, pair.paths, pair.load, is_lazy=True)
    assert pair.loads == 0
    for _ in range(2):
        with pytest.raises(AccessError, match="No such file"):
            rotating.current()
    assert gauge(pair.of) == 0
    pair.write("1", "1")
    assert rotating.current() == "1"
    assert gauge(pair.of) == 1


def test_value_with_an_age_is_loaded_again_though_no_file_changed(tmp_path: Path) -> None:
    """And one that expired is loaded by the next ask."""
    pair = Pair(tmp_path)
    rotating = pair.rotating(max_age=60.0)
    pair.now += 59
    rotating.current()
    assert pair.loads == 1
    pair.now += 2
    rotating.current()
    assert pair.loads == 2
    rotating.expire()
    rotating.current()
    rotating.current()
    assert pair.loads == 3


def test_fixed_value_stays() -> None:
    """It comes from no file and shows in no metric."""
    one = object()
    rotating = fixed(one)
    rotating.refresh(is_due=True)
    assert rotating.current() is one
    assert gauge("") is None


def unreadable(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return what may stand in the place of a file, and what is said of it."""
    made = {name: folder / name for name in ("absent", "directory", "dangling", "loop", "pipe", "huge")}
    made["directory"].mkdir()
    made["dangling"].symlink_to(folder / "nowhere")
    made["loop"].symlink_to(made["loop"])
    os.mkfifo(made["pipe"])
    with made["huge"].open("wb") as file:
        file.truncate(SIZE_LIMIT + 1)
    return {
        "absent": (made["absent"], "No such file or directory"),
        "under a file": (made["huge"] / "x", "Not a directory"),
        "directory": (made["directory"], "Is a directory"),
        "dangling": (made["dangling"], "No such file or directory"),
        "loop": (made["loop"], "Too many levels of symbolic links"),
        "pipe": (made["pipe"], "not a regular file"),
        "huge": (made["huge"], "larger than 4 MiB"),
        "endless": (Path("/dev/zero"), "not a regular file"),
        "terminal": (Path("/dev/ptmx"), "not a regular file"),
        "nul": (Path("a\0b"), "not a path"),
        "surrogate": (Path("/\ud800"), "not a path"),
        "long": (Path("/" + "x" * 5000), "File name too long"),
    }


@pytest.mark.timeout(PATIENCE)
def test_file_that_cannot_be_read_is_named_at_once(tmp_path: Path) -> None:
    """A pipe without a writer, an endless device and a huge file hold nothing up."""
    for path, why in unreadable(tmp_path).values():
        with pytest.raises(AccessError) as caught:
            read_file(path, "SETTING")
        assert str(caught.value).startswith("SETTING: cannot read ")
        assert str(caught.value).endswith(why)


def test_file_of_the_longest_size_and_one_in_memory_are_read(tmp_path: Path) -> None:
    """A worker's files are nowhere but in memory."""
    (tmp_path / "large").write_bytes(b"x" * SIZE_LIMIT)
    assert len(read_file(tmp_path / "large", "S")) == SIZE_LIMIT
    descriptor = os.memfd_create("x")
    try:
        os.pwrite(descriptor, b"content", 0)
        assert read_file(Path(f"/proc/self/fd/{descriptor}"), "S") == b"content"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "given", ["s3cr3t", "some/s3cr3t", "{folder}/s3cr3t-0123456789abcdef", "s3cr3t" * 999]
)
def test_secret_in_the_place_of_a_file_s_name_is_not_shown(tmp_path: Path, given: str) -> None:
    """A relative name that is not there, and a long one in a folder that is; other names are shown."""
    with pytest.raises(AccessError, match=r"^S: cannot read ") as caught:
        read_file(Path(given.format(folder=tmp_path)), "S")
    assert "s3cr3t" not in str(caught.value)
    with pytest.raises(
        AccessError, match=rf"^S: cannot read {tmp_path}/tls\.crt: No such file or directory$"
    ):
        read_file(tmp_path / "tls.crt", "S")


@pytest.mark.parametrize(
    "content",
    [b"", b" \n\t", b"a b", b"a\nb", b"a\x00b", b"a\x7f", b"\xff\xfea\x00", "tök".encode(), b"a\x85b"],
)
def test_token_that_is_none_is_refused(content: bytes) -> None:
    """Empty ones, and whatever no header carries."""
    with pytest.raises(AccessError, match=r"^S: the token "):
        clean_token(content, "S")


def test_token_s_surroundings_are_left_out() -> None:
    """A line's end is no part of it."""
    assert clean_token(b" secret-token\r\n", "S") == "secret-token"


def test_beginning_of_the_token_before_is_refused_while_the_file_is_fresh(tmp_path: Path) -> None:
    """A file that is written in place is short for a moment; other tokens are taken at once."""
    path = tmp_path / "token"
    path.touch()
    with pytest.raises(AccessError, match="only the beginning") as caught:
        refuse_truncated("secret", ["other", "secret-token"], path, "S")
    assert "secret" not in str(caught.value)
    for good in ("secret-token", "sec-2", "secret-token-2"):
        refuse_truncated(good, ["other", "secret-token"], path, "S")
    refuse_truncated("first", [""], path, "S")
    os.utime(path, (0, 0))
    refuse_truncated("secret", ["other", "secret-token"], path, "S")


def test_derived_value_is_made_again_when_a_part_changed_and_only_then(tmp_path: Path) -> None:
    """Each part keeps its own last good value: one that cannot be used does not hold up the other."""

    def part(name: str) -> Rotating[int]:
        path = tmp_path / name
        path.write_text("1")
        return Rotating(name, [path], lambda: int(path.read_text()), look_every=0)

    left, right = part("left"), part("right")
    made: list[tuple[int, int]] = []

    def make(*values: int) -> tuple[int, ...]:
        if 13 in values:
            raise AccessError("it cannot be made")
        made.append((values[0], values[1]))
        return values

    derived = Derived(make, left, right)
    assert derived.value is derived.current()
    assert not derived.refresh()
    assert made == [(1, 1)]
    (tmp_path / "left").write_text("one")
    (tmp_path / "right").write_text("22")
    assert derived.refresh()
    assert derived.value == (1, 22)
    assert derived.problem == "left cannot be used: ValueError"
    (tmp_path / "right").write_text("13")
    assert derived.current() == (1, 22)
    (tmp_path / "right").write_text("4444")
    assert derived.current() == (1, 4444)
    assert made == [(1, 1), (1, 22), (1, 4444)]
    with pytest.raises(AccessError):
        Derived(make, left, fixed(13))
