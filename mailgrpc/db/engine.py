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

Connections demand a server that accepts writes, so that after a fail-over one URL with several
hosts finds the new primary. SQLAlchemy pools the connections and composes the queries whose shape
varies; the hot statements go to asyncpg directly, with arrays.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import asyncpg
import sqlalchemy as sa
from asyncpg.connect_utils import SessionAttribute
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from mailgrpc.errors import MailgrpcError, SettingsError, StoreUnavailable

T = TypeVar("T")
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
log = logging.getLogger(__name__)

SCHEMA = "mailgrpc"
CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 60.0
"""A server that stays silent for so long is not there; nothing of ours takes a tenth of it."""
_TRIES_ON_CONFLICT = 5


class AmbiguousCommit(StoreUnavailable):
    """The connection broke, or a wait for the standby was cut short, after a write was sent."""


class SessionEnded(MailgrpcError):
    """The worker session was ended by the reaper: it may claim and start nothing more."""


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


async def connect(url: str, *, command_timeout: float | None, application_name: str) -> Connection:
    """One connection to a server that takes writes, with our schema in its path."""
    return await asyncpg.connect(
        url,
        timeout=CONNECT_TIMEOUT_S,
        command_timeout=command_timeout,
        target_session_attrs=SessionAttribute.read_write,
        server_settings={
            "application_name": application_name,
            "search_path": SCHEMA,
            # Short statements over arrays: compiling them costs more than running them.
            "jit": "off",
        },
    )


class Database:
    """The pool of connections of one process to one database.

    `url` is a libpq URL (`postgresql://user:password@host1,host2/name?…`), also with `host=` as a
    directory of a socket.
    """

    def __init__(self, url: str | None, *, pool_size: int = 8) -> None:
        if not url:
            raise SettingsError(
                "MAILGRPC_DATABASE_URL is not set; `mailgrpc up` brings a PostgreSQL of its own"
            )
        self._url = url
        self._timeout_s: float | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=self._connect,
            isolation_level="AUTOCOMMIT",
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=CONNECT_TIMEOUT_S,
        )

    async def open(self) -> None:
        """Connect once, so that a wrong URL is told at the start. Raises StoreUnavailable."""
        await self.fetch("SELECT 1")

    async def close(self) -> None:
        """Wait for the calls under way and end the connections."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CONNECT_TIMEOUT_S)
        await self.engine.dispose()

    def with_patience(self, timeout_s: float) -> Database:
        """The same pool, whose `fetch` and `write` hold a silent server for gone after this."""
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

    async def select(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        """Run a query composed with SQLAlchemy, and return its rows."""

        async def run() -> Sequence[sa.Row[Any]]:
            try:
                async with self.engine.connect() as connection:
                    rows: Sequence[sa.Row[Any]] = (await connection.execute(query)).all()
                    return rows
            except sa.exc.DBAPIError as error:
                cause = error.orig.__cause__ if error.orig is not None else None
                if isinstance(cause, (*_NOT_BEGUN, *_UNDONE, *_BROKEN)):
                    raise StoreUnavailable(str(cause)) from error
                raise
            except (sa.exc.TimeoutError, *_NOT_BEGUN, *_UNDONE, *_BROKEN) as error:
                raise StoreUnavailable(str(error)) from error

        return await self._uncancelled(run())

    async def _run(self, call: Callable[[Connection], Awaitable[T]], *, writes: bool) -> T:
        async def run() -> T:
            for attempt in range(_TRIES_ON_CONFLICT):
                try:
                    return await self._run_once(call, writes=writes)
                except _CONFLICTS:
                    if attempt == _TRIES_ON_CONFLICT - 1:
                        raise
            raise AssertionError("unreachable")

        return await self._uncancelled(run())

    async def _run_once(self, call: Callable[[Connection], Awaitable[T]], *, writes: bool) -> T:
        async with self._connection() as connection:
            cut_short: list[str] = []

            def listen(_connection: Any, message: Any) -> None:
                if message.sqlstate == "01000" and "synchronous" in str(message).lower():
                    cut_short.append(str(message))

            if writes:
                connection.add_log_listener(listen)
            try:
                result = await call(connection)
            except (*_NOT_BEGUN, *_UNDONE, *_BROKEN) as error:
                raise _given_up(connection, error, writes=writes) from error
            except asyncpg.PostgresError as error:
                if (ours := _OUR_ERRORS.get(error.sqlstate or "")) is not None:
                    raise ours(str(error)) from None
                raise
            finally:
                if writes and not connection.is_closed():
                    connection.remove_log_listener(listen)
            if cut_short:
                # Committed here, perhaps not on the standby that may become the primary.
                raise AmbiguousCommit(cut_short[0])
            return result

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        pooled, connection = await self._check_out()
        while connection.is_closed():
            # The server ended it while it lay idle: no statement of ours is in doubt over that.
            await pooled.invalidate()
            await pooled.close()
            pooled, connection = await self._check_out()
        try:
            yield connection
        finally:
            if connection.is_closed():
                await pooled.invalidate()
            await pooled.close()

    async def _check_out(self) -> tuple[AsyncConnection, Connection]:
        pooled = self.engine.connect()
        try:
            await pooled.start()
        except (sa.exc.TimeoutError, sa.exc.DBAPIError, asyncpg.PostgresError, *_BROKEN) as error:
            raise StoreUnavailable(str(error) or type(error).__name__) from error
        raw = await pooled.get_raw_connection()
        return pooled, cast("Connection", raw.driver_connection)

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
        connection = await connect(
            self._url, command_timeout=COMMAND_TIMEOUT_S, application_name="mailgrpc"
        )
        # With `off` a crash hands out the same sequence numbers again.
        try:
            now = await connection.fetchval("SHOW synchronous_commit", timeout=CONNECT_TIMEOUT_S)
            if now == "off":
                await connection.execute("SET synchronous_commit = on", timeout=CONNECT_TIMEOUT_S)
        except BaseException:
            connection.terminate()
            raise
        return connection


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
    connection.terminate()
    return AmbiguousCommit(text) if writes else StoreUnavailable(text)
