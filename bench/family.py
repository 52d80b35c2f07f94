"""The processes that are measured: durable PostgreSQL, Valkey, `serve` and `work`, as shipped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg

from bench.machine import PLACE
from bench.memory import pss_mb, tree
from mailgrpc.db.migrate import migrate
from mailgrpc.embedded.postgres import EmbeddedPostgres
from mailgrpc.embedded.valkey import EmbeddedValkey

TICKS = os.sysconf("SC_CLK_TCK")
_LINES_SHOWN = 10
_TROUBLE = re.compile(r"warning|error", re.IGNORECASE)


class Child:
    """A process of ours that says when it is ready."""

    def __init__(self, *arguments: str, environ: dict[str, str] | None = None) -> None:
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mailgrpc", *arguments],
            env={**os.environ, **(environ or {}), "MAILGRPC_READY_FD": str(writing)},
            pass_fds=(writing,),
            stderr=subprocess.PIPE,
        )
        os.close(writing)
        with os.fdopen(reading) as ready:
            line = ready.readline()
        if not line:
            raise SystemExit(self.process.communicate()[1].decode())
        self.address = line.removeprefix("ready").strip()

    def cpu_s(self) -> float:
        """Processor seconds that it and its children used so far, user and system."""
        return tree_cpu_s(self.process.pid)

    def memory_mb(self) -> float:
        """What is resident and not shared with others (PSS), with its children."""
        return pss_mb(self.process.pid)

    def forget_peak(self) -> None:
        """Let `peak_mb` begin anew."""
        for pid in tree(self.process.pid):
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak_mb(self) -> float:
        """The most that was resident at once (VmHWM), with what is shared, and its children's."""
        return sum(_peak_kb(pid) for pid in tree(self.process.pid)) / 1024

    def stop(self) -> None:
        """End it, and repeat its warnings: a row in which it had some to tell is to be doubted."""
        self.process.terminate()
        said = self.process.communicate(timeout=40)[1].decode(errors="replace").splitlines()
        warnings = [line for line in said if _TROUBLE.search(line)]
        for line in warnings[:_LINES_SHOWN]:
            print(f"{self.process.args[3]}: {line}", file=sys.stderr)


def tree_cpu_s(pid: int) -> float:
    """Processor seconds of a process and all below it, with those that ended."""
    used = 0
    for each in tree(pid):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        used += sum(int(field) for field in fields[11:15])
    return used / TICKS


def _peak_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


class Family:
    """What the rows run against. `url` is a migrated, durable database, new for each row."""

    def __init__(self, url: str, superuser_url: str, redis_url: str, data: Path) -> None:
        self.url = url
        self.superuser_url = superuser_url
        self.redis_url = redis_url
        self._data = data
        self.environ = {
            "MAILGRPC_DATABASE_URL": url,
            "MAILGRPC_REDIS_URL": redis_url,
            "MAILGRPC_CHANNEL_URL": "capture:",
            "MAILGRPC_LISTEN": "127.0.0.1:0",
            "MAILGRPC_LOG_LEVEL": "warning",
            "MAILGRPC_CATEGORIES": "receipts=1",
            "MAILGRPC_DATA_DIR": str(data.parent / "worker"),  # the journal pays the same disk
        }

    @contextlib.contextmanager
    def running(self, *command: str, **environ: str) -> Iterator[Child]:
        """One of our programs, e.g. `running("serve")`, with settings of its own."""
        child = Child(*command, environ={**self.environ, **environ})
        try:
            yield child
        finally:
            child.stop()

    def sql(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """Ask the database, on a connection of its own."""
        return _ask(self.url, statement, *arguments)

    def as_superuser(self, statement: str) -> list[asyncpg.Record]:
        """What only PostgreSQL's superuser may, e.g. change its settings."""
        return _ask(self.superuser_url, statement)

    def stored(self) -> int:
        """How many messages there are."""
        return int(self.sql("SELECT count(*) AS n FROM messages")[0]["n"])

    def checkpoint(self) -> None:
        """Write all that is not written yet, so that what follows is not charged for it."""
        self.as_superuser("CHECKPOINT")

    def postgres_pid(self) -> int:
        """Its first process, above all others."""
        return int((self._data / "postgres" / "postmaster.pid").read_text().split()[0])

    def postgres_cpu_s(self) -> float:
        """Processor seconds of PostgreSQL so far."""
        return tree_cpu_s(self.postgres_pid())


def _ask(url: str, statement: str, *arguments: object) -> list[asyncpg.Record]:
    async def ask() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(url, server_settings={"search_path": "mailgrpc"})
        try:
            return list(await connection.fetch(statement, *arguments))
        finally:
            await connection.close()

    return asyncio.run(ask())


@contextlib.contextmanager
def family(*, commit_times: bool = False) -> Iterator[Family]:
    """Start the stores in a temporary place, with fsync and synchronous_commit on.

    `commit_times`: PostgreSQL remembers when each transaction was committed.
    """
    with tempfile.TemporaryDirectory(prefix="mailgrpc-bench-", dir=PLACE) as place:
        Path(place).chmod(0o711)
        data = Path(place) / "data"
        if commit_times:  # taken at the start alone
            with EmbeddedPostgres(data) as postgres:
                superuser_url = postgres.url_of("postgres", user="postgres")
                _ask(superuser_url, "ALTER SYSTEM SET track_commit_timestamp = on")
        with EmbeddedPostgres(data) as postgres, EmbeddedValkey() as valkey:
            migrate(postgres.url)
            superuser_url = postgres.url_of("postgres", user="postgres")
            yield Family(postgres.url, superuser_url, valkey.url, data)


@contextlib.contextmanager
def bare_server(kind: str = "bare_server") -> Iterator[str]:
    """A counterpart that serves, `bare_server` or `bare_stream`; its address."""
    with beside(f"bench.counterparts.{kind}") as process:
        assert process.stdout is not None
        yield f"127.0.0.1:{process.stdout.readline().strip()}"


@contextlib.contextmanager
def beside(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A module of ours as a process beside, with pipes for what it is told and what it tells."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def calls(target: str, **options: object) -> dict:
    """One Enqueue a call, by bench/load/calls.py: closed with `concurrency`, open with `rate`."""
    return generate("bench.load.calls", target, **options)


def batches(
    target: str, *, concurrency: int, size: int, seconds: float = 0.0, messages: int = 0
) -> dict:
    """EnqueueBatch, by bench/load/batches.py, for so long or of so many."""
    numbers = (seconds, concurrency, size, messages)
    return generate("bench.load.batches", target, *numbers)


def backlog(target: str, count: int) -> int:
    """Exactly so many messages by EnqueueBatch, by bench/load/backlog.py; how many were taken."""
    return generate("bench.load.backlog", target, count)["messages"]


def generate(module: str, *arguments: object, **options: object) -> dict:
    """Run a load to its end; what it says. Its options are those of its command line."""
    command = [module, *map(str, arguments)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(
        [sys.executable, "-m", *command], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)
