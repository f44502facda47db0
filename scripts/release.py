"""Build what a release consists of into dist/: sdist, wheel, chart, bill of materials, checksums."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import helm_python

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"


def main() -> None:
    """Build everything and list it."""
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    subprocess.run((sys.executable, "-m", "hatchling", "build", "-d", DIST), cwd=ROOT, check=True)
    helm_python.package(ROOT / "charts" / "k8s-consul-registrar", destination=DIST)
    bill = subprocess.run((sys.executable, ROOT / "scripts" / "sbom.py"), capture_output=True, check=True)
    (DIST / "sbom.cdx.json").write_bytes(bill.stdout)
    built = sorted(DIST.iterdir())
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in built)
    (DIST / "SHA256SUMS").write_text(sums)
    print(sums, end="")


if __name__ == "__main__":
    main()
