"""Values made of files: made anew where one changed, and kept while the next cannot be."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.files import LOOK_EVERY, Followed, FromFiles, fixed


class Pair:
    """Two files that count only together."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / "left", folder / "right"]
        self.makes = 0
        self.write("1", "1")

    def write(self, left: str, right: str) -> None:
        """Replace both files."""
        for path, text in zip(self.paths, (left, right), strict=True):
            path.with_suffix(".new").write_text(text)
            path.with_suffix(".new").replace(path)

    def make(self) -> str:
        """Read both."""
        self.makes += 1
        try:
            left, right = (path.read_text() for path in self.paths)
        except OSError as error:
            raise AccessError(f"cannot read: {error.strerror}") from None
        if left != right:
            raise AccessError("they do not belong together")
        return left


def test_it_is_made_again_where_a_file_changed(tmp_path: Path) -> None:
    """One that did not change is not read; what cannot be used is told once, tried again, and changes nothing."""
    pair = Pair(tmp_path)
    made = FromFiles(pair.paths, pair.make)
    assert (made.value, made.refresh(), pair.makes) == ("1", False, 1)
    pair.write("2", "1")
    with pytest.raises(AccessError, match="belong together"):
        made.refresh()
    assert (made.value, made.refresh()) == ("1", False)
    pair.write("2", "2")
    assert (made.refresh(), made.value) == (True, "2")
    pair.paths[0].unlink()
    with pytest.raises(AccessError, match="cannot read"):
        made.refresh()
    assert made.value == "2"
    assert (made.refresh(), made.refresh(is_due=False), pair.makes) == (False, False, 7)
    pair.write("2", "2")
    made.refresh()
    assert made.refresh(is_due=True)


def test_what_failed_is_tried_again_though_no_file_changed(tmp_path: Path) -> None:
    """A right that was given late, or no free descriptor: what came must not wait for the next change."""
    pair = Pair(tmp_path)
    hindered = ""

    def make() -> str:
        if hindered:
            raise AccessError(hindered)
        return pair.make()

    for is_due in (False, True):
        made = FromFiles(pair.paths, make)
        if not is_due:
            pair.write("2", "2")
        hindered = "permission denied"
        with pytest.raises(AccessError):
            made.refresh(is_due=is_due)
        assert not made.refresh(), "said once"
        hindered = "too many open files"
        with pytest.raises(AccessError, match="too many"):
            made.refresh()
        hindered = ""
        assert made.refresh()
        assert made.value == "2"
        assert not made.refresh()


def test_the_first_must_be_there(tmp_path: Path) -> None:
    """What cannot be made at the start is the caller's to hear."""
    pair = Pair(tmp_path)
    pair.write("1", "2")
    with pytest.raises(AccessError):
        FromFiles(pair.paths, pair.make)
    with pytest.raises(AccessError):
        Followed("pair", pair.paths, pair.make)


def test_who_asks_has_the_files_looked_at_now_and_then(tmp_path: Path) -> None:
    """Not at every question, and what changed or cannot be used is told to the log."""
    pair = Pair(tmp_path)
    now = 100.0
    followed = Followed("the pair", pair.paths, pair.make, clock=lambda: now)
    pair.write("2", "2")
    now += LOOK_EVERY - 0.1
    assert followed.current() == "1"
    now += 0.2
    with capture_logs() as logs:
        assert followed.value == "1"
        assert followed.current() == "2"
        pair.write("3", "3")
        assert followed.current() == "2", "looked at a moment ago"
        pair.write("3", "2")
        now += LOOK_EVERY
        assert followed.current() == "2"
        now += LOOK_EVERY
        assert followed.current() == "2"
    assert [(line["log_level"], line["of"], line.get("problem")) for line in logs] == [
        ("info", "the pair", None),
        ("warning", "the pair", "they do not belong together"),
    ]
    pair.write("3", "3")
    followed.look()
    assert followed.value == "3"


def test_what_is_fixed_stays() -> None:
    """It is made of no file."""
    one = object()
    followed = fixed(one)
    followed.look()
    assert followed.current() is one
