"""The gateway for tests: the real server and worker, as a process of their own.

Not a thread, though that would start sooner: gRPC's asyncio shares one poller among all event
loops of a process, and one loop that was closed (every test of pytest-asyncio closes one) makes
it drop the wake-ups of the others. What the gateway sent comes back over a socket (`outbox`).

Everything that it is given is said here. No setting of the developer's environment reaches it, so
that no test can ever send a mail.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from mailgrpc.client import MailClient
from mailgrpc.config import PREFIX, load_settings
from mailgrpc.embedded.accounts import make_private_directory
from mailgrpc.embedded.binaries import find_valkey
from mailgrpc.embedded.command import Command, python_command
from mailgrpc.embedded.postgres import EmbeddedPostgres
from mailgrpc.embedded.process import inherited_environ
from mailgrpc.embedded.valkey import EmbeddedValkey
from mailgrpc.errors import EmbeddedError
from mailgrpc.testing.outbox import Outbox, Tray
from mailgrpc.v1.delivery_pb2 import Delivery, DeliveryState, WaitReason
from mailgrpc.v1.mail_service_pb2 import Snapshot

log = logging.getLogger("mailgrpc.testing")

_TICK = timedelta(milliseconds=1)
"""A message's id tells when it was accepted to the millisecond."""


class TestGateway:
    """A context manager; blocking. `target` is where gRPC listens.

    `categories` names flag bits, `channels` the channels that messages may ask for.
    `database_url` is a PostgreSQL server to use, by default that of MAILGRPC_TEST_DATABASE_URL,
    else an embedded one. `listen` is where, as HOST:PORT; port 0 is a free one.
    """

    __test__ = False  # not a test, for all its name

    def __init__(
        self,
        *,
        categories: Mapping[str, int] | None = None,
        channels: Sequence[str] = ("default",),
        database_url: str | None = None,
        listen: str = "127.0.0.1:0",
    ) -> None:
        self.target = ""
        self._categories = dict(categories or {})
        self._channels = tuple(channels)
        self._server_url = database_url or load_settings().test_database_url
        self._listen = listen
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as resources:
            directory = resources.enter_context(_private_directory())
            self._tray = resources.enter_context(Tray(directory / "outbox"))
            database_url = resources.enter_context(_database(self._server_url))
            redis_url = resources.enter_context(_valkey())
            command = Command(
                "gateway",
                python_command("mailgrpc.testing.process", str(self._tray.path)),
                self._environ(directory, database_url, redis_url),
                on_line=log.warning,
            )
            resources.callback(command.stop)
            self.target = command.start()
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

    def _environ(self, directory: Path, database_url: str, redis_url: str | None) -> dict[str, str]:
        """The child's whole environment: ours without any setting, and the settings of a test."""
        no_file = directory / "mailgrpc.toml"
        no_file.touch()
        environ = {n: t for n, t in inherited_environ().items() if not n.startswith(PREFIX)}
        environ |= {
            "MAILGRPC_CONFIG": str(no_file),
            "MAILGRPC_LISTEN": self._listen,
            "MAILGRPC_DATABASE_URL": database_url,
            "MAILGRPC_CATEGORIES": ",".join(f"{n}={bit}" for n, bit in self._categories.items()),
            "MAILGRPC_LOG_LEVEL": "warning",
            "MAILGRPC_LOG_FORMAT": "text",
        }
        if redis_url is not None:
            environ["MAILGRPC_REDIS_URL"] = redis_url
        for name in self._channels:
            environ[f"MAILGRPC_CHANNEL_{name.upper().replace('-', '_')}_URL"] = "capture:"
        return environ

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
def _private_directory() -> Iterator[Path]:
    directory = make_private_directory(None)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _database(server_url: str | None) -> Iterator[str]:
    """The URL of an empty database that is gone afterwards."""
    if server_url is None:
        with EmbeddedPostgres(durable=False) as postgres:
            yield postgres.url
        return
    name = f"mailgrpc_test_{os.getpid()}_{secrets.token_hex(4)}"
    asyncio.run(_execute(server_url, f"CREATE DATABASE {name}"))
    try:
        yield urlunsplit(urlsplit(server_url)._replace(path=f"/{name}"))
    finally:
        try:
            asyncio.run(_execute(server_url, f"DROP DATABASE {name} WITH (FORCE)"))
        except asyncpg.InsufficientPrivilegeError:
            # Autovacuum is at work in it, which only a superuser may end; without force it is asked
            # to leave by itself.
            asyncio.run(_execute(server_url, f"DROP DATABASE {name}"))


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


def _is_moving(delivery: Delivery) -> bool:
    if delivery.state == DeliveryState.DELIVERY_STATE_QUEUED:
        return delivery.wait_reason in (
            WaitReason.WAIT_REASON_UNSPECIFIED,
            WaitReason.WAIT_REASON_DUE,
        )
    return delivery.state == DeliveryState.DELIVERY_STATE_SENDING
