"""How this program talks to PostgreSQL.

Promises. Every write is one autocommit round trip on a connection of its own: there is no client
transaction that could be left open. Every call runs in a task that nobody else can cancel: a
cancelled asyncpg call can lose its connection, and a caller that hangs up must not decide whether
a commit is seen. Who waits for the call may be cancelled at any time; the call ends by itself.

What can go wrong, and what a caller of `Database` sees:

    refused, reset, shutting down, no connection in time     StoreUnavailable
    the same, after the statement may have reached Postgres  AmbiguousCommit (a StoreUnavailable)
    no space or memory, cancelled, a lock not in time        StoreUnavailable
    deadlock 40P01, serialization 40001                      tried again here, a few times
    data that breaks a constraint or a type                  asyncpg.PostgresError, to be handled
    worker session ended MG001, stale version MG002          SessionEnded, StaleVersion
    claim of an earlier epoch MG003                          asyncpg.PostgresError; nobody waits for it

How long a statement may take depends on who asks (`with_patience`). When one meets silence, the
connections that lie idle most likely lead to the same silence: they are ended too, rather than
cost their next user a time-out each.

With a synchronous standby a commit that is visible need not be on the standby: its wait may have
been cut short, by a time-out of ours too. Whoever then runs the same write again finds it done,
and a transaction that writes nothing waits for no standby. So as long as a write of this pool is
in doubt, each write that succeeds is followed by a record of its own in the log, whose commit waits
for the standby and for all before it; only then is it told as done (`confirm`).

Connections demand a server that accepts writes (db/connecting.py). SQLAlchemy pools them and
composes the queries whose shape varies; the hot statements go to asyncpg directly, with arrays.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import socket
import struct
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import asyncpg
import orjson
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from mailgrpc.db.connecting import (
    CONNECT_TIMEOUT_S,
    SETTING,
    Connection,
    Connector,
    told_at_start,
)
from mailgrpc.errors import MailgrpcError, SettingsError, StoreUnavailable

T = TypeVar("T")
Call: TypeAlias = Callable[[Connection], Awaitable[T]]

COMMAND_TIMEOUT_S = 60.0
"""For who has no patience of its own: the chores. A server silent for so long is not there."""
LOOK_UP_S = 10.0
"""The patience of a call that waits for some rows."""
FEED_S = 5.0
"""The patience of what is asked again and again: the feed, health."""
_CANCEL_S = 1.0
_CLOSE_S = 2.0
_CONFIRM = "SELECT pg_logical_emit_message(true, 'mailgrpc', '')"
_TRIES_ON_CONFLICT = 5


class AmbiguousCommit(StoreUnavailable):
    """The connection broke, or a wait for the standby was cut short, after a write was sent."""


class SessionEnded(MailgrpcError):
    """The worker session was ended by the reaper: it may claim and start nothing more."""


class SessionGivenUp(SessionEnded):
    """Its own worker leaves the session to the reaper: it cannot know what it has started."""


class StaleVersion(MailgrpcError):
    """A delivery changed since its step was decided."""


_OUR_ERRORS: dict[str, type[MailgrpcError]] = {"MG001": SessionEnded, "MG002": StaleVersion}
_CONFLICTS = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
# Nothing of the statement can have been carried out.
_NOT_BEGUN = (
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.ReadOnlySQLTransactionError,
)
# PostgreSQL has undone the statement, and the connection is as good as before.
_UNDONE = (
    asyncpg.InsufficientResourcesError,
    asyncpg.QueryCanceledError,
    asyncpg.LockNotAvailableError,
)
# It may have been carried out.
_BROKEN = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    ConnectionError,
    OSError,
    TimeoutError,
)


class _Pooled:
    """A connection as SQLAlchemy pools it, the driver's behind it, and what that was warned of."""

    __slots__ = ("connection", "cut_short", "pooled")

    def __init__(self, pooled: AsyncConnection, connection: Connection) -> None:
        self.pooled = pooled
        self.connection = connection
        self.cut_short: list[str] = []
        connection.add_log_listener(self._listen)

    def _listen(self, _connection: Any, message: Any) -> None:
        # Its text is in the language of the server; the file that it comes from is not.
        text = str(message)
        if message.sqlstate == "01000" and (
            message.server_source_filename == "syncrep.c" or "synchronous" in text.lower()
        ):
            self.cut_short.append(text)

    async def committed(self, call: Call[T]) -> T:
        """Run a statement that writes. Raises AmbiguousCommit where a standby need not have it."""
        self.cut_short.clear()
        result = await call(self.connection)
        if self.cut_short:
            # Committed here, perhaps not on the standby that may become the primary.
            raise AmbiguousCommit(self.cut_short[0])
        return result

    async def close(self) -> None:
        """Hand it back to SQLAlchemy, which forgets it where it has ended."""
        if self.connection.is_closed():
            await self.pooled.invalidate()
        await self.pooled.close()


class _Pool:
    """The connections of one process, whoever of it asks.

    What was checked out of SQLAlchemy's pool once is kept here between two statements: to check it
    out anew for each costs five times what the driver needs for a small statement.
    """

    def __init__(self, size: int) -> None:
        self.open: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.idle: list[_Pooled] = []  # the last used is the next
        self.free = asyncio.Semaphore(size)
        self._doubts = 0
        self._confirmed = 0

    @property
    def doubts(self) -> int:
        """How many writes have ended in doubt."""
        return self._doubts

    @property
    def is_in_doubt(self) -> bool:
        """Whether one of them was not confirmed since."""
        return self._confirmed < self._doubts

    def doubt(self) -> None:
        """A write ended in doubt."""
        self._doubts += 1

    def confirm(self, doubts: int) -> None:
        """All that was in doubt when there were so many is on the standby, or never will be."""
        self._confirmed = max(self._confirmed, doubts)

    def end_idle(self) -> None:
        """End the connections that nobody uses."""
        for pooled in self.idle:
            pooled.connection.terminate()


class Database:
    """The pool of connections of one process to one database.

    `url` is a libpq URL (`postgresql://user:password@host1,host2/name?…`), also with `host=` as a
    directory of a socket. Raises SettingsError where it is none.
    """

    def __init__(self, url: str | None, *, pool_size: int = 8) -> None:
        if not url:
            raise SettingsError(
                f"{SETTING} is not set; `mailgrpc up` brings a PostgreSQL of its own"
            )
        self._connector = Connector(url)
        self._timeout_s: float | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pool = _Pool(pool_size)
        self.engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=self._connect,
            isolation_level="AUTOCOMMIT",
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=CONNECT_TIMEOUT_S,
            json_deserializer=orjson.loads,
        )

    async def open(self) -> None:
        """Connect once, so that a wrong URL is told at the start.

        Raises StoreUnavailable, and SettingsError where the server does not know what it names.
        """
        try:
            await self.fetch("SELECT 1")
        except StoreUnavailable as error:
            raise told_at_start(error) from error

    async def close(self, within_s: float = _CLOSE_S) -> None:
        """Wait a little for the calls under way and end the connections, silent ones too."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s / 2)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s / 4):
                while self._pool.idle:
                    await self._pool.idle.pop().close()
                await self.engine.dispose()
        for connection in list(self._pool.open):
            connection.terminate()
        if self._tasks:  # what they waited for has just failed
            await asyncio.wait(self._tasks, timeout=within_s / 4)

    def with_patience(self, timeout_s: float) -> Database:
        """The same pool, whose statements hold a silent server for gone after this."""
        impatient = copy.copy(self)
        impatient._timeout_s = timeout_s  # noqa: SLF001  our own
        return impatient

    async def fetch(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        """Run one statement that only reads, and return its rows."""
        return await self._run(
            lambda connection: connection.fetch(sql, *args, timeout=self._timeout_s), writes=False
        )

    async def write(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        """Run one statement that writes, as a transaction of its own, and return its rows."""
        return await self._run(
            lambda connection: connection.fetch(sql, *args, timeout=self._timeout_s), writes=True
        )

    async def confirm(self) -> None:
        """Return once what is committed is where a commit has to be, on a synchronous standby too.

        For an answer that rests on what another process wrote, and nothing of one's own. Raises
        StoreUnavailable.
        """
        await self.write(_CONFIRM)

    async def select(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        """Run a query composed with SQLAlchemy, and return its rows."""

        async def run() -> Sequence[sa.Row[Any]]:
            async with self._connection() as held:
                pooled, connection = held.pooled, held.connection
                # The driver's own time-out cannot be reached through SQLAlchemy.
                patience = self._timeout_s or COMMAND_TIMEOUT_S
                timer = asyncio.get_running_loop().call_later(patience, self._silent, connection)
                try:
                    rows: Sequence[sa.Row[Any]] = (await pooled.execute(query)).all()
                    return rows
                except sa.exc.DBAPIError as error:
                    cause = error.orig.__cause__ if error.orig is not None else None
                    if isinstance(cause, (*_NOT_BEGUN, *_UNDONE, *_BROKEN)):
                        raise StoreUnavailable(str(cause)) from error
                    raise
                except (*_NOT_BEGUN, *_UNDONE, *_BROKEN) as error:
                    raise StoreUnavailable(str(error)) from error
                finally:
                    timer.cancel()

        return await self._uncancelled(run())

    async def _run(self, call: Call[T], *, writes: bool) -> T:
        async def run() -> T:
            for attempt in range(_TRIES_ON_CONFLICT):
                try:
                    return await self._run_once(call, writes=writes)
                except _CONFLICTS:
                    if attempt == _TRIES_ON_CONFLICT - 1:
                        raise
            raise AssertionError("unreachable")

        return await self._uncancelled(run())

    async def _run_once(self, call: Call[T], *, writes: bool) -> T:
        async with self._connection() as held:
            try:
                if writes:
                    return await self._write(held, call)
                return await call(held.connection)
            except (*_NOT_BEGUN, *_UNDONE, *_BROKEN) as error:
                if isinstance(error, TimeoutError):
                    await _cancel_there(held.connection)
                    self._silent(held.connection)
                raise _given_up(held.connection, error, writes=writes) from error
            except asyncpg.PostgresError as error:
                if (ours := _OUR_ERRORS.get(error.sqlstate or "")) is not None:
                    raise ours(str(error)) from None
                raise

    async def _write(self, held: _Pooled, call: Call[T]) -> T:
        """Run a statement that writes, and no doubt about it is left. Counts those that are."""
        try:
            result = await held.committed(call)
            if (doubts := self._pool.doubts) and self._pool.is_in_doubt:
                await self._confirm(held)
                self._pool.confirm(doubts)
        except (AmbiguousCommit, *_BROKEN):
            self._pool.doubt()
            raise
        return result

    async def _confirm(self, held: _Pooled) -> None:
        """Wait until the standby has all so far. What fails leaves what was committed in doubt."""
        try:
            await held.committed(lambda c: c.execute(_CONFIRM, timeout=self._timeout_s))
        except (*_NOT_BEGUN, *_UNDONE) as error:
            held.connection.terminate()
            raise AmbiguousCommit(str(error)) from error

    def _silent(self, connection: Connection) -> None:
        """Nothing came back in time: this connection is lost, and so is what leads to the same."""
        _cut(connection)
        self._pool.end_idle()
        self._connector.met_silence()

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[_Pooled]:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S if self._pool.free.locked() else None):
                await self._pool.free.acquire()
        except TimeoutError as error:
            raise StoreUnavailable("no connection became free in time") from error
        try:
            held = await self._taken()
            try:
                yield held
            finally:
                if held.connection.is_closed():
                    await held.close()
                else:
                    self._pool.idle.append(held)
        finally:
            self._pool.free.release()

    async def _taken(self) -> _Pooled:
        """A connection that lay idle, or else a new one."""
        while self._pool.idle:
            held = self._pool.idle.pop()
            if not held.connection.is_closed():
                return held
            await held.close()  # it ended meanwhile: no statement of ours is in doubt over that
        pooled = self.engine.connect()
        try:
            await pooled.start()
        except (sa.exc.TimeoutError, sa.exc.DBAPIError, asyncpg.PostgresError, *_BROKEN) as error:
            raise StoreUnavailable(str(error) or type(error).__name__) from error
        raw = await pooled.get_raw_connection()
        return _Pooled(pooled, cast("Connection", raw.driver_connection))

    async def _uncancelled(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited may have gone; it is not "never retrieved"

    async def _connect(self) -> Connection:
        connection = await self._connector.connect(
            command_timeout=COMMAND_TIMEOUT_S, application_name="mailgrpc"
        )
        # With `off` a crash hands out the same sequence numbers again.
        try:
            now = await connection.fetchval("SHOW synchronous_commit", timeout=CONNECT_TIMEOUT_S)
            if now == "off":
                await connection.execute("SET synchronous_commit = on", timeout=CONNECT_TIMEOUT_S)
        except BaseException:
            connection.terminate()
            raise
        self._pool.open.add(connection)
        return connection


def _cut(connection: Connection) -> None:
    """End a connection that is in doubt, and what of it is still in the kernel's hands with it.

    A closed socket goes on sending what it holds, for minutes: an insert that arrives after its
    message was sent and cleared would send it once more. (A pooler between may hold it all the same:
    docs/reliability.md.)
    """
    transport = getattr(connection, "_transport", None)  # nothing public leads to it
    held = transport.get_extra_info("socket") if transport is not None else None
    if held is not None:
        # Where the other end was first it has no socket any more: OSError, uvloop's is a ValueError.
        with contextlib.suppress(OSError, ValueError):
            held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.terminate()


async def _cancel_there(connection: Connection) -> None:
    """Give the driver a moment to ask the server to stop a statement that took too long.

    One that waits for a standby would otherwise keep its session, and its locks, for as long as the
    standby is away, and every new try would add another.
    """
    asking = set(getattr(connection, "_cancellations", ()))  # nothing public tells of it
    if asking:
        await asyncio.wait(asking, timeout=_CANCEL_S)


def _given_up(connection: Connection, error: Exception, *, writes: bool) -> StoreUnavailable:
    """What an error means for the caller of a statement; ends a connection that is of no more use."""
    text = str(error) or type(error).__name__
    if isinstance(error, _NOT_BEGUN):
        # Its server has changed: it would refuse for ever what another connection may do.
        connection.terminate()
        return StoreUnavailable(text)
    if isinstance(error, _UNDONE):
        return StoreUnavailable(text)
    # A connection in doubt is not used again.
    _cut(connection)
    return AmbiguousCommit(text) if writes else StoreUnavailable(text)
