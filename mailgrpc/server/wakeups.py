"""Waking the event loop once for many events of gRPC, instead of once for each.

gRPC's asyncio has a thread that waits for what happens. It puts each event into a queue and one byte
into a socket; the loop, woken by that, takes one byte and then everything that is in the queue. A
unary call has four events, so on a busy server most of the bytes wake the loop for nothing, for
two system calls and a turn each (docs/decisions/0027).

So gRPC is given a pair of sockets in which one end reads all bytes that are there, and the other does
not wait for room and has little. Nothing is lost by that: an event is in the queue before its byte
is sent, the queue is emptied after bytes were taken, and a byte for which there is no room comes behind
others that still have to be taken.

The pair is handed over where gRPC asks Python for one, when its asyncio begins. Were it to do without
some day, nothing would change but the number of turns; tests/server/test_wakeups.py would tell.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from grpc.aio import init_grpc_aio, shutdown_grpc_aio

_ALL = 4096
_LEAST = 1  # the kernel makes it some kilobytes, which single bytes fill with five to ten


class Reader(socket.socket):
    """A socket that reads as much as there is, however little is asked for."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Up to 4 kB."""
        return super().recv(max(size, _ALL), flags)


def _pair() -> tuple[Reader, socket.socket]:
    theirs, sender = _socketpair()
    sender.setblocking(False)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LEAST)
    return Reader(fileno=theirs.detach()), sender


_socketpair = socket.socketpair


@contextlib.contextmanager
def gathered() -> Iterator[None]:
    """Within it gRPC wakes the running loop so. Before gRPC's asyncio is used otherwise."""
    socket.socketpair = _pair  # type: ignore[assignment]
    try:
        init_grpc_aio()
    finally:
        socket.socketpair = _socketpair
    try:
        yield
    finally:
        shutdown_grpc_aio()
