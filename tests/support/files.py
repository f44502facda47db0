"""Folders of this repository, and the conversations with real servers that are recorded in it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from yarl import URL

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SAMPLES = TESTS / "data" / "samples"
DEPLOY = ROOT / "deploy"
PACKAGE = ROOT / "src" / "k8s_consul_registrar"


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


VOLATILE = frozenset(
    (
        *("uid", "resourceVersion", "creationTimestamp", "deletionTimestamp", "time", "continue"),
        *("ContentHash", "CreateIndex", "ModifyIndex"),
    )
)
_UNCOMPARED_HEADERS = frozenset(("date", "server"))
_VALUED_HEADERS = ("content-type", "content-encoding", "cache-control", "retry-after", "vary")


class Exchange(NamedTuple):
    """A recorded request and its answer."""

    method: str
    path: str
    body: Any
    status: int
    headers: Mapping[str, str]
    text: str


class SandboxAnswer(NamedTuple):
    """An answer of the sandbox."""

    status: int
    headers: Mapping[str, str]
    text: str


def exchange(name: str) -> Exchange:
    """Return the exchange recorded in `<name>.json`."""
    recorded = json.loads((SAMPLES / f"{name}.json").read_text())
    request, response = recorded["request"], recorded["response"]
    return Exchange(
        request["method"],
        request["path"],
        request["body"],
        response["status"],
        response["headers"],
        response["body"],
    )


async def ask(
    session: aiohttp.ClientSession, root: str, recorded: Exchange, *, path: str = "", body: Any = None
) -> SandboxAnswer:
    """Send the recorded request, or one changed in path or body, and return the answer."""
    url = URL(root + (path or recorded.path), encoded=True)
    given = recorded.body if body is None else body
    async with session.request(recorded.method, url, json=given) as response:
        return SandboxAnswer(response.status, dict(response.headers), await response.text())


def assert_alike(recorded: Exchange, answer: SandboxAnswer) -> None:
    """Assert that status, headers and body are those recorded, but for what differs from run to run."""
    assert answer.status == recorded.status, answer.text
    expected, actual = _lowered(recorded.headers), _lowered(answer.headers)
    assert set(actual) == set(expected)
    for name in _VALUED_HEADERS:
        assert actual.get(name) == expected.get(name)
    assert list(differences(parsed(recorded), parsed(answer))) == []


def differences(expected: Any, actual: Any, path: str = "$") -> Iterator[str]:
    """Name every place where the values differ, or for volatile fields the types do."""
    if type(expected) is not type(actual):
        yield f"{path}: {type(expected).__name__} became {type(actual).__name__}: {actual!r}"
    elif isinstance(expected, dict):
        for key in expected.keys() ^ actual.keys():
            yield f"{path}.{key}: {'missing' if key in expected else 'new'}"
        for key in expected.keys() & actual.keys():
            if key in VOLATILE:
                yield from differences(type(expected[key])(), type(actual[key])(), f"{path}.{key}")
            else:
                yield from differences(expected[key], actual[key], f"{path}.{key}")
    elif isinstance(expected, list):
        if len(expected) != len(actual):
            yield f"{path}: {len(expected)} items became {len(actual)}"
        for index, (one, other) in enumerate(zip(expected, actual, strict=False)):
            yield from differences(one, other, f"{path}[{index}]")
    elif expected != actual:
        yield f"{path}: {expected!r} became {actual!r}"


def parsed(message: Exchange | SandboxAnswer) -> Any:
    """Return a body's JSON, a list of it for a watch, or the text when it is none."""
    if not message.text or message.headers.get("Content-Type") != "application/json":
        return message.text
    lines = message.text.splitlines()
    if lines[0].startswith('{"type":'):
        return [json.loads(line) for line in lines]
    return json.loads(message.text)


def _lowered(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items() if name.lower() not in _UNCOMPARED_HEADERS}
