"""The processes that are measured: durable PostgreSQL, Valkey, `serve` and `work`, as shipped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg

from bench.machine import PLACE
from mailgrpc.db.schema import migrate
from mailgrpc.embedded.postgres import EmbeddedPostgres
from mailgrpc.embedded.valkey import EmbeddedValkey

TICKS = os.sysconf("SC_CLK_TCK")


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
        return sum(_pss_kb(pid) for pid in tree(self.process.pid)) / 1024

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=40)


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in tree(int(child)))]


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


def _pss_kb(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


class Family:
    """What the rows run against. `url` is a migrated, durable database, new for each row."""

    def __init__(self, url: str, redis_url: str, data: Path) -> None:
        self.url = url
        self.redis_url = redis_url
        self._data = data
        self.environ = {
            "MAILGRPC_DATABASE_URL": url,
            "MAILGRPC_REDIS_URL": redis_url,
            "MAILGRPC_CHANNEL_URL": "capture:",
            "MAILGRPC_LISTEN": "127.0.0.1:0",
            "MAILGRPC_LOG_LEVEL": "warning",
            "MAILGRPC_CATEGORIES": "receipts=1",
        }

    @contextlib.contextmanager
    def running(self, *command: str, **environ: str) -> Iterator[Child]:
        """One of our programs, e.g. `running("serve")`, with settings of its own."""
        child = Child(*command, environ={**self.environ, **environ})
        try:
            yield child
        finally:
            child.stop()

    def sql(
        self, statement: str, *arguments: object, user: str | None = None
    ) -> list[asyncpg.Record]:
        """Ask the database, on a connection of its own, as the program's user or another."""

        async def ask() -> list[asyncpg.Record]:
            connection = await asyncpg.connect(
                self.url, user=user, server_settings={"search_path": "mailgrpc"}
            )
            try:
                return list(await connection.fetch(statement, *arguments))
            finally:
                await connection.close()

        return asyncio.run(ask())

    def stored(self) -> int:
        """How many messages there are."""
        return int(self.sql("SELECT count(*) AS n FROM messages")[0]["n"])

    def checkpoint(self) -> None:
        """Write all that is not written yet, so that what follows is not charged for it."""
        self.sql("CHECKPOINT", user="postgres")

    def postgres_cpu_s(self) -> float:
        """Processor seconds of PostgreSQL so far."""
        pid = (self._data / "postgres" / "postmaster.pid").read_text().split()[0]
        return tree_cpu_s(int(pid))


@contextlib.contextmanager
def family() -> Iterator[Family]:
    """Start the stores in a temporary place, with fsync and synchronous_commit on."""
    with tempfile.TemporaryDirectory(prefix="mailgrpc-bench-", dir=PLACE) as place:
        Path(place).chmod(0o711)
        data = Path(place) / "data"
        with EmbeddedPostgres(data) as postgres, EmbeddedValkey() as valkey:
            migrate(postgres.url)
            yield Family(postgres.url, valkey.url, data)


@contextlib.contextmanager
def bare_server() -> Iterator[str]:
    """The counterpart; its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.counterparts.bare_server"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.terminate()
        process.wait(10)


def calls(target: str, *, seconds: float, concurrency: int = 0, rate: float = 0.0) -> dict:
    """One Enqueue a call, by bench/load/calls.py: closed with `concurrency`, open with `rate`."""
    how = ["--rate", str(rate)] if rate else ["--concurrency", str(concurrency)]
    return _generator("bench.load.calls", target, "--seconds", str(seconds), *how)


def batches(target: str, *, seconds: float, concurrency: int, size: int) -> dict:
    """EnqueueBatch, by bench/load/batches.py."""
    return _generator("bench.load.batches", target, str(seconds), str(concurrency), str(size))


def _generator(*command: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", *command], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)
