"""A wire of so many bits a second and so much delay between two network namespaces, which this process forwards.

`python -m tests.slow_wire --rate 50e6 --delay 0.01 NAMESPACE=ADDRESS NAMESPACE=ADDRESS`, as root. Says "up", and
forwards until its standard input ends. A TUN device in each namespace; either direction is a wire of its own. Kernels
with netem need none of it; that of a container often has none.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import itertools
import os
import select
import struct
import subprocess
import sys
import time

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI, _CLONE_NEWNET = 0x400454CA, 1, 0x1000, 0x40000000
_MTU = 16_000


def main() -> None:
    """Forwards packets."""
    parser = argparse.ArgumentParser(prog="tests.slow_wire", description=__doc__)
    parser.add_argument("--rate", type=float, required=True, help="bits a second")
    parser.add_argument("--delay", type=float, required=True, help="seconds")
    parser.add_argument("ends", nargs=2, metavar="NAMESPACE=ADDRESS")
    args = parser.parse_args()
    here, there = (_open_end(*end.split("=")) for end in args.ends)
    other_end = {here: there, there: here}
    print("up", flush=True)
    free = dict.fromkeys(other_end, 0.0)
    """When the wire from each end has carried what was sent into it."""
    queue: list[tuple[float, int, int, bytes]] = []
    number = itertools.count()
    stdin = sys.stdin.fileno()
    while True:
        wait = max(queue[0][0] - time.monotonic(), 0.0) if queue else None
        readable, _, _ = select.select([here, there, stdin], [], [], wait)
        if stdin in readable:
            return
        now = time.monotonic()
        for end in readable:
            packet = os.read(end, 1 << 16)
            free[end] = max(now, free[end]) + 8 * len(packet) / args.rate
            heapq.heappush(queue, (free[end] + args.delay, next(number), other_end[end], packet))
        while queue and queue[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(queue)
            os.write(end, packet)


def _open_end(namespace: str, address: str) -> int:
    """File descriptor of a TUN device that lies in a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    home, there = (os.open(path, os.O_RDONLY) for path in ("/proc/self/ns/net", f"/run/netns/{namespace}"))
    if libc.setns(there, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"network namespace {namespace}")
    try:
        end = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", b"wire", _IFF_TUN | _IFF_NO_PI))
        for command in (
            ["addr", "add", f"{address}/24", "dev", "wire"],
            ["link", "set", "wire", "mtu", str(_MTU), "txqueuelen", "2000", "up"],
            ["link", "set", "lo", "up"],
        ):
            subprocess.run(["ip", *command], check=True)
    finally:
        libc.setns(home, _CLONE_NEWNET)
    return end


if __name__ == "__main__":
    main()
