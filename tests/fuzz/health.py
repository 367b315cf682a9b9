"""Polls /health twenty times a second in a process of its own, and says how late the answers were.

`python -m tests.fuzz.health PORT`, until its standard input ends; then one line of JSON. In a process of its own, so
that whoever makes the load does not make its clock late.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time

INTERVAL_S = 0.05


def main() -> int:
    """Poll until told to stop."""
    times_s, num_failed = list[float](), 0
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30)
    next_s = time.monotonic()
    # At least once, however soon it is told to stop.
    while not times_s or not select.select([sys.stdin], [], [], max(next_s - time.monotonic(), 0.0))[0]:
        begin_s = time.monotonic()
        try:
            connection.request("GET", "/health")
            num_failed += connection.getresponse().read()[:1] != b"{"
        except (OSError, http.client.HTTPException):
            connection.close()
            num_failed += 1
        times_s.append(time.monotonic() - begin_s)
        next_s = max(next_s + INTERVAL_S, begin_s)
    times_s.sort()
    found = {
        "num_polls": len(times_s),
        "num_failed": num_failed,
        "p50_ms": round(times_s[len(times_s) // 2] * 1e3, 2),
        "p99_ms": round(times_s[len(times_s) * 99 // 100] * 1e3, 2),
        "max_ms": round(times_s[-1] * 1e3, 2),
        "num_over_100_ms": sum(each > 0.1 for each in times_s),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
