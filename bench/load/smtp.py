"""Mails by SMTP, as a good client sends them: the load for Postfix, and for the sink alone.

    python -m bench.load.smtp PORT --connections N (--messages M | --rate R --seconds S)

One mail a transaction, connections kept, and two round trips a mail: MAIL, RCPT and DATA in one
write, then the content with its dot. The mails are those of `mails.py`, rendered by the gateway's
own code, so that Postfix is given the very bytes that mailgrpc would send. They are ready before
the clock starts.

Acknowledged is what got its 250 after the dot. A closed loop (`--messages`) sends as fast as
answers come; an open one (`--rate`) when a mail is due, on the connection that has been idle for
the shortest time, and where none is free the mail waits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import uvloop

from bench.load.acknowledged import write_acknowledged
from bench.load.mails import request
from mailgrpc.core.ids import rfc_message_id
from mailgrpc.core.mime import render
from mailgrpc.server.convert import submission


class Mail(NamedTuple):
    recipient: str
    commands: bytes
    content: bytes


def mail() -> Mail:
    """One mail, as the gateway would put it on the wire."""
    message = submission(request()).message
    assert message.sender is not None
    sender, recipient = message.sender.address, message.recipients[0].address
    named = rfc_message_id(uuid.uuid4(), sender)
    content = render(message, rfc_message_id=named, date=datetime.now(UTC))
    commands = f"MAIL FROM:<{sender}>\r\nRCPT TO:<{recipient}>\r\nDATA\r\n"
    return Mail(recipient, commands.encode(), content.replace(b"\r\n.", b"\r\n..") + b".\r\n")


class Connection(asyncio.Protocol):
    """One connection; `free(connection, mail that ended or None, whether it was taken)`."""

    def __init__(self, free: Callable[[Connection, Mail | None, bool], None]) -> None:
        self._free = free
        self._mail: Mail | None = None
        self._rest = b""
        self._answers: list[bytes] = []  # to MAIL, RCPT and DATA, then to the content
        self._greeted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        if self._mail is not None:
            self._end(False)

    @property
    def is_lost(self) -> bool:
        return self._transport.is_closing()

    def send(self, mail: Mail) -> None:
        self._mail = mail
        self._transport.write(mail.commands)

    def close(self) -> None:
        self._transport.write(b"QUIT\r\n")
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\r\n")
        for line in lines:
            if line[3:4] != b"-":
                self._answered(line)

    def _answered(self, line: bytes) -> None:
        if self._mail is None:
            if line.startswith(b"220"):
                self._transport.write(b"EHLO load.example.org\r\n")
            elif not self._greeted:
                self._greeted = True
                self._free(self, None, True)
            return
        self._answers.append(line)
        if len(self._answers) == 3:
            if not line.startswith(b"354"):
                self._transport.close()
                self._end(False)
            else:
                self._transport.write(self._mail.content)
        elif len(self._answers) == 4:
            self._end(line.startswith(b"250"))

    def _end(self, taken: bool) -> None:
        mail, self._mail, self._answers = self._mail, None, []
        self._free(self, mail, taken)


class Load:
    """Mails over so many connections; what came of them."""

    def __init__(self, mails: list[Mail]) -> None:
        self._due = deque(mails)
        self._later: deque[Mail] = deque()
        self._idle: list[Connection] = []
        self._left = len(mails)
        self._ended = asyncio.Event()
        self.acknowledged: list[tuple[str, float]] = []
        self.failed = 0

    async def connect(self, port: int, connections: int) -> None:
        loop = asyncio.get_running_loop()
        self._due, self._later = self._later, self._due  # nothing is due before all have greeted
        for _ in range(connections):
            await loop.create_connection(lambda: Connection(self._free), "127.0.0.1", port)
        while len(self._idle) < connections:
            await asyncio.sleep(0.01)

    def _free(self, connection: Connection, mail: Mail | None, taken: bool) -> None:
        if mail is not None:
            self._left -= 1
            if taken:
                self.acknowledged.append((mail.recipient, time.time()))
            else:
                self.failed += 1
            if not self._left:
                self._ended.set()
        if connection.is_lost:
            return  # the others go on; where none is left, the time runs out
        if self._due:
            connection.send(self._due.popleft())
        else:
            self._idle.append(connection)

    async def closed(self) -> None:
        """As fast as answers come."""
        self._due, self._later = self._later, self._due
        for connection in [self._idle.pop() for _ in range(min(len(self._idle), len(self._due)))]:
            connection.send(self._due.popleft())
        async with asyncio.timeout(300):
            await self._ended.wait()

    async def open(self, rate: float) -> None:
        """So many a second, whatever the answers do."""
        began = time.perf_counter()
        for number in range(len(self._later)):
            due = began + number / rate
            while (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(max(left, 0.001))
            mail = self._later.popleft()
            if self._idle:
                self._idle.pop().send(mail)
            else:
                self._due.append(mail)
        async with asyncio.timeout(60):
            await self._ended.wait()

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


async def main(options: argparse.Namespace) -> None:
    count = options.messages or int(options.rate * options.seconds)
    load = Load([mail() for _ in range(count)])
    await load.connect(options.port, options.connections)
    began, cpu = time.perf_counter(), time.process_time()
    await (load.open(options.rate) if options.rate else load.closed())
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    load.close()
    if options.acknowledged:
        write_acknowledged(options.acknowledged, load.acknowledged)
    times = [at for _, at in load.acknowledged]
    print(
        json.dumps(
            {
                "messages": len(times),
                "failed": load.failed,
                "rate": len(times) / took,
                "first_at": min(times, default=0.0),
                "generator_cpu": cpu / took,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--messages", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--acknowledged", type=Path)
    uvloop.run(main(parser.parse_args()))
