"""Print a CycloneDX bill of materials: the program, and what requirements/runtime.txt locks for it.

Only the standard library: the image's build runs it before anything is installed.
"""

import argparse
import json
import re
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKED = re.compile(
    r"^(?P<name>[\w.-]+)==(?P<version>[^\s;\\]+)(?:\s*;\s*(?P<marker>[^\\]+?))?\s*\\?$", re.MULTILINE
)
VERSION = re.compile(r'__version__ = "(.+)"')
NAME = "k8s-consul-registrar"


def component(name: str, version: str, marker: str | None) -> dict[str, Any]:
    """Return a package of the lock file; a marker says where it is installed."""
    purl = f"pkg:pypi/{name}@{version}"
    found = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if marker:
        return {**found, "scope": "optional", "properties": [{"name": f"{NAME}:marker", "value": marker}]}
    return {**found, "scope": "required"}


def bill(lock: str, version: str) -> dict[str, Any]:
    """Return the bill of materials; the same lock and version give the same text."""
    locked = [component(one["name"], one["version"], one["marker"]) for one in LOCKED.finditer(lock)]
    program = {
        "type": "application",
        "bom-ref": f"pkg:pypi/{NAME}@{version}",
        "name": NAME,
        "version": version,
        "purl": f"pkg:pypi/{NAME}@{version}",
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }
    references = [one["bom-ref"] for one in locked]
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([version, references]))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"component": program},
        "components": locked,
        "dependencies": [
            {"ref": program["bom-ref"], "dependsOn": references},
            *({"ref": reference} for reference in references),
        ],
    }


def main() -> None:
    """Print the bill of this checkout."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    lock = (ROOT / "requirements" / "runtime.txt").read_text(encoding="utf-8")
    source = (ROOT / "src" / "k8s_consul_registrar" / "__init__.py").read_text(encoding="utf-8")
    found = VERSION.search(source)
    assert found is not None, "the package has no __version__"
    print(json.dumps(bill(lock, found[1]), indent=2))


if __name__ == "__main__":
    main()
