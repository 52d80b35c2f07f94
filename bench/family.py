"""The processes that are measured: durable PostgreSQL, Valkey, `serve` and `work`, as shipped."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
        """Processor seconds that it used so far, user and system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=40)


class Family:
    """What the rows run against. `url` is a migrated, durable database."""

    def __init__(self, url: str, redis_url: str) -> None:
        self.url = url
        self.environ = {
            "MAILGRPC_DATABASE_URL": url,
            "MAILGRPC_REDIS_URL": redis_url,
            "MAILGRPC_CHANNEL_URL": "capture:",
            "MAILGRPC_LISTEN": "127.0.0.1:0",
            "MAILGRPC_LOG_LEVEL": "warning",
            "MAILGRPC_CATEGORIES": "receipts=1",
        }

    @contextlib.contextmanager
    def running(self, command: str) -> Iterator[Child]:
        child = Child(command, environ=self.environ)
        try:
            yield child
        finally:
            child.stop()


@contextlib.contextmanager
def family() -> Iterator[Family]:
    """Start the stores in a temporary place, with fsync and synchronous_commit on."""
    with (
        tempfile.TemporaryDirectory(prefix="mailgrpc-bench-", dir=_place()) as place,
        EmbeddedPostgres(Path(place) / "data") as postgres,
        EmbeddedValkey() as valkey,
    ):
        migrate(postgres.url)
        yield Family(postgres.url, valkey.url)


def _place() -> str:
    # A disk, not a memory file system: durability is what is paid for.
    return "/var/tmp"


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


def load(target: str, method: str, *, seconds: float, concurrency: int, batch: int = 1) -> dict:
    """Run the load generator in a process of its own."""
    done = subprocess.run(
        [
            sys.executable, "-m", "bench.load",
            target, method, str(seconds), str(concurrency), str(batch),
        ],
        check=True,
        capture_output=True,
        text=True,
    )  # fmt: skip
    return json.loads(done.stdout)
