"""Everything of a run that can be hurt: servers, workers, PostgreSQL, Valkey, the lines between.

Programs are started as an operator starts them and are told nothing; they are killed by their pid.
The providers and their ledger are outside, and nothing happens to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
from redis.asyncio import Redis

from mailgrpc.db.migrate import migrate
from mailgrpc.embedded.postgres import EmbeddedPostgres
from mailgrpc.embedded.valkey import EmbeddedValkey
from tests.faults.entry import FULL
from tests.faults.nursery import Child, Nursery
from tests.faults.proxy import Proxy, to_postgres, url_through

LEASE_S = 3.0
PATIENCE_S = 60.0
ENDS_WITHIN_S = 10.0
"""From SIGTERM on: the grace time, and as much again for a machine that is busy."""


@dataclass(slots=True)
class Program:
    """A `serve` or a `work`, in one life after the other."""

    kind: str
    environ: dict[str, str]
    log: Path
    nursery: Nursery
    process: Child | None = None
    is_frozen: bool = False
    lives: int = 0
    aim: str = ""
    ending: str = ""  # what this life is being ended by, where that is known
    begun_at: float = 0.0
    _born_at: int = 0  # where in the log this life begins

    async def start(self, aim: str = "", **environ: str) -> None:
        """A new life; `aim` says where it is to end (mailgrpc/failpoints.py)."""
        self.lives += 1
        self.is_frozen, self.aim, self.ending, self.begun_at = False, aim, "", time.time()
        self.log.touch()
        self._born_at = self.log.stat().st_size
        environ = self.environ | environ | {"MAILGRPC_FAILPOINTS": aim}
        self.process = await self.nursery.bear([self.kind], environ, self.log)

    @property
    def who(self) -> str:
        return "server" if self.kind == "serve" else "worker"

    @property
    def place(self) -> str:
        """The failpoint that it is aimed at."""
        return self.aim.partition("=")[0]

    @property
    def said(self) -> str:
        """What this life has logged."""
        with self.log.open("rb") as log:
            log.seek(self._born_at)
            return log.read().decode(errors="replace")

    @property
    def is_ready(self) -> bool:
        """Whether it lives and has said that it does its work."""
        return self.lives_on and ("serving on" in self.said or "working on" in self.said)

    @property
    def has_stopped_itself(self) -> bool:
        """Whether a failpoint froze it (where the system can tell: Linux)."""
        if not self.lives_on or self.is_frozen or "=freeze" not in self.aim:
            return False
        assert self.process is not None
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] == "T"
        return False

    @property
    def lives_on(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def send(self, number: signal.Signals) -> None:
        """A signal, if it lives."""
        if self.lives_on:
            assert self.process is not None
            self.process.send_signal(number)
            if number in (signal.SIGSTOP, signal.SIGCONT):
                self.is_frozen = number is signal.SIGSTOP

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send(signal.SIGKILL)
        if self.process is not None:
            await self.process.wait()

    async def end(self, within_s: float) -> int | None:
        """SIGTERM, as an orchestrator does; its exit code, or None where it had to be killed."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        assert self.process is not None
        try:
            return await asyncio.wait_for(self.process.wait(), within_s)
        except TimeoutError:
            await self.kill()
            return None


@dataclass(slots=True)
class World:
    """What a run stands on. Made by `a_world`."""

    directory: Path
    postgres: EmbeddedPostgres
    valkey: EmbeddedValkey
    lines: dict[str, Proxy]  # SMTP, HTTP, PostgreSQL
    environ: dict[str, str]
    nursery: Nursery
    servers: list[Program] = field(default_factory=list)
    workers: list[Program] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)

    @property
    def ledger(self) -> Path:
        return self.directory / "ledger"

    @property
    def behind_line(self) -> dict[str, str]:
        """The setting of a program that reaches PostgreSQL by way of the proxy."""
        url = url_through(self.lines["PostgreSQL"], self.postgres.url)
        return {"MAILGRPC_DATABASE_URL": url}

    def behave(self, mood: str) -> None:
        """The providers: `hold`, `sure`, or as they are ("")."""
        (self.directory / "mood").write_text(mood)

    def fill_disk(self, full: bool) -> None:
        """Under the journals of all workers."""
        flag = Path(self.environ[FULL])
        if full:
            flag.touch()
        else:
            flag.unlink(missing_ok=True)

    async def add(self, kind: str, **environ: str) -> Program:
        """One more program."""
        programs = self.servers if kind == "serve" else self.workers
        log = self.directory / f"{kind}-{len(programs)}.log"
        program = Program(kind, self.environ | environ, log, self.nursery)
        if kind == "serve":
            port = free_port()
            self.targets.append(f"127.0.0.1:{port}")
            program.environ["MAILGRPC_LISTEN"] = self.targets[-1]
        programs.append(program)
        await program.start()
        return program

    async def crash_postgres(self) -> None:
        """At once, without a checkpoint: what is not in the WAL is gone."""
        assert self.postgres.process is not None
        self.postgres.process.send(signal.SIGQUIT)
        await asyncio.to_thread(self.postgres.process.ended.wait, PATIENCE_S)

    async def revive_postgres(self) -> None:
        await asyncio.to_thread(self.postgres.start)

    async def kill_backend(self) -> None:
        """One of PostgreSQL's processes; it then ends all the others and recovers by itself."""
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            connection = await asyncpg.connect(self.postgres.url, timeout=5)
            pid = await connection.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
                " AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1"
            )
            await connection.close()
            if pid is not None:
                os.kill(pid, signal.SIGKILL)

    async def kill_valkey(self) -> None:
        assert self.valkey.process is not None
        self.valkey.process.send(signal.SIGKILL)
        await asyncio.to_thread(self.valkey.process.ended.wait, PATIENCE_S)

    async def revive_valkey(self) -> None:
        await asyncio.to_thread(self.valkey.start)

    async def tell_valkey(self, *command: str) -> None:
        redis = Redis.from_url(self.valkey.url)
        try:
            await redis.execute_command(*command)
        finally:
            await redis.aclose()


@contextlib.asynccontextmanager
async def a_world(seed: int, *, durable: bool = True, patch: str = "lossy") -> AsyncIterator[World]:
    """The stores, the providers and the line to them; programs are added by the caller."""
    with tempfile.TemporaryDirectory(prefix="mailgrpc-faults-") as name:
        directory = Path(name)
        (directory / "mood").write_text("")
        (directory / "ledger").touch()
        outside = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.faults.providers"),
            *(str(directory / "ledger"), str(seed), str(directory / "mood")),
            stdin=asyncio.subprocess.PIPE,  # its end is the provider's
            stdout=asyncio.subprocess.PIPE,
        )
        assert outside.stdout is not None
        smtp, http = map(int, (await outside.stdout.readline()).split())
        postgres, valkey = EmbeddedPostgres(durable=durable), EmbeddedValkey()
        world: World | None = None
        try:
            await asyncio.to_thread(postgres.start)
            await asyncio.to_thread(valkey.start)
            await asyncio.to_thread(migrate, postgres.url)
            lines = {
                "SMTP": Proxy(smtp),
                "HTTP": Proxy(http),
                "PostgreSQL": to_postgres(postgres.url),
            }
            async with contextlib.AsyncExitStack() as stack:
                for line in lines.values():
                    await stack.enter_async_context(line)
                ports = (lines["SMTP"].port, lines["HTTP"].port)
                environ = _environ(directory, postgres, valkey, *ports, patch)
                nursery = await stack.enter_async_context(Nursery())
                world = World(directory, postgres, valkey, lines, environ, nursery)
                try:
                    yield world
                finally:
                    for program in (*world.servers, *world.workers):
                        await program.kill()
        finally:
            outside.kill()
            await outside.wait()
            await asyncio.to_thread(valkey.stop, now=True)
            await asyncio.to_thread(postgres.stop, now=True)


def _environ(
    directory: Path,
    postgres: EmbeddedPostgres,
    valkey: EmbeddedValkey,
    smtp: int,
    http: int,
    patch: str,
) -> dict[str, str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MAILGRPC_")}
    return environ | {
        "MAILGRPC_DATABASE_URL": postgres.url,
        "MAILGRPC_REDIS_URL": valkey.url,
        "MAILGRPC_CHANNEL_URL": f"smtp://127.0.0.1:{smtp}?tls=none&timeout=2&connect_timeout=2",
        "MAILGRPC_CHANNEL_HTTP_URL": f"sendgrid://:KEY@127.0.0.1:{http}?scheme=http&timeout=2",
        "MAILGRPC_DATA_DIR": str(directory),
        "MAILGRPC_LEASE_S": str(LEASE_S),
        "MAILGRPC_GRACE_S": "4",
        "MAILGRPC_ATTEMPT_TIMEOUT_S": "4",
        "MAILGRPC_LOG_FORMAT": "text",
        "FAULTS_PATCH": patch,
        FULL: str(directory / "full"),
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def until(condition, within_s: float = PATIENCE_S, every_s: float = 0.05) -> None:
    """Return when `condition` (a function, of a value or of an awaitable) holds."""
    ends_at = time.monotonic() + within_s
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        assert time.monotonic() < ends_at, "it did not come to this in time"
        await asyncio.sleep(every_s)
