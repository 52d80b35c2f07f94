"""The providers outside: an SMTP server and a look-alike of SendGrid, with a ledger.

A process of its own that no fault kills: `python -m tests.faults.providers LEDGER SEED CONTROL`.
It prints its two ports. How it behaves is drawn by the seed for each mail: most are taken, some
refused for now or for good, a few swallowed (read, entered, and the connection broken instead of an
answer), stalled (no answer at all) or failed (entered, and then an error), a few cut off before the
end. What each mail met is in the ledger, so that a doubt can be traced to it. CONTROL is a file read before each mail: `hold` answers no
mail until it says something else, `sure` takes every mail.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import sys
from pathlib import Path

from tests.faults.ledger import Ledger

_SUBJECT = re.compile(rb"^Subject: *([^\r\n]+)", re.MULTILINE | re.IGNORECASE)
_ADDRESS = re.compile(r"<([^>]*)>")


class World:
    """What both servers share."""

    def __init__(self, ledger: Ledger, seed: int, control: Path) -> None:
        self.ledger = ledger
        self._rng = random.Random(seed)
        self._control = control

    @property
    def mood(self) -> str:
        with contextlib.suppress(OSError):
            return self._control.read_text().strip()
        return ""

    def fate(self) -> str:
        """What becomes of the next mail."""
        if self.mood in ("sure", "hold"):
            return "taken"
        [fate] = self._rng.choices(
            ("taken", "deferred", "rejected", "swallowed", "stalled", "failed", "cut", "paused"),
            (930, 20, 10, 12, 6, 6, 10, 6),
        )
        return fate

    async def held(self) -> None:
        """Return when mails are answered."""
        while self.mood == "hold":
            await asyncio.sleep(0.05)


class Smtp:
    """One SMTP server; PIPELINING needs nothing, since lines are answered in their order."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, OSError):
            await self._session(reader, writer)
        writer.close()

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 outside ESMTP\r\n")
        recipients: list[str] = []
        fate = "taken"
        while line := await reader.readline():
            verb = line[:4].upper()
            if verb == b"EHLO":
                writer.write(
                    b"250-outside\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 20000000\r\n"
                )
            elif verb == b"MAIL":
                recipients, fate = [], self._world.fate()
                if fate == "paused":
                    writer.write(b"421 4.7.0 come back later\r\n")
                    return
                writer.write(b"250 2.1.0 ok\r\n")
            elif verb == b"RCPT":
                found = _ADDRESS.search(line.decode())
                assert found is not None
                if fate in _REFUSALS:
                    self._world.ledger.enter("", [found[1]], fate)
                    writer.write(_REFUSALS[fate])
                else:
                    recipients.append(found[1])
                    writer.write(b"250 2.1.5 ok\r\n")
            elif verb == b"DATA":
                if not recipients:
                    writer.write(b"503 5.5.1 nobody to send it to\r\n")
                    continue
                writer.write(b"354 go on\r\n")
                if not await self._content(reader, writer, recipients, fate):
                    return
            elif verb == b"QUIT":
                writer.write(b"221 bye\r\n")
                return
            else:
                writer.write(b"250 2.0.0 ok\r\n")

    async def _content(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        recipients: list[str],
        fate: str,
    ) -> bool:
        """The mail to its dot; whether the connection goes on."""
        if fate == "cut":
            self._world.ledger.enter("", recipients, fate)
            return False
        content = await reader.readuntil(b"\r\n.\r\n")
        found = _SUBJECT.search(content)
        key = found[1].decode() if found else ""
        if fate == "failed":  # in SMTP an error after the dot is a refusal like any other
            self._world.ledger.enter(key, recipients, "deferred")
            writer.write(b"451 4.3.0 out of order for now\r\n")
            return True
        self._world.ledger.enter(key, recipients, fate)
        if fate == "swallowed":
            return False
        if fate == "stalled":
            await reader.read()
            return False
        await self._world.held()
        writer.write(b"250 2.0.0 ok: queued as 1\r\n")
        return True


_REFUSALS = {"deferred": b"450 4.2.2 mailbox full\r\n", "rejected": b"550 5.1.1 nobody here\r\n"}


class SendGrid:
    """As much of the v3 Mail Send API as a client of ours meets."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, OSError):
            while await self._request(reader, writer):
                await writer.drain()
        writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        fate = self._world.fate()
        body = json.loads(await reader.readexactly(int(length[1]) if length else 0))
        recipients = [to["email"] for p in body["personalizations"] for to in p["to"]]
        status = _STATUSES[fate]
        self._world.ledger.enter(body["subject"], recipients, fate)
        if fate == "stalled":
            await reader.read()
        if not status:
            return False
        await self._world.held()
        errors = b"" if status == "202 Accepted" else b'{"errors": [{"message": "no"}]}'
        writer.write(
            f"HTTP/1.1 {status}\r\nX-Message-Id: 1\r\nRetry-After: 1\r\n"
            f"Content-Length: {len(errors)}\r\n\r\n".encode()
            + errors
        )
        return True


_STATUSES = {
    "taken": "202 Accepted",
    "deferred": "408 Request Timeout",
    "rejected": "413 Payload Too Large",
    "swallowed": "",
    "stalled": "",
    "failed": "502 Bad Gateway",
    "cut": "",
    "paused": "429 Too Many Requests",
}


async def main(ledger: str, seed: str, control: str) -> None:
    world = World(Ledger(Path(ledger)), int(seed), Path(control))
    servers = [
        await asyncio.start_server(kind(world).serve, "127.0.0.1", 0, limit=1 << 24)
        for kind in (Smtp, SendGrid)
    ]
    print(*(s.sockets[0].getsockname()[1] for s in servers), flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)  # until whoever started it has ended


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
