"""A standby of the family's PostgreSQL, at a distance: streaming replication, durable as its primary.

It is the embedded server's own binary on data of its own, made by pg_basebackup, and hears the
primary through `bench.delay`. A replication slot keeps for it what it misses while it is down.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg

from bench.family import Family, beside, tree_cpu_s
from bench.machine import PLACE
from mailgrpc.embedded import cluster
from mailgrpc.embedded.accounts import account_for_data
from mailgrpc.embedded.binaries import copy_where_reachable, find_binaries
from mailgrpc.embedded.process import Launch, Process, Slot, server_environ, wait_for_success

NAME = "standby"
_PATIENCE_S = 60.0
_COMMITS = 200


class Standby:
    """Made by `standby`; `running` is when it hears the primary, and is waited for or not."""

    def __init__(self, family: Family, home: Path, distance: int) -> None:
        self._family = family
        self._home = home
        self._data = home / "data"
        self._distance = distance
        self._account = account_for_data(None)
        binaries = find_binaries()
        if self._account is not None:
            self._account.own(home)
            binaries = copy_where_reachable(binaries, self._account)
        self._binaries = binaries
        self._slot = Slot()

    def make(self, source: Path) -> None:
        """Copy the primary, whose socket is in `source`."""
        tool = str(Path(self._binaries.postgres).with_name("pg_basebackup"))
        primary = f"host={source} user={cluster.SUPERUSER} application_name={NAME}"
        ways = ["-R", "-c", "fast", "--create-slot", "--slot", NAME]
        process = self._launch([tool, "-D", str(self._data), "-d", primary, *ways], self._home)
        wait_for_success(process, "the standby could not be made")

    @contextlib.contextmanager
    def running(self, *, waited_for: bool) -> Iterator[Standby]:
        """It has all, and hears the rest; a commit waits for its disk, or does not."""
        process = self._start()
        try:
            _until(self._has_all)
            if waited_for:
                self._set_waited_for(NAME)
                state = "SELECT max(sync_state) AS state FROM pg_stat_replication"
                _until(lambda: self._family.as_superuser(state)[0]["state"] == "sync")
            yield self
        finally:
            self._set_waited_for("")
            process.stop(signal.SIGINT, _PATIENCE_S)

    def cpu_s(self) -> float:
        """Processor seconds of the standby's server in this run."""
        return tree_cpu_s(cluster.postmaster_state(self._data)[0])

    def end(self) -> None:
        """Let nothing of it live."""
        self._slot.close(signal.SIGQUIT, 5.0)

    def _start(self) -> Process:
        primary = f"host=127.0.0.1 port={self._distance} user={cluster.SUPERUSER} sslmode=disable"
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._home),
            "cluster_name": NAME,
            "primary_conninfo": f"{primary} application_name={NAME}",
            "primary_slot_name": NAME,
            "dynamic_shared_memory_type": cluster.shared_memory_type(),
            "fsync": "on",
        }
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        argv = [self._binaries.postgres, "-D", str(self._data), *flags]
        process = self._launch(argv, self._data)
        states = ((process.pid, "standby"), (process.pid, "ready"))
        _until(lambda: cluster.postmaster_state(self._data) in states)
        return process

    def _has_all(self) -> bool:
        missing = "SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), flush_lsn) AS bytes"
        found = self._family.as_superuser(f"{missing} FROM pg_stat_replication")
        return bool(found) and found[0]["bytes"] == 0

    def _set_waited_for(self, name: str) -> None:
        self._family.as_superuser(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
        self._family.as_superuser("SELECT pg_reload_conf()")

    def _launch(self, argv: list[str], directory: Path) -> Process:
        return self._slot.launch(
            Launch(
                name=NAME,
                argv=argv,
                environ=server_environ(),
                orphan_plan=((signal.SIGQUIT, 2.0),),
                account=self._account,
                directory=directory,
            )
        )


@contextlib.contextmanager
def standby(family: Family, *, round_trip_ms: float) -> Iterator[Standby]:
    """A standby, not running yet, so far away from the family's PostgreSQL."""
    query = parse_qs(urlsplit(family.superuser_url).query)
    source, port = Path(query["host"][0]), query["port"][0]
    with (
        tempfile.TemporaryDirectory(prefix="mailgrpc-bench-", dir=PLACE) as place,
        beside("bench.delay", str(source / f".s.PGSQL.{port}"), str(round_trip_ms / 2)) as line,
    ):
        assert line.stdout is not None
        Path(place).chmod(0o711)
        home = Path(place) / NAME
        home.mkdir(mode=0o700)
        made = Standby(family, home, int(line.stdout.readline()))
        try:
            made.make(source)
            yield made
        finally:
            made.end()


def commit_ms(url: str) -> float:
    """What a commit takes that comes alone, median."""

    async def ask() -> list[float]:
        connection = await asyncpg.connect(url)
        times = []
        for _ in range(_COMMITS):
            began = time.perf_counter()
            await connection.execute("SELECT pg_logical_emit_message(true, '', 'x')")
            times.append(time.perf_counter() - began)
        await connection.close()
        return times

    return sorted(asyncio.run(ask()))[_COMMITS // 2] * 1e3


def _until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > give_up_at:
            raise SystemExit("the standby does not follow its primary")
        time.sleep(0.05)
