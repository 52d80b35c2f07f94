"""The gateway for tests: the real server and worker, in a thread with an event loop of its own.

Tests are blocking or run loops of their own, one each; the gateway outlives them all, so it
needs its own. Everything it is given is said here: no setting of the developer's environment
reaches it, so that no test can ever send a mail.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Self

import asyncpg

from mailgrpc.client import MailClient
from mailgrpc.config import HostPort, Settings, load_settings
from mailgrpc.core.message import DEFAULT_CHANNEL
from mailgrpc.db.engine import Database
from mailgrpc.db.schema import migrate
from mailgrpc.embedded.binaries import find_valkey
from mailgrpc.embedded.postgres import EmbeddedPostgres
from mailgrpc.embedded.valkey import EmbeddedValkey
from mailgrpc.errors import EmbeddedError
from mailgrpc.server.app import MailServer
from mailgrpc.testing.outbox import Outbox, Tray, TrayProvider
from mailgrpc.v1.delivery_pb2 import Delivery, DeliveryState, WaitReason
from mailgrpc.v1.mail_service_pb2 import Snapshot
from mailgrpc.worker.runtime import Worker

_TICK = timedelta(milliseconds=1)
"""A message's id tells when it was accepted to the millisecond."""
_STOP_S = 5.0


class TestGateway:
    """A context manager; blocking. `target` is where gRPC listens.

    `categories` names flag bits, `channels` the channels that messages may ask for.
    `database_url` is a PostgreSQL server to use, by default that of MAILGRPC_TEST_DATABASE_URL,
    else an embedded one. `listen` is where; port 0 is a free one.
    """

    __test__ = False  # not a test, for all its name

    def __init__(
        self,
        *,
        categories: Mapping[str, int] | None = None,
        channels: Sequence[str] = (DEFAULT_CHANNEL,),
        database_url: str | None = None,
        listen: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.target = ""
        self._categories = dict(categories or {})
        self._channels = tuple(channels)
        self._server_url = database_url or load_settings().test_database_url
        self._listen = HostPort(listen, port)
        self._tray = Tray()
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as resources:
            database_url = resources.enter_context(self._database())
            settings = Settings(
                listen=self._listen,
                database_url=database_url,
                redis_url=resources.enter_context(_valkey()),
                categories=self._categories,
                channels=dict.fromkeys(self._channels, "capture:"),
                grace_s=_STOP_S,
            )
            migrate(database_url)
            self.target = resources.enter_context(_running(settings, self._tray))
            self._client = resources.enter_context(MailClient(self.target))
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._resources.close()

    def new_outbox(self) -> Outbox:
        """An outbox of what is enqueued from now on."""
        # From the next tick of the ids' clock on, and not before it has come: what was enqueued a
        # moment ago must lie behind it, what will be in a moment must not.
        now = datetime.now(UTC)
        since = now.replace(microsecond=now.microsecond // 1000 * 1000) + _TICK
        threading.Event().wait((since - now).total_seconds())
        return Outbox(self._tray, since, self._settle)

    def _settle(self, timeout_s: float) -> None:
        """Wait until no delivery is about to be sent."""
        moving: dict[str, Delivery] = {}
        caught_up = False
        snapshot = Snapshot.SNAPSHOT_UNENDED
        with self._client.watch(snapshot=snapshot, stop_after_s=timeout_s) as watch:
            for update in watch.updates():
                if update.snapshot_begins:
                    moving.clear()
                told = [delivery for message in update.snapshot for delivery in message.deliveries]
                told += [event.state_changed.delivery for event in update.events]
                for delivery in told:
                    moving.pop(delivery.delivery_id, None)
                    if _is_moving(delivery):
                        moving[delivery.delivery_id] = delivery
                caught_up = caught_up or update.caught_up
                if caught_up and not moving:
                    return
        to = ", ".join(sorted(delivery.recipient for delivery in moving.values()))
        raise AssertionError(f"after {timeout_s:g} s mail is still about to be sent to {to}")

    @contextlib.contextmanager
    def _database(self) -> Iterator[str]:
        """An empty database, gone afterwards."""
        if self._server_url is None:
            with EmbeddedPostgres(durable=False) as postgres:
                yield postgres.url
            return
        server_url = self._server_url
        name = f"mailgrpc_test_{os.getpid()}_{secrets.token_hex(4)}"
        asyncio.run(_execute(server_url, f"CREATE DATABASE {name}"))
        try:
            base, _, rest = server_url.rpartition("/")
            query = rest.partition("?")[1:]
            yield "".join((base, "/", name, *query))
        finally:
            asyncio.run(_execute(server_url, f"DROP DATABASE {name} WITH (FORCE)"))


async def _execute(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


@contextlib.contextmanager
def _valkey() -> Iterator[str | None]:
    """A Valkey where its wheel is installed; without one mail is sent, up to two seconds later."""
    try:
        find_valkey()
    except EmbeddedError:
        yield None
        return
    with EmbeddedValkey() as valkey:
        yield valkey.url


@contextlib.contextmanager
def _running(settings: Settings, tray: Tray) -> Iterator[str]:
    """The server and the worker in a thread; where the server listens."""
    ready: Future[tuple[str, Callable[[], object]]] = Future()

    def run() -> None:
        try:
            asyncio.run(_serve(settings, tray, ready))
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    thread = threading.Thread(target=run, name="mailgrpc-gateway", daemon=True)
    thread.start()
    target, stop = ready.result()
    try:
        yield target
    finally:
        stop()
        thread.join(3 * _STOP_S)


async def _serve(
    settings: Settings, tray: Tray, ready: Future[tuple[str, Callable[[], object]]]
) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    channels = {name: TrayProvider(tray) for name in settings.channels}
    database = Database(settings.database_url, pool_size=settings.database_pool)
    try:
        server = MailServer(settings, database, channels=channels)
        worker = Worker(settings, database, channels=channels)
        where = await server.start()
        await worker.start()
        ready.set_result((str(where), lambda: loop.call_soon_threadsafe(stopped.set)))
        await stopped.wait()
        await worker.stop(_STOP_S)
        await server.stop(0.5)
    finally:
        await database.close()


def _is_moving(delivery: Delivery) -> bool:
    if delivery.state == DeliveryState.DELIVERY_STATE_QUEUED:
        return delivery.wait_reason in (
            WaitReason.WAIT_REASON_UNSPECIFIED,
            WaitReason.WAIT_REASON_DUE,
        )
    return delivery.state == DeliveryState.DELIVERY_STATE_SENDING
