"""Where the mails arrive: an SMTP server that takes everything and keeps a ledger of it.

    python -m bench.sink   → prints two ports (SMTP, ledger), then serves until its input is closed

It stands for the relay of the world outside, for mailgrpc and for Postfix alike, so it must not be
what limits them: bytes are searched, not lines awaited, and a mail costs it two buffers and one
answer to each. It offers PIPELINING and no TLS.

The ledger has, for each recipient of each mail, the time of its final dot. Recipients are random,
so that an address names its mail; an address that stands there twice is a mail sent twice. `Sink`
asks for it over the second port: `count` while a round goes on, `take` when it is over, which
empties it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import uvloop

from bench.family import tree_cpu_s

_END = b"\r\n.\r\n"
_HELLO = b"250-sink\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 52428800\r\n"
_OK = b"250 OK\r\n"


class _Ledger:
    def __init__(self) -> None:
        self.entries: list[tuple[bytes, float]] = []

    def text(self) -> bytes:
        return b"".join(b"%s %.6f\n" % entry for entry in self.entries)


class _Smtp(asyncio.Protocol):
    """One connection. `_rest` is what is not understood yet: part of a line or of the final dot."""

    def __init__(self, ledger: _Ledger) -> None:
        self._ledger = ledger
        self._rest = b""
        self._in_content = False
        self._leaving = False
        self._recipients: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(b"220 sink\r\n")

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        at = 0
        answers = []
        while True:
            if self._in_content:
                end = data.find(_END, at)
                if end < 0:
                    at = max(at, len(data) - len(_END) + 1)
                    break
                at = end + len(_END)
                now = time.time()
                self._ledger.entries += [(recipient, now) for recipient in self._recipients]
                self._recipients = []
                self._in_content = False
                answers.append(_OK)
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            answers.append(self._command(data[at:end]))
            # The line break of DATA may be the first of an empty mail's final dot.
            at = end if self._in_content else end + 2
        self._rest = data[at:]
        if answers:
            self._transport.write(b"".join(answers))
        if self._leaving:  # after the answers: Postfix says QUIT in one breath with the dot
            self._transport.close()

    def _command(self, line: bytes) -> bytes:
        verb = line[:4].upper()
        if verb == b"RCPT":
            self._recipients.append(line[line.index(b"<") + 1 : line.index(b">")])
        elif verb == b"MAIL" or verb == b"RSET":
            self._recipients = []
        elif verb == b"DATA":
            self._in_content = True
            return b"354 go on\r\n"
        elif verb == b"EHLO":
            return _HELLO
        elif verb == b"QUIT":
            self._leaving = True
        return _OK


class _Asked(asyncio.Protocol):
    """The second port: `count` and `take`."""

    def __init__(self, ledger: _Ledger) -> None:
        self._ledger = ledger

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if data == b"count\n":
            self._transport.write(b"%d\n" % len(self._ledger.entries))
        elif data == b"take\n":
            self._transport.write(self._ledger.text() + b"\n")
            self._ledger.entries = []


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    ledger = _Ledger()
    smtp = await loop.create_server(lambda: _Smtp(ledger), "127.0.0.1", 0, backlog=512)
    asked = await loop.create_server(lambda: _Asked(ledger), "127.0.0.1", 0)
    print(*(s.sockets[0].getsockname()[1] for s in (smtp, asked)), flush=True)
    await asyncio.to_thread(sys.stdin.read)


@dataclass(frozen=True, slots=True)
class Taken:
    """What the ledger held."""

    mails: int
    at: dict[str, float]
    """By recipient, when the final dot came (Unix time)."""

    @property
    def last_at(self) -> float:
        return max(self.at.values(), default=0.0)


class Sink:
    """The sink as the rows see it."""

    def __init__(self, pid: int, port: int, ledger_port: int) -> None:
        self.pid = pid
        self.port = port
        self._socket = socket.create_connection(("127.0.0.1", ledger_port))
        self._answers = self._socket.makefile("rb")

    def count(self) -> int:
        """How many mails came since the last `take`."""
        self._socket.sendall(b"count\n")
        return int(self._answers.readline())

    def wait(self, mails: int, *, stalled_s: float = 20.0) -> None:
        """Return when so many came, or when none came for so long: the books will tell."""
        seen, since = -1, time.monotonic()
        while (count := self.count()) < mails:
            if count != seen:
                seen, since = count, time.monotonic()
            elif time.monotonic() - since > stalled_s:
                return
            time.sleep(0.02)

    def take(self) -> Taken:
        """What came since the last `take`."""
        self._socket.sendall(b"take\n")
        mails, at = 0, {}
        while (line := self._answers.readline()) != b"\n":
            recipient, _, when = line.decode().partition(" ")
            at[recipient] = float(when)
            mails += 1
        return Taken(mails, at)

    def cpu_s(self) -> float:
        """Processor seconds that it used so far."""
        return tree_cpu_s(self.pid)


@contextlib.contextmanager
def sink() -> Iterator[Sink]:
    """A sink of one's own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.sink"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        smtp, ledger = map(int, process.stdout.readline().split())
        yield Sink(process.pid, smtp, ledger)
    finally:
        process.stdin.close()
        process.wait(10)


if __name__ == "__main__":
    uvloop.run(_serve())
