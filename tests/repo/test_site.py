"""The pages of `docs/` as a site."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.files import ROOT
from support.waiting import PATIENCE

DOCS = ROOT / "docs"


@pytest.mark.long
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every page is read, reached from the index and linked to what exists."""
    command = (sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", DOCS, tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=4 * PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    built = {path.stem for path in tmp_path.glob("*.html")}
    assert {path.stem for path in DOCS.glob("*.md")} <= built
