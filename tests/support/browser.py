"""A headless Chromium for tests, driven by the DevTools protocol over its websocket.

`chromium` on PATH counts, otherwise the one `scripts/fetch-real-servers` left in `.cache/real`; where there is
none the test is skipped with the reason, or fails when `REQUIRE_REAL_SERVERS=1`.
"""

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from support.processes import Program
from support.real_servers import CACHE, unavailable
from support.waiting import PATIENCE, until

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
START_WITHIN = 2 * PATIENCE  # seconds until the browser listens


def _command() -> tuple[str, dict[str, str]]:
    """Return the browser and its environment."""
    environment = dict(os.environ)
    if on_path := shutil.which("chromium"):
        return on_path, environment
    tree = CACHE / "chromium"
    if not (tree / ".complete").is_file():
        unavailable("no chromium on PATH and none in .cache/real (scripts/fetch-real-servers)")
    libraries = [str(path) for one in tree.glob("usr/lib/*-linux-gnu*") for path in (one, one / "pulseaudio")]
    environment["LD_LIBRARY_PATH"] = ":".join(libraries)
    return str(tree / "usr/lib/chromium/chromium"), environment


class Page:
    """One tab; `problems` gathers what its console complains of, a broken policy included."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.problems: list[str] = []

    async def listen(self) -> None:
        """Take answers and events until the tab closes."""
        async for message in self._socket:
            told = message.json()
            if (number := told.get("id")) in self._waiting:
                self._waiting.pop(number).set_result(told)
            elif told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.problems.append(told["params"]["entry"]["text"])
            elif told.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(told["params"]["exceptionDetails"]))
            elif told.get("method") == "Runtime.consoleAPICalled" and told["params"]["type"] == "error":
                self.problems.append(str(told["params"]["args"]))

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; an AssertionError shows what the browser refuses."""
        number = next(self._ids)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(PATIENCE):
            told = await answer
        assert "error" not in told, (method, told)
        result: dict[str, Any] = told["result"]
        return result

    async def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page, by value; a promise is waited for."""
        told = await self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        try:
            await until(lambda: self.evaluate(expression))
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"not so: {expression}; {self.problems}; {text[:2000]}") from None

    async def open(self, url: str) -> None:
        """Open an address and wait until it is loaded."""
        await self.command("Page.navigate", url=url)
        await self.wait(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    async def press(self, key: str, **modifiers: Any) -> None:
        """Press and release a key, in whatever has the focus."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            await self.command(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text, **modifiers
            )

    async def look(self, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Be a screen of this size, with this colour scheme."""
        await self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        await self.command(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    async def screenshot(self) -> bytes:
        """Return a PNG of what is seen."""
        return base64.b64decode((await self.command("Page.captureScreenshot", format="png"))["data"])


class _Browser:
    """A browser with a profile of its own; each test has a tab."""

    def __init__(self, flags: Sequence[str]) -> None:
        binary, environment = _command()
        self.folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        home = self.folder.name
        profile = Path(home, "profile")
        environment |= {"HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home}
        command = [binary, *FLAGS, f"--user-data-dir={profile}", *flags, "about:blank"]
        self.program = Program(command, Path(home, "log"), environment=environment)
        self._told = profile / "DevToolsActivePort"

    @property
    def url(self) -> str:
        """The address of its DevTools; empty while it starts."""
        told = self._told.read_text().split() if self._told.is_file() else []
        return f"http://127.0.0.1:{told[0]}" if told else ""

    async def start(self) -> None:
        """Start it and wait until it listens."""

        async def is_listening() -> bool:
            return bool(self.url)

        self.program.launch()
        await self.program.ready(is_listening, START_WITHIN)

    async def end(self) -> None:
        """End it and remove its profile."""
        await self.program.stop(signal.SIGKILL)
        self.folder.cleanup()


_browsers: dict[Sequence[str], _Browser] = {}


@contextlib.contextmanager
def shared_browsers() -> Iterator[None]:
    """Let pages with the same flags share a browser, which ends with the block."""
    yield
    while _browsers:
        _, browser = _browsers.popitem()
        asyncio.run(browser.end())


@contextlib.asynccontextmanager
async def browser_page(*flags: str) -> AsyncIterator[Page]:
    """Hand out a new tab of the browser with these flags."""
    if flags not in _browsers:
        _browsers[flags] = _Browser(flags)
        await _browsers[flags].start()
    url = _browsers[flags].url
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{url}/json/new?about:blank") as response:
            tab = await response.json()
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = Page(socket)
            listening = asyncio.create_task(page.listen())
            for domain in ("Page", "Runtime", "Log"):
                await page.command(f"{domain}.enable")
            try:
                yield page
            finally:
                listening.cancel()
        async with session.get(f"{url}/json/close/{tab['id']}"):
            pass
