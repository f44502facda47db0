"""Bad input: files in every odd state, and Pods that an API server takes and no user means."""

import asyncio
import os
import resource
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import strategies as st

from support.cluster import NAMESPACE, Cluster

HUGE = 5 << 20  # bytes, more than is read


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _content(content: bytes) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        _clear(path)
        path.write_bytes(content)

    return put


def _directory(path: Path) -> None:
    _clear(path)
    path.mkdir()


def _link(path: Path, target: str) -> None:
    _clear(path)
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    _clear(path)
    os.mkfifo(path)


def _huge(path: Path) -> None:
    _clear(path)
    path.write_bytes(b"")
    os.truncate(path, HUGE)


def _half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _not_ascii(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"\xc3" + content[middle + 1 :])


def _der(path: Path) -> None:
    lines = [line for line in path.read_bytes().splitlines() if not line.startswith(b"-----")]
    try:
        path.write_bytes(b64decode(b"".join(lines), validate=True))
    except ValueError:  # it was no PEM
        path.write_bytes(b"\x30\x82" + path.read_bytes())


def _swapped(path: Path) -> None:
    path.write_bytes((path.parent / ("crt" if path.name == "key" else "key")).read_bytes())


ODD: dict[str, Callable[[Path], None]] = {
    "absent": _clear,
    "empty": _content(b""),
    "blank": _content(b" \n\n"),
    "binary": _content(bytes(range(256)) * 4),
    "half-written": _half,
    "not ASCII": _not_ascii,
    "DER": _der,
    "swapped": _swapped,
    "a directory": _directory,
    "a dangling link": lambda path: _link(path, "/nowhere/at/all"),
    "a link to itself": lambda path: _link(path, path.name),
    "a pipe": _pipe,
    "endless": lambda path: _link(path, "/dev/zero"),
    "huge": _huge,
}


def restore(path: Path, content: bytes) -> None:
    """Put a regular file in place again."""
    _clear(path)
    path.write_bytes(content)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a file system that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


PHASES = ("Running", "Running", "Running", "Unknown", "Pending", "Succeeded", "Failed")
AT_ONCE = 8  # requests in flight


@dataclass(frozen=True)
class OddPod:
    """The fields that a test gives one Pod."""

    phase: str
    ips: tuple[str, ...]
    annotations: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        """True if it asks to be scraped, correctly or not."""
        is_annotated = self.annotations.get("prometheus.io/scrape") == "true"
        return is_annotated and self.phase in ("Running", "Unknown")


# An API server takes any UTF-8 text as the value of an annotation; surrogates cannot be sent at all.
_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
_path = _text | st.sampled_from(
    [
        "/m",
        "m?a=1&b=2",
        "/m?a=1&a=2",
        "?",
        "/%zz?%41=%00",
        "/m#f",
        "/é?ü=ß",
        "//",
        "/" + "x" * 511,
        "/m?" + "a" * 120,
    ]
)
_port = (
    _text | st.integers(-1, 70000).map(str) | st.sampled_from(["web", " 80 ", "٣", "1e3", "0x50", "00080"])
)
_param_name = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,20}[A-Za-z0-9])?", fullmatch=True)
_ips = st.lists(st.ip_addresses(v=4), min_size=0, max_size=1) | st.tuples(st.ip_addresses(v=6))


@st.composite
def odd_pods(draw: st.DrawFn) -> OddPod:
    """Draw a Pod; most are annotated to be scraped."""
    annotations = {"prometheus.io/scrape": draw(st.sampled_from(["true"] * 6 + ["false", "True", "1", ""]))}
    optional = {
        "path": _path,
        "port": _port,
        "scheme": st.sampled_from(["http", "https", "HTTPS", "", "ftp"]),
    }
    for name, values in optional.items():
        if draw(st.booleans()):
            annotations[f"prometheus.io/{name}"] = draw(values)
    for name, value in draw(st.dictionaries(_param_name, _text, max_size=3)).items():
        annotations[f"prometheus.io/param-{name}"] = value
    names = st.sampled_from(["web", "metrics", "prom", "http-metrics", "debug"])
    ports = draw(st.dictionaries(names, st.integers(1, 65535), max_size=3))
    ips = tuple(str(ip) for ip in draw(_ips))
    return OddPod(draw(st.sampled_from(PHASES)), ips, annotations, ports)


async def add_odd_pods(cluster: Cluster, pods: Sequence[OddPod]) -> set[str]:
    """Create the Pods as `odd-<number>` and return the service IDs of those that ask to be scraped."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def add(number: int, pod: OddPod) -> None:
        async with slots:
            await cluster.add_pod(
                f"odd-{number}", phase=pod.phase, ips=pod.ips, annotations=pod.annotations, ports=pod.ports
            )

    await asyncio.gather(*(add(number, pod) for number, pod in enumerate(pods)))
    return {f"pod--{NAMESPACE}--odd-{number}" for number, pod in enumerate(pods) if pod.asks}
