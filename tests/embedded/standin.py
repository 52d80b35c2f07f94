"""Stands in for `mailgrpc serve`, `work` and `migrate`, which have tests of their own.

`standin.py serve` listens on MAILGRPC_LISTEN and says so; `work` says that it is ready; both end
on SIGTERM. STANDIN_FAIL=name makes that one fail at its start; STANDIN_STUBBORN=name makes that one
deaf to SIGTERM.
"""

import os
import signal
import socket
import sys
import threading

ended = threading.Event()


def main(name: str) -> int:
    if os.environ.get("STANDIN_STUBBORN") == name:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    print(f"{name} with {os.environ.get('MAILGRPC_CHANNEL_URL', 'no channel')}", flush=True)
    if os.environ.get("STANDIN_FAIL") == name:
        print(f"{name}: cannot listen on 127.0.0.1:50051: Address already in use", flush=True)
        return 1
    if name == "migrate":
        return 0
    ready = ""
    if name == "serve":
        host, _, port = os.environ["MAILGRPC_LISTEN"].rpartition(":")
        listener = socket.create_server((host, int(port)))
        ready = f" {host}:{listener.getsockname()[1]}"
    fd = int(os.environ["MAILGRPC_READY_FD"])
    os.write(fd, f"ready{ready}\n".encode())
    os.close(fd)
    while not ended.wait(0.05):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
