"""The longest wait of a request to a server: asks ADDRESS for /healthz every 20 ms until a line or the end of stdin.

Prints the longest answer, and as the machine's own share the longest that a sleep of 20 ms came late here.
"""

import http.client
import json
import select
import sys
import time

EVERY = 0.02


def main() -> None:
    server = http.client.HTTPConnection(sys.argv[1], timeout=30)
    waits: list[float] = []
    late: list[float] = []
    while not select.select([sys.stdin], [], [], 0)[0]:
        before = time.perf_counter()
        server.request("GET", "/healthz")
        server.getresponse().read()
        answered = time.perf_counter()
        waits.append(answered - before)
        time.sleep(EVERY)
        late.append(time.perf_counter() - answered - EVERY)
    waits.sort()
    said = {
        "longest": waits[-1],
        "p99": waits[len(waits) * 99 // 100],
        "late": max(late),
        "asked": len(waits),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
