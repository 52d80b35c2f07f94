"""One Enqueue a call, over HTTP/2 frames written by hand.

    python -m bench.load.calls TARGET (--seconds S | --messages M) [--concurrency N | --rate R]
        [--mode M] [--connections C] [--acknowledged FILE]

Why by hand. gRPC's own Python client costs as much a call as the server that it measures, and on a
machine of two cores that is half of the result; h2load is cheap and sends one body for ever. A
unary call is two frames out and a few back, so all of them are made before the clock starts: a call
costs this process about 15 µs.

What counts as acknowledged: a DATA frame (gRPC sends none with an error) and then the end of its
stream. Closed loops measure the rate. An open loop starts calls when they are due, whatever became
of those before, and counts latency from that moment, so that a server that stands still is charged
for all who would have come. A closed loop ends after some seconds, or after so many messages.
`--acknowledged` writes when each was acknowledged, for rows that follow a mail further.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import time
from pathlib import Path

import uvloop

from bench.load.acknowledged import write_acknowledged
from bench.load.mails import request

PREPARED_A_SECOND = 16000
CONNECTIONS = 4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_WINDOW_BYTES = 1 << 30


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _text(text: str) -> bytes:
    raw = text.encode()
    assert len(raw) < 127
    return bytes([len(raw)]) + raw


def header_block(target: str, method: str) -> bytes:
    """Literals that enter no table (RFC 7541 section 6.2.2), so that each call's are the same."""
    return (
        b"\x83\x86"  # POST, http
         b"\x04" + _text(method)
        + b"\x01" + _text(target)
        + b"\x0f\x10" + _text("application/grpc")
        + b"\x00" + _text("te") + _text("trailers")
    )  # fmt: skip


class Connection(asyncio.Protocol):
    """One connection; `done(connection, latency or None, recipient)` is called for each answer."""

    def __init__(self, headers: bytes, done) -> None:
        self._headers = headers
        self._done = done
        self._next = 1
        self._window = 65535  # of the connection; a call is smaller than a stream's own
        self._held: list[tuple[int, bytes]] = []
        self._begun: dict[int, tuple[float, str]] = {}
        self._answered: set[int] = set()
        self._buffer = b""
        self.failed = 0
        self.lost = False

    def connection_made(self, transport) -> None:
        self._transport = transport
        settings = struct.pack(">HI", 4, _WINDOW_BYTES) + struct.pack(">HI", 2, 0)
        transport.write(
            _PREFACE
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW, 0, 0, struct.pack(">I", _WINDOW_BYTES - 65535))
        )

    def connection_lost(self, error) -> None:  # noqa: ARG002
        self.lost = True

    def start(self, body: bytes, since: float, recipient: str) -> None:
        """Make a call. `body` is a whole gRPC message with its prefix."""
        stream, self._next = self._next, self._next + 2
        self._begun[stream] = since, recipient
        if self._held or self._window < len(body):
            self._held.append((stream, body))
        else:
            self._send(stream, body)

    def _send(self, stream: int, body: bytes) -> None:
        self._window -= len(body)
        self._transport.write(
            _frame(_HEADERS, 4, stream, self._headers) + _frame(_DATA, 1, stream, body)
        )

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        at, end = 0, len(buffer)
        while end - at >= 9:
            length = int.from_bytes(buffer[at : at + 3], "big")
            if end - at < 9 + length:
                break
            kind, flags = buffer[at + 3], buffer[at + 4]
            stream = int.from_bytes(buffer[at + 5 : at + 9], "big")
            if kind == _DATA:
                self._answered.add(stream)
            elif kind == _HEADERS:
                if flags & 1:
                    self._end(stream)
            elif kind == _RST:
                self._answered.discard(stream)
                self._end(stream)
            elif kind == _WINDOW and stream == 0:
                self._window += int.from_bytes(buffer[at + 9 : at + 13], "big")
                while self._held and self._window >= len(self._held[0][1]):
                    self._send(*self._held.pop(0))
            elif kind == _SETTINGS and not flags & 1:
                self._transport.write(_frame(_SETTINGS, 1, 0, b""))
            elif kind == _PING and not flags & 1:
                self._transport.write(_frame(_PING, 1, 0, buffer[at + 9 : at + 17]))
            elif kind == _GOAWAY:
                self._transport.close()
            at += 9 + length
        self._buffer = buffer[at:]

    def _end(self, stream: int) -> None:
        if stream not in self._begun:
            return
        since, recipient = self._begun.pop(stream)
        if stream in self._answered:
            self._answered.discard(stream)
            self._done(self, time.perf_counter() - since, recipient)
        else:
            self.failed += 1
            self._done(self, None, recipient)


class Load:
    """Calls over a few connections; what came of them."""

    def __init__(self, target: str, bodies: list[tuple[bytes, str]]) -> None:
        self._target = target
        self._bodies = bodies
        self.latencies: list[float] = []
        self.acknowledged: list[tuple[str, float]] = []
        self.failed = 0
        self._connections: list[Connection] = []
        self._more = False
        self._under_way = 0
        self._idle = asyncio.Event()

    async def connect(
        self, connections: int = CONNECTIONS, method: str = "/mailgrpc.v1.MailService/Enqueue"
    ) -> None:
        host, _, port = self._target.rpartition(":")
        headers = header_block(self._target, method)
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            _, connection = await loop.create_connection(
                lambda: Connection(headers, self._done), host, int(port)
            )
            self._connections.append(connection)

    def _start(self, connection: Connection, since: float) -> None:
        self._under_way += 1
        body, recipient = self._bodies.pop()
        connection.start(body, since, recipient)

    def _done(self, connection: Connection, latency: float | None, recipient: str) -> None:
        self._under_way -= 1
        if latency is None:
            self.failed += 1
        else:
            self.latencies.append(latency)
            self.acknowledged.append((recipient, time.time()))
        if self._more and self._bodies:
            self._start(connection, time.perf_counter())
        elif not self._under_way:
            self._idle.set()

    async def closed(self, seconds: float, concurrency: int) -> float:
        """As fast as answers come, all bodies where `seconds` is 0; the seconds that it took."""
        began = time.perf_counter()
        self._more = True
        for number in range(min(concurrency, len(self._bodies))):
            self._start(self._connections[number % len(self._connections)], began)
        if seconds:
            await asyncio.sleep(seconds)
            self._more = False
            await self._finished()
        else:
            async with asyncio.timeout(300):
                await self._idle.wait()
        return time.perf_counter() - began

    async def open(self, seconds: float, rate: float) -> float:
        """So many a second, whatever the answers do."""
        began = time.perf_counter()
        for number in range(int(seconds * rate)):
            due = began + number / rate
            while (left := due - time.perf_counter()) > 0:
                # Calls that are due within a millisecond start together: timers are no finer.
                await asyncio.sleep(max(left, 0.001))
            if not self._bodies:
                break
            self._start(self._connections[number % len(self._connections)], due)
        await self._finished()
        return time.perf_counter() - began

    async def _finished(self) -> None:
        if self._under_way:
            self._idle.clear()  # an open loop has been idle before
            async with asyncio.timeout(60):
                await self._idle.wait()


def prefixed(message: bytes) -> bytes:
    """A gRPC message as it stands in DATA: not compressed, and how long."""
    return b"\0" + struct.pack(">I", len(message)) + message


def prepared(mode: int) -> tuple[bytes, str]:
    """A request, ready to be written, and its recipient."""
    made = request(mode=mode)
    return prefixed(made.SerializeToString()), made.message.to[0].address


async def main(options: argparse.Namespace) -> None:
    spare = int(options.seconds * (options.rate or PREPARED_A_SECOND)) + 1000
    bodies = [prepared(options.mode) for _ in range(options.messages or spare)]
    load = Load(options.target, bodies)
    await load.connect(options.connections)
    cpu = time.process_time()
    if options.rate:
        took = await load.open(options.seconds, options.rate)
    else:
        took = await load.closed(options.seconds, options.concurrency)
    cpu = time.process_time() - cpu
    found = sorted(load.latencies)
    if options.acknowledged:
        write_acknowledged(options.acknowledged, load.acknowledged)
    print(
        json.dumps(
            {
                "messages": len(found),
                "rate": len(found) / took,
                "failed": load.failed,
                "first_at": min(at for _, at in load.acknowledged),
                "ran_out": not bodies,
                "generator_cpu": cpu / took,
                "p50_ms": found[len(found) // 2] * 1e3,
                "p99_ms": found[int(len(found) * 0.99)] * 1e3,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--messages", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--mode", type=int, default=0)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--acknowledged", type=Path)
    uvloop.run(main(parser.parse_args()))
