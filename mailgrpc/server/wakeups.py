"""Waking the event loop once for many events of gRPC, instead of once for each.

gRPC's asyncio has a thread that waits for what happens. It puts each event into a queue and one byte
into a socket; the loop, woken by that, takes one byte and then everything that is in the queue. A
unary call has four events, so on a busy server most of the bytes wake the loop for nothing, for
two system calls and a turn each (docs/decisions/0027).

So gRPC is given a pair of sockets in which one end reads all bytes that are there, and the other does
not wait for room and has little. No event is missed by that, as long as one loop takes them all: an
event is in the queue before its byte is sent, the queue is emptied after bytes were taken, and a byte
for which there is no room comes behind others that still have to be taken.

The pair is handed over where gRPC asks Python for one, when its asyncio begins. A version that does
without, or asks otherwise, wakes the loop as it likes; tests/server/test_wakeups.py would tell.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from typing import Any

from grpc.aio import init_grpc_aio, shutdown_grpc_aio

_ALL = 4096
_LEAST = 1  # Linux makes it some kilobytes, which single bytes fill with five to ten

_socketpair = socket.socketpair


class Reader(socket.socket):
    """A socket that reads as much as there is, however little is asked for."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Up to 4 kB."""
        return super().recv(max(size, _ALL), flags)


def _pair(*given: Any, **named: Any) -> tuple[socket.socket, socket.socket]:
    taker, sender = _socketpair(*given, **named)
    if given or named:  # not the pair that is meant
        return taker, sender
    sender.setblocking(False)
    if sys.platform == "linux":
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LEAST)
    return Reader(fileno=taker.detach()), sender


@contextlib.contextmanager
def gathered() -> Iterator[None]:
    """Within it gRPC wakes the running loop so. To be entered before gRPC's asyncio is used."""
    socket.socketpair = _pair
    try:
        init_grpc_aio()
    finally:
        socket.socketpair = _socketpair
    try:
        yield
    finally:
        shutdown_grpc_aio()
