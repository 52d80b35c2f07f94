"""An SMTP server on the loopback that does what a test tells it to.

It keeps a ledger of what it took. What it answers is set by attributes before the connection, and
by `script`: a command (`MAIL`, `RCPT`, `RCPT ann@example.org`, `DATA`, `DOT`, `GREETING`, `EHLO`,
`AUTH`, `STARTTLS`, `RSET`, `QUIT`) to a reply line, or to something else:

    CLOSE   end the connection in order: FIN, under TLS after a close_notify
    DROP    end it at once, without a word
    RESET   end it by RST
    STALL   say nothing more
    DEAF    say nothing more, and take nothing more off the wire
    DRIP    a line of a reply now and then, and no end to it

`then(reply, RESET)` says the reply and does the other right behind it. A list is used up one by
one, then the default comes back. `early` is said in the middle of the content.
"""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import ssl
import struct
from dataclasses import dataclass, field
from typing import Self

CLOSE = "close"
DROP = "drop"
RESET = "reset"
STALL = "stall"
DEAF = "deaf"
DRIP = "drip"
_SILENT = (STALL, DEAF, DRIP)
_THEN = "\0then "
_PATH = re.compile(r"<(.*)>")


def then(reply: str, action: str) -> str:
    """A reply with an action right behind it."""
    return f"{reply}{_THEN}{action}"


@dataclass
class Taken:
    """A mail that the server said 250 to, or would have before it fell silent or left."""

    sender: str
    recipients: list[str]
    content: bytes
    parameters: str
    user: str = ""
    encrypted: bool = False
    answered: bool = True


@dataclass
class SmtpPeer:
    pipelining: bool = True
    size: int | None = None
    smtputf8: bool = True
    tls: ssl.SSLContext | None = None
    implicit_tls: bool = False
    login: tuple[str, str] | None = None
    script: dict[str, str | list[str]] = field(default_factory=dict)
    early: str = ""
    taken: list[Taken] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    connections: int = 0
    silences: int = 0  # how often it has begun to say nothing more
    open: set[asyncio.StreamWriter] = field(default_factory=set)
    port: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        context = self.tls if self.implicit_tls else None
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, ssl=context, limit=1 << 24
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop listening and drop every connection."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drop_connections(self) -> None:
        """Close every open connection, as a server does with idle ones."""
        for writer in list(self.open):
            writer.transport.abort()
        while self.open:
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open.add(writer)
        try:
            await _Session(self, reader, writer).run()
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError, _Dropped):
            pass
        except asyncio.CancelledError:
            pass  # the test is over; asyncio's streams log a task that ends cancelled
        finally:
            writer.transport.abort()
            self.open.discard(writer)
            self._tasks.discard(task)

    def action(self, *names: str) -> str:
        """What the script says for the first of `names` that it knows, or nothing."""
        for name in names:
            planned = self.script.get(name)
            if isinstance(planned, list):
                if planned:
                    return planned.pop(0)
            elif planned:
                return planned
        return ""


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    """Have the end of a connection be an RST."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


class _Dropped(Exception):
    pass


class _Session:
    def __init__(
        self, peer: SmtpPeer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.peer = peer
        self.reader = reader
        self.writer = writer
        self.encrypted = peer.implicit_tls
        self.user = ""
        self.sender = ""
        self.parameters = ""
        self.recipients: list[str] = []

    async def run(self) -> None:
        await self._answer("220 peer.example.test ESMTP", "GREETING")
        while line := await self.reader.readline():
            text = line.decode().rstrip("\r\n")
            self.peer.commands.append(text)
            verb = text.split(" ")[0].upper()
            handler = getattr(self, f"_{verb.lower()}", None)
            if handler is None:
                await self._say("500 5.5.2 what?")
            elif await handler(text):
                return

    async def _say(self, reply: str) -> None:
        reply, _, action = reply.partition(_THEN)
        if reply in _SILENT:
            await self._fall_silent(reply)
        if reply in (CLOSE, DROP, RESET):
            await self._leave(reply)
        self.writer.write(reply.encode() + b"\r\n")
        await self.writer.drain()
        if action:
            await self._say(action)

    async def _fall_silent(self, action: str) -> None:
        self.peer.silences += 1
        if action == DEAF:
            self.writer.transport.pause_reading()  # type: ignore[attr-defined]
        if action == DRIP:
            while not self.writer.is_closing():
                self.writer.write(b"250-more\r\n")
                await asyncio.sleep(0.02)
            raise _Dropped
        if action == STALL:
            await self.reader.read()  # until the client hangs up
            raise _Dropped
        await asyncio.sleep(3600)

    async def _leave(self, action: str) -> None:
        if action == CLOSE:
            self.writer.close()
            await self.writer.wait_closed()
        if action == RESET:
            reset_on_close(self.writer)
        raise _Dropped

    async def _answer(self, default: str, *names: str) -> bool:
        reply = self.peer.action(*names) or default
        await self._say(reply)
        return reply.startswith("2")

    async def _ehlo(self, text: str) -> None:
        offers = ["peer.example.test", "ENHANCEDSTATUSCODES", "8BITMIME"]
        if self.peer.pipelining:
            offers.append("PIPELINING")
        if self.peer.size is not None:
            offers.append(f"SIZE {self.peer.size}")
        if self.peer.smtputf8:
            offers.append("SMTPUTF8")
        if self.peer.tls is not None and not self.encrypted:
            offers.append("STARTTLS")
        if self.peer.login is not None:
            offers.append("AUTH PLAIN")
        lines = [f"250-{offer}" for offer in offers[:-1]] + [f"250 {offers[-1]}"]
        await self._answer("\r\n".join(lines), "EHLO")

    async def _starttls(self, text: str) -> None:
        if await self._answer("220 2.0.0 go ahead", "STARTTLS"):
            assert self.peer.tls is not None
            await self.writer.start_tls(self.peer.tls)
            self.encrypted = True

    async def _auth(self, text: str) -> None:
        assert self.peer.login is not None
        _, user, password = base64.b64decode(text.split(" ")[2]).decode().split("\0")
        if (user, password) == self.peer.login:
            self.user = user
            await self._answer("235 2.7.0 welcome", "AUTH")
        else:
            await self._answer("535 5.7.8 wrong user or password", "AUTH")

    async def _mail(self, text: str) -> None:
        if self.peer.login is not None and not self.user:
            await self._say("530 5.7.0 authentication required")
            return
        match = _PATH.search(text)
        assert match is not None
        self.recipients = []
        if await self._answer("250 2.1.0 ok", "MAIL"):
            self.sender, self.parameters = match[1], text[match.end() :].strip()

    async def _rcpt(self, text: str) -> None:
        match = _PATH.search(text)
        assert match is not None
        local_part = match[1].split("@")[0]
        default = "250 2.1.5 ok" if self.sender else "503 5.5.1 need MAIL"
        if local_part == "refused":
            default = "550 5.1.1 no such user"
        elif local_part == "later":
            default = "450 4.2.0 greylisted, come back later"
        if await self._answer(default, f"RCPT {match[1]}", "RCPT"):
            self.recipients.append(match[1])

    async def _data(self, text: str) -> None:
        default = "354 go on" if self.recipients else "554 5.5.1 no valid recipients"
        reply = self.peer.action("DATA") or default
        await self._say(reply)
        if not reply.startswith("354"):
            return
        if self.peer.early:
            await self.reader.readline()
            await self._say(self.peer.early)
        content = await self._content()
        mail = Taken(
            self.sender, self.recipients, content, self.parameters, self.user, self.encrypted
        )
        reply = self.peer.action("DOT") or self._magic() or "250 2.0.0 Ok: queued as 4F2B71"
        mail.answered = reply not in (CLOSE, DROP, RESET, *_SILENT)
        if reply.startswith("2") or not mail.answered:
            self.peer.taken.append(mail)
        self.sender, self.recipients = "", []
        await self._say(reply)

    def _magic(self) -> str:
        for address in self.recipients:
            if address.startswith("silent@"):
                return STALL
            if address.startswith("drop@"):
                return DROP
        return ""

    async def _content(self) -> bytes:
        lines = []
        while (line := await self.reader.readline()) != b".\r\n":
            if not line.endswith(b"\r\n"):
                raise _Dropped  # the client left in the middle
            lines.append(line[1:] if line.startswith(b".") else line)
        return b"".join(lines)

    async def _rset(self, text: str) -> None:
        self.sender, self.recipients = "", []
        await self._answer("250 2.0.0 ok", "RSET")

    async def _quit(self, text: str) -> bool:
        await self._answer("221 2.0.0 bye", "QUIT")
        return True
