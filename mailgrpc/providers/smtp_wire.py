"""The wire of an SMTP connection: lines out, replies in, and nothing else.

Every command in a write owes one reply, and a reply that nobody is owed breaks the wire, so that
answers never get out of step with commands. Replies are bounded in lines and bytes. A wire breaks
once, with the cause that came first, and is never mended: whoever holds it drops it. Replies that
were complete before the break count, also where the connection ended right behind them; whatever
comes after it is not read.

It takes over the transport of a connection that aiosmtplib has opened, and works the same on
asyncio's and uvloop's transports, plain and TLS.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import deque
from collections.abc import Mapping
from typing import cast

from mailgrpc.core.delivery import Cause, result_text
from mailgrpc.providers.smtp_replies import Reply

MAX_LINE = 8 * 1024
MAX_REPLY = 64 * 1024
_BLOCK = 256 * 1024
_REPLY_LINE = re.compile(r"[2-5][0-9]{2}(?:[ -]|$)")


class WireBroken(Exception):
    """The connection is of no use any more: lost, silent for too long, or not speaking SMTP."""

    def __init__(self, cause: Cause, text: str) -> None:
        super().__init__(text)
        self.cause = cause
        self.text = text


class SmtpWire(asyncio.Protocol):
    """A connection after its handshake. Made by `take_over`; one user at a time."""

    def __init__(
        self, transport: asyncio.Transport, extensions: Mapping[str, str], reply_timeout_s: float
    ) -> None:
        self.extensions = extensions  # from EHLO, names in lower case
        # At most 20 digits (RFC 1870, 3), and 0 is no limit (4); anything else is taken for none.
        limit = extensions.get("size", "")
        self.most_bytes = int(limit) if re.fullmatch(r"[0-9]{1,20}", limit) else 0
        """The most bytes a mail may have; 0: no limit."""
        self.pipelines = "pipelining" in extensions
        self.mails = 0  # transactions begun here
        self.answer_s = math.inf  # how long the last final dot waited for its answer
        self.begun: object | None = None
        """The mail whose envelope went out behind the last one's dot, and whose turn is next."""
        self.is_held = False  # by a transaction
        self.idle_since = 0.0
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._reply_timeout_s = reply_timeout_s
        self._buffer = b""  # the beginning of a line
        self._code = ""  # of the reply that is being read
        self._lines: list[str] = []
        self._reply_size = 0
        self._replies: deque[Reply] = deque()
        self._owed = 0
        self._broken: WireBroken | None = None
        self._writable = True
        self._waiter: asyncio.Future[None] | None = None
        self._limit = math.inf  # of what is waited for
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    @classmethod
    def take_over(
        cls, transport: asyncio.BaseTransport, extensions: Mapping[str, str], reply_timeout_s: float
    ) -> SmtpWire:
        """Go on with a connection that another protocol opened and has no reply due on."""
        transport = cast(asyncio.Transport, transport)
        wire = cls(transport, extensions, reply_timeout_s)
        transport.set_protocol(wire)
        # Nothing may linger in a buffer here once it is said to be flushed. Not 0: asyncio's TLS
        # transport takes that for "always paused".
        transport.set_write_buffer_limits(high=1, low=0)
        if transport.is_closing():
            wire.connection_lost(None)
        return wire

    @property
    def security(self) -> str:
        """The version of TLS, or that there is none."""
        cipher = self._transport.get_extra_info("cipher")
        return str(cipher[1]) if cipher else "not encrypted"

    @property
    def is_usable(self) -> bool:
        """Whether a new transaction may begin here."""
        return self.is_alive and self._owed == 0 and self.begun is None

    @property
    def is_alive(self) -> bool:
        """Whether anything can still be written and read here."""
        return self._broken is None and not self._transport.is_closing()

    def abort(self) -> None:
        """Drop the connection at once, whatever is under way on it."""
        self._break(Cause.CONNECTION, "the connection was dropped")

    def write(self, data: bytes, replies: int = 1) -> None:
        """Send commands that `replies` answers are owed for. Raises WireBroken."""
        self.raise_if_broken()
        self._owed += replies
        if data:
            self._transport.write(data)

    def raise_if_broken(self) -> None:
        """Raise WireBroken where what is written now would go nowhere."""
        if self._broken is None and self._transport.is_closing():
            self._broken = WireBroken(Cause.CONNECTION, "the connection broke")
        if self._broken is not None:
            raise self._broken

    async def reply(self, deadline: float) -> Reply:
        """The next reply. Raises WireBroken; `deadline` is a time of the loop."""
        if not self._replies:  # what was pipelined is often answered in one piece
            limit = self._limit_of(deadline)
            while not self._replies:
                await self._wait(limit, "no answer")
        return self._replies.popleft()

    async def flush(self, data: memoryview, deadline: float) -> None:
        """Send content and wait until the kernel has it. Stops early when the server answers."""
        for start in range(0, len(data), _BLOCK):
            self.write(bytes(data[start : start + _BLOCK]), replies=0)
            limit = self._limit_of(deadline)
            while not self._writable and not self._replies:
                await self._wait(limit, "the mail is not taken")
            if self.has_reply:
                return

    @property
    def has_reply(self) -> bool:
        """Whether a reply waits to be read."""
        return bool(self._replies)

    def _limit_of(self, deadline: float) -> float:
        return min(deadline, self._loop.time() + self._reply_timeout_s)

    async def _wait(self, limit: float, text: str) -> None:
        """Wait for the next thing to happen here. Raises WireBroken, where it is too late too."""
        if self._broken is None and self._loop.time() >= limit:
            self._break(Cause.TIMEOUT, f"{text} within the time given")
        if self._broken is not None:
            raise self._broken
        self._arm(limit)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _arm(self, limit: float) -> None:
        """See whoever waits woken at `limit`.

        By one timer for many waits: nearly all of them end long before, and a timer for each would
        be a tenth of what a small mail costs here.
        """
        self._limit = limit
        if self._timer is None or limit < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(limit, self._ring)
            self._timer_at = limit

    def _ring(self) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if self._loop.time() >= self._limit:
            self._wake()
        else:
            self._arm(self._limit)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _break(self, cause: Cause, text: str) -> None:
        if self._broken is None:
            self._broken = WireBroken(cause, text)
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()

    # What the transport calls

    def data_received(self, data: bytes) -> None:
        """Bytes of replies, cut anywhere."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if self._broken is None:
                self._take_line(line.decode("utf-8", "replace").rstrip("\r"))
        if len(self._buffer) > MAX_LINE:
            self._break(Cause.PROVIDER, "the server sent a line without end")
        self._wake()

    def _take_line(self, line: str) -> None:
        """One line of a reply: three digits, then `-` where more follow (RFC 5321, 4.2.1).

        All lines of a reply have the same code. One that says both 250 and 550 says nothing.
        """
        code, rest = line[:3], line[3:]
        self._reply_size += len(line)
        if not _REPLY_LINE.match(line):
            return self._break(Cause.PROVIDER, f"not an SMTP reply: {line[:80]!r}")
        if self._reply_size > MAX_REPLY:
            return self._break(Cause.PROVIDER, "the server sent a reply without end")
        if self._lines and code != self._code:
            return self._break(Cause.PROVIDER, f"one reply with two codes: {self._code} and {code}")
        self._code = code
        self._lines.append(rest[1:])
        if rest[:1] == "-":
            return None
        reply = Reply(int(code), " ".join(self._lines))
        self._lines.clear()
        self._reply_size = 0
        if self._owed == 0:
            return self._break(Cause.CONNECTION, f"the server spoke out of turn: {line[:80]!r}")
        self._owed -= 1
        self._replies.append(reply)
        return None

    def eof_received(self) -> None:
        """The server will say no more."""
        self._break(Cause.CONNECTION, "the server closed the connection")

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, from whichever side."""
        if self._broken is None:
            text = f"the connection broke: {exc}" if exc else "the server closed the connection"
            self._broken = WireBroken(Cause.CONNECTION, result_text(text))
        self._wake()

    def pause_writing(self) -> None:
        """The kernel takes no more for now."""
        self._writable = False

    def resume_writing(self) -> None:
        """The kernel has taken all."""
        self._writable = True
        self._wake()
