"""All of mailgrpc on one machine: what `mailgrpc up` starts, in which order, with which settings.

    postgres, valkey, inbox     side by side; each only where the settings name none
    migrate                     once
    server, worker              side by side

A part that is started here is told to the children by their environment. Everything else they
read for themselves: they have our environment and our working directory.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from mailgrpc.config import Settings
from mailgrpc.core.message import DEFAULT_CHANNEL
from mailgrpc.embedded.accounts import make_data_directory
from mailgrpc.embedded.command import Command, python_command
from mailgrpc.embedded.familylog import FamilyLog
from mailgrpc.embedded.locks import FamilyLock
from mailgrpc.embedded.postgres import EmbeddedPostgres
from mailgrpc.embedded.process import inherited_environ
from mailgrpc.embedded.supervisor import Server, Supervisor
from mailgrpc.embedded.valkey import EmbeddedValkey


class Part(enum.Enum):
    """What can be started. The value is its name in the log."""

    POSTGRES = "postgres"
    VALKEY = "valkey"
    SERVER = "server"
    WORKER = "worker"
    INBOX = "inbox"


EVERYTHING = frozenset(Part)


@dataclass(frozen=True, slots=True)
class Running:
    """One line of the report: a part, and its version or address. `ours`: started here."""

    part: Part
    detail: str
    ours: bool = True


class Stack:
    """The parts, started by `start` (or `async with`), ended by `stop`.

    Parts that the settings already name (`database_url`, `redis_url`, the channel `default`) are
    not started. Ports: `settings.listen` may have port 0; a taken inbox port means another one.
    With `durable=False` PostgreSQL syncs nothing and its data goes with `stop`: for tests and
    demonstrations. `environ` is added to the children's environment. Once started, `database_url`, `redis_url`, `listen` and `inbox` say what runs
    where, and `running` all of it in the order of `Part`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        parts: Iterable[Part] = EVERYTHING,
        durable: bool = True,
        log: FamilyLog | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.data_dir = settings.data_dir.absolute()
        self.database_url = settings.database_url
        self.redis_url = settings.redis_url
        self.listen: str | None = None
        self.inbox: str | None = None
        self.running: list[Running] = []
        self._settings = settings
        self._parts = frozenset(parts)
        self._durable = durable
        self._log = log
        self._extra_environ = dict(environ or {})
        self._lock = FamilyLock(self.data_dir)
        self._supervisor = Supervisor(lambda name, text: self._say(text, name))

    async def start(self) -> None:
        """Start all parts; returns when each is ready. Call `stop` also when this raises.

        Raises EmbeddedError, whose text says what to do.
        """
        make_data_directory(self.data_dir)
        with contextlib.suppress(FileExistsError), (self.data_dir / ".gitignore").open("x") as file:
            file.write("*\n")
        await self._supervisor.run(_TakeLock(self._lock, self._say))
        await self._start_stores()
        if self._parts & {Part.SERVER, Part.WORKER}:
            await self._supervisor.run(self._command("migrate", "migrate"))
        await self._start_ours()
        self.running.sort(key=lambda running: list(Part).index(running.part))

    async def wait(self) -> None:
        """Wait until a part cannot be kept running, and raise its EmbeddedError."""
        await self._supervisor.wait()

    async def stop(self) -> None:
        """End all parts in reverse order, each within its grace. Can be repeated."""
        await self._supervisor.stop()
        self._lock.release()

    def hurry(self) -> None:
        """Make `stop` kill instead of asking. PostgreSQL recovers at its next start."""
        self._supervisor.hurry()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def _start_stores(self) -> None:
        """What the settings name none of: PostgreSQL, Valkey, the inbox."""
        given = {
            Part.POSTGRES: self.database_url,
            Part.VALKEY: self.redis_url,
            Part.INBOX: self._settings.channels.get(DEFAULT_CHANNEL),
        }
        servers: dict[Part, Server] = {}
        for part, url in given.items():
            if part not in self._parts:
                continue
            if url is None:
                servers[part] = self._store(part)
            elif part is not Part.INBOX:
                self.running.append(Running(part, _place_of(url), ours=False))
        if not servers:
            return
        shown = await self._supervisor.start(*servers.values())
        for (part, server), detail in zip(servers.items(), shown, strict=True):
            self.running.append(Running(part, detail))
            if isinstance(server, EmbeddedPostgres):
                self.database_url = server.url
            elif isinstance(server, EmbeddedValkey):
                self.redis_url = server.url

    def _store(self, part: Part) -> Server:
        hear = self._listener(part.value, timed=True)
        match part:
            case Part.POSTGRES:
                return EmbeddedPostgres(
                    self.data_dir if self._durable else None,
                    durable=self._durable,
                    lock=self._lock,
                    on_line=hear,
                )
            case Part.VALKEY:
                return EmbeddedValkey(locks=[self._lock.fd], on_line=hear)
        inbox = Command(
            part.value,
            python_command("mailgrpc.embedded.inbox", "--any-port"),
            self._environ(),
            locks=[self._lock.fd],
            on_line=self._listener(part.value, timed=False),
            on_ready=lambda address: self._pin_inbox(inbox, address),
        )
        return inbox

    async def _start_ours(self) -> None:
        """The server and the worker."""
        commands: dict[Part, Command] = {}
        if Part.SERVER in self._parts:
            server = commands[Part.SERVER] = self._command("server", "serve")
            server.on_ready = lambda address: self._pin_server(server, address)
        if Part.WORKER in self._parts:
            commands[Part.WORKER] = self._command("worker", "work")
        if commands:
            shown = await self._supervisor.start(*commands.values())
            self.running += map(Running, commands, shown)

    def _command(self, name: str, subcommand: str) -> Command:
        return Command(
            name,
            python_command("mailgrpc", subcommand),
            self._environ(),
            grace_s=self._settings.grace_s + 5.0,  # its own grace, and a while to say good-bye
            locks=[self._lock.fd],
            on_line=self._listener(name, timed=False),
        )

    def _pin_server(self, server: Command, address: str) -> None:
        """Started again, it listens where its clients know it to be."""
        self.listen = address
        server.environ["MAILGRPC_LISTEN"] = address

    def _pin_inbox(self, inbox: Command, address: str) -> None:
        self.inbox = address
        inbox.environ["MAILGRPC_INBOX_SMTP_LISTEN"] = address
        inbox.argv = python_command("mailgrpc.embedded.inbox")

    def _environ(self) -> dict[str, str]:
        """What a child finds: ours, and where the parts are that run by now."""
        environ = inherited_environ() | {
            "PYTHONUNBUFFERED": "1",
            "MAILGRPC_UNDER_UP": "1",
            "MAILGRPC_DATA_DIR": str(self.data_dir),
            "MAILGRPC_LISTEN": str(self._settings.listen),
            "MAILGRPC_INBOX_SMTP_LISTEN": str(self._settings.inbox_smtp_listen),
        }
        if self.database_url is not None:
            environ["MAILGRPC_DATABASE_URL"] = self.database_url
        if self.redis_url is not None:
            environ["MAILGRPC_REDIS_URL"] = self.redis_url
        if self.inbox is not None:
            environ["MAILGRPC_CHANNEL_URL"] = f"smtp://{self.inbox}"
        return environ | self._extra_environ

    def _listener(self, name: str, *, timed: bool) -> Callable[[str], None]:
        log = self._log
        if log is None:
            return lambda _line: None
        return lambda line: log.pass_on(name, line, timed=timed)

    def _say(self, text: str, name: str = "up") -> None:
        if self._log is not None:
            self._log.say(text, name)


@dataclass(frozen=True, slots=True)
class _TakeLock:
    """The first step: wait until nothing of an earlier run lives in the data directory."""

    lock: FamilyLock
    say: Callable[[str], None]

    def run(self) -> None:
        self.lock.acquire(self.say)

    def stop(self, *, now: bool = False) -> None:  # noqa: ARG002  as a Step's
        self.lock.abandon()


def _place_of(url: str) -> str:
    """Host and port of a URL, without its secrets."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] or parts.path
