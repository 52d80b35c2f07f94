"""A line with a distance: a TCP port before a Unix socket, each way late by the same time.

    python -m bench.delay SOCKET ONE_WAY_MS   → its port, then it serves until it is ended

What is late is each block by itself: any number are under way at once, as on a real line. A thread
a way, because a thread's sleep is true to some 0.1 ms; event loops count in whole milliseconds,
rounded up, which is as much as the distance itself.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time


def carry(source: socket.socket, target: socket.socket, late_s: float) -> None:
    """Pass on what comes, late, and then its end."""
    held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def deliver() -> None:
        data = b"-"
        while data:
            due, data = held.get()
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    def deliver_while_it_holds() -> None:
        with contextlib.suppress(OSError):
            deliver()

    threading.Thread(target=deliver_while_it_holds, daemon=True).start()
    data = b"-"
    while data:
        try:
            data = source.recv(65536)
        except OSError:
            data = b""
        held.put((time.monotonic() + late_s, data))


def main(path: str, one_way_s: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as port:
        print(port.getsockname()[1], flush=True)
        while True:
            near, _ = port.accept()
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(path)
            except OSError:
                near.close()
                continue
            for way in ((near, far), (far, near)):
                threading.Thread(target=carry, args=(*way, one_way_s), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) / 1000)
