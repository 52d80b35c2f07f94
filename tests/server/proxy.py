"""A proxy before PostgreSQL that loses answers: what a network does at the worst moment."""

from __future__ import annotations

import asyncio
import contextlib
import re
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

_DONE = re.compile(rb"C\x00\x00\x00.SELECT \d+\x00.*?Z\x00\x00\x00\x05I", re.DOTALL)
"""CommandComplete and ReadyForQuery: by then the transaction is committed."""


class _Pair:
    """One connection, seen from both ends."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.fatal_name = b""  # the prepared statement whose answer is to be lost
        self.is_silent = False  # it has asked something that was swallowed
        self.is_doomed = False  # that statement is under way


class LossyProxy:
    """Listens on a port and passes everything on to the server of a libpq URL, until told not to.

    `lose_answer_to` names a text of a statement: when it has been carried out, its answer is lost
    and the connection breaks, once. `hang_up` breaks what the client sees and lets the server go on.
    `close` and `open` take the server away and bring it back. While `is_silent` all that comes is
    swallowed and no connection breaks; one that has met that stays silent.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        self._socket = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}" if query else None
        self._host, self._port_behind = parts.hostname, parts.port
        self._login = parts.netloc.rpartition("@")[0]
        self._path = parts.path
        self._pairs: list[_Pair] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._fatal: re.Pattern[bytes] | None = None
        self.lost = 0
        self.is_silent = False

    @property
    def url(self) -> str:
        """The database, by way of this proxy."""
        return f"postgresql://{self._login}@127.0.0.1:{self._port}{self._path}?sslmode=disable"

    @property
    def swallowed(self) -> int:
        """How many connections have asked something that was swallowed."""
        return sum(pair.is_silent for pair in self._pairs)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for pair in self._pairs:
            pair.client.close()
            pair.server.close()
        self._pairs.clear()

    def lose_answer_to(self, statement: str) -> None:
        self._fatal = re.compile(rb"(__asyncpg_\w+)\0[^\0]*" + re.escape(statement.encode()))

    def hang_up(self) -> None:
        for pair in self._pairs:
            pair.client.close()
        self._pairs.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._socket is not None:
            answers, server = await asyncio.open_unix_connection(self._socket)
        else:
            answers, server = await asyncio.open_connection(self._host, self._port_behind)
        pair = _Pair(writer, server)
        self._pairs.append(pair)
        for way in (self._ask(reader, pair), self._answer(answers, pair)):
            task = asyncio.create_task(way)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, reader: asyncio.StreamReader, pair: _Pair) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if self.is_silent or pair.is_silent:
                    pair.is_silent = True
                    continue
                if self._fatal is not None and (found := self._fatal.search(data)):
                    self._fatal, pair.fatal_name = None, b"\0" + found[1] + b"\0"
                elif pair.fatal_name and data.startswith(b"B") and pair.fatal_name in data[:80]:
                    # Bind, after Parse and after what the driver asks about types in between.
                    pair.is_doomed = True
                pair.server.write(data)

    async def _answer(self, answers: asyncio.StreamReader, pair: _Pair) -> None:
        held = b""
        with contextlib.suppress(ConnectionError):
            while data := await answers.read(65536):
                if not pair.is_doomed:
                    pair.client.write(data)
                elif _DONE.search(held := held + data):
                    self.lost += 1
                    pair.client.close()
                    pair.server.close()
                    return
            pair.client.close()
