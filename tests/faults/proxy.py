"""A line between two of ours that a test can spoil: a TCP proxy on the loopback.

`pass`       all goes through
`silent`     what comes is swallowed, in both ways; nothing breaks, and what was swallowed is lost
`slow`       each block waits a little
`reset`      every connection is broken now, and new ones after RESET_AFTER bytes
`deaf`       what is asked goes through, the answers are swallowed: the other end has done its work
`gone`       connections are refused
`late`       what is asked is held back, and comes LATE_S after the mood has ended, whoever asked it
             having gone meanwhile; answers go through
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

MOODS = ("pass", "silent", "slow", "reset", "deaf", "gone", "late")
RESET_AFTER = 200
LATE_S = 1.0
_SLOW_S = 0.1
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy:
    """Listens on a port and passes on to what is behind it, as `mood` says.

    `behind` is a port of this machine, or opens a connection.
    """

    def __init__(self, behind: int | Callable[[], Awaitable[Streams]]) -> None:
        self._behind = behind
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._mood = "pass"
        self._arrival = asyncio.Event()  # of what is held back
        self.port = 0

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.set("gone")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def set(self, mood: str) -> None:
        """From now on; connections that a silence has met are broken when it ends."""
        spoilt = self._mood in ("silent", "deaf")
        if self._mood == "late" and mood != "late":
            held, self._arrival = self._arrival, asyncio.Event()
            asyncio.get_running_loop().call_later(LATE_S, held.set)
        self._mood = mood
        if mood in ("reset", "gone") or spoilt:
            for writer in list(self._writers):
                writer.transport.abort()
        if mood == "gone" and self._server is not None:
            self._server.close()
            self._server = None
        elif mood != "gone" and self._server is None:
            await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if isinstance(self._behind, int):
                behind, there = await asyncio.open_connection("127.0.0.1", self._behind)
            else:
                behind, there = await self._behind()
        except OSError:
            self._writers.discard(writer)
            writer.transport.abort()
            return
        self._writers.add(there)
        ways = [(reader, there, False), (behind, writer, True)]
        tasks = [asyncio.create_task(self._pass(*way)) for way in ways]
        self._tasks.update(tasks)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, there):
            self._writers.discard(end)
            end.close()
        for task in tasks:
            self._tasks.discard(task)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_answer: bool
    ) -> None:
        passed = 0
        with contextlib.suppress(ConnectionError, OSError):
            while data := await reader.read(65536):
                if self._mood == "silent" or (self._mood == "deaf" and is_answer):
                    continue
                if self._mood == "late" and not is_answer:
                    await self._arrival.wait()
                if self._mood == "slow":
                    await asyncio.sleep(_SLOW_S)
                passed += len(data)
                if self._mood == "reset" and passed > RESET_AFTER:
                    writer.transport.abort()
                    return
                writer.write(data)
                await writer.drain()


def to_postgres(url: str) -> Proxy:
    """A proxy before a PostgreSQL on a Unix socket, as its libpq URL tells."""
    query = parse_qs(urlsplit(url).query)
    socket = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
    return Proxy(lambda: asyncio.open_unix_connection(socket))


def url_through(proxy: Proxy, url: str) -> str:
    """The URL of the same database, by way of `proxy`."""
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return f"postgresql://{login}@127.0.0.1:{proxy.port}{parts.path}?sslmode=disable"
