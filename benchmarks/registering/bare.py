"""The least work that has to be done, without any of the program: the limit that its figures are compared with.

`list URL CA TOKEN` reads all Pods in pages with gzip and throws them away; `transactions ADDRESS FILE CONCURRENCY`
and `puts ADDRESS FILE CONCURRENCY` send the bodies of a file, one a line, the first of them before the clock starts.
Each prints its seconds as JSON, without the interpreter's start.
"""

import asyncio
import re
import ssl
import sys
import time
from pathlib import Path

import aiohttp
import msgspec
import uvloop

_PAGE = 500
_CONTINUE = re.compile(rb'"continue":"([^"]+)"')
_HEAD = 1000  # bytes of a list in which its own metadata is
_READ = 256 * 1024


async def read_list(url: str, ca: str, token: str) -> dict[str, float]:
    context = ssl.create_default_context(cafile=ca)
    headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "gzip"}
    started = time.perf_counter()
    size, following = 0, ""
    async with aiohttp.ClientSession(headers=headers, read_bufsize=_READ) as session:
        while True:
            params = {"limit": str(_PAGE), **({"continue": following} if following else {})}
            async with session.get(f"{url}/api/v1/pods", params=params, ssl=context) as answer:
                answer.raise_for_status()
                page = await answer.read()
            size += len(page)
            found = _CONTINUE.search(page, 0, _HEAD)
            if found is None:
                return {"seconds": time.perf_counter() - started, "bytes": size}
            following = found[1].decode()


async def send_all(url: str, bodies: list[bytes], concurrency: int) -> dict[str, float]:
    left = iter(bodies)
    # As the registrar does: compressing answers costs Consul more than it saves here.
    async with aiohttp.ClientSession(headers={"Accept-Encoding": "identity"}) as session:

        async def put(body: bytes) -> None:
            async with session.put(url, data=body) as answer:
                if answer.status != 200:
                    raise RuntimeError(await answer.text())
                await answer.read()

        async def send() -> None:
            for body in left:
                await put(body)

        await put(next(left))
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(send())
        return {"seconds": time.perf_counter() - started, "sent": len(bodies)}


def lines_of(file: str) -> list[bytes]:
    return Path(file).read_bytes().splitlines()


def main() -> None:
    match sys.argv[1:]:
        case ["list", url, ca, token]:
            work = read_list(url, ca, token)
        case ["transactions", address, file, concurrency]:
            work = send_all(f"http://{address}/v1/txn", lines_of(file), int(concurrency))
        case ["puts", address, file, concurrency]:
            work = send_all(f"http://{address}/v1/agent/service/register", lines_of(file), int(concurrency))
        case _:
            sys.exit(__doc__)
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(work)))


if __name__ == "__main__":
    main()
