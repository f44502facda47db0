"""Recorded conversations with a real API server, as the tests of `kube` read them."""

import json
from typing import NamedTuple

from support.paths import SAMPLES


class Recorded(NamedTuple):
    """One recorded answer; `path` is the request's, with its query."""

    path: str
    status: int
    headers: dict[str, str]
    body: bytes


def recorded(name: str) -> Recorded:
    """Return the answer recorded in `<name>.json`."""
    exchange = json.loads((SAMPLES / f"{name}.json").read_text())
    response = exchange["response"]
    return Recorded(
        exchange["request"]["path"], response["status"], response["headers"], response["body"].encode()
    )


def recorded_refusal(name: str) -> bytes:
    """Return the body recorded in `<name>.http`."""
    return (SAMPLES / f"{name}.http").read_bytes().replace(b"\r\n", b"\n").partition(b"\n\n")[2]
