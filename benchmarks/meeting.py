"""Seconds in which N forked processes meet on loopback:  python -m benchmarks.meeting [N ...]"""

import os
import resource
import socket
import sys
import time

from vit_nabirds.parallel.group import ProcessGroup


def meet(count: int) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for number in range(1, count):
        if os.fork() == 0:
            other = ProcessGroup(number, count)
            other.meet("127.0.0.1", port, timeout=60)
            other.leave()
            os._exit(0)
    first, start = ProcessGroup(0, count), time.monotonic()
    first.meet("127.0.0.1", port, timeout=60)
    seconds = time.monotonic() - start
    for _ in range(1, count):
        os.wait()
    return seconds


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for count in map(int, sys.argv[1:] or ["64", "256", "1000"]):
        print(f"{count} processes met in {meet(count):.1f} s", flush=True)
