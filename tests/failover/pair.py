"""A primary and its standby, on the loopback: real servers, promoted and killed as in the field.

Both are the embedded binaries, run by an account that is not root; in other ways they are what an
operator sets up: TCP, `pg_basebackup -R`, streaming replication, one URL that names both.
Everything here blocks; tests call it from a thread.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import asyncpg

from mailgrpc.embedded import cluster
from mailgrpc.embedded.accounts import account_for_data, make_private_directory
from mailgrpc.embedded.binaries import PostgresBinaries, copy_where_reachable, find_binaries
from mailgrpc.embedded.process import Launch, Process, Slot, server_environ, wait_for_success

PATIENCE_S = 20.0
_HBA = "host all all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 trust\n"
_STANDBY = "standby"


class Node:
    """One PostgreSQL server on a port of the loopback."""

    def __init__(self, name: str, place: Path, binaries: PostgresBinaries, account: Any) -> None:
        self.place = place
        self.port = _free_port()
        self._name = name
        self._binaries = binaries
        self._account = account
        self._slot = Slot()
        self._process: Process | None = None

    def create(self) -> None:
        """An empty cluster that lets in whoever comes over the loopback, to replicate too."""
        cluster.create(
            self.place,
            self._binaries,
            self._account,
            durable=False,
            locks=(),
            launch=self._slot.launch,
        )
        (self.place / "pg_hba.conf").write_text(_HBA)

    def copy_of(self, other: Node) -> None:
        """A standby of a server that runs."""
        tool = str(Path(self._binaries.postgres).with_name("pg_basebackup"))
        source = f"host=127.0.0.1 port={other.port} user=postgres application_name={_STANDBY}"
        arguments = ["-D", str(self.place), "-d", source, "-R", "-c", "fast", "--no-sync"]
        process = self._launch([tool, *arguments], self.place.parent)
        wait_for_success(process, "the standby could not be made")

    def start(self) -> None:
        """Start, and wait until it takes connections."""
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": cluster.shared_memory_type(),
            "cluster_name": self._name,
            "fsync": "off",
            "max_connections": "60",
            "wal_receiver_status_interval": "1s",
            "wal_retrieve_retry_interval": "100ms",
        }
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        argv = [self._binaries.postgres, "-D", str(self.place), *flags]
        self._process = self._launch(argv, self.place)
        until(lambda: cluster.postmaster_state(self.place)[1] in ("ready", "standby"))

    def kill(self) -> None:
        """SIGKILL, the server and its sessions: as if the machine had gone.

        The sessions first, and unseen by the server, which is stopped: one that outlives it by an
        instant ends its wait for the standby, and others are shown what no standby has.
        """
        assert self._process is not None
        server = self._process.pid

        async def main() -> None:
            connection = await self._connect()
            os.kill(server, signal.SIGSTOP)
            for row in await connection.fetch("SELECT pid FROM pg_stat_activity", timeout=5):
                os.kill(row["pid"], signal.SIGKILL)
            connection.terminate()

        asyncio.run(main())
        self._process.stop(signal.SIGKILL, PATIENCE_S)

    def stop(self) -> None:
        """Let nothing of it live."""
        self._slot.close(signal.SIGQUIT, 5.0)

    def run(self, sql: str) -> list[Any]:
        """Run one statement as the superuser."""

        async def main() -> list[Any]:
            connection = await self._connect()
            try:
                return await connection.fetch(sql)
            finally:
                await connection.close()

        return asyncio.run(main())

    def value(self, sql: str) -> Any:
        """The one value of a query."""
        return self.run(sql)[0][0]

    def set(self, name: str, value: str) -> None:
        """Change a setting while it runs."""
        self.run(f"ALTER SYSTEM SET {name} = '{value}'")
        self.run("SELECT pg_reload_conf()")
        until(lambda: self.value(f"SHOW {name}") == value)

    async def _connect(self) -> asyncpg.Connection:
        url = f"postgresql://postgres@127.0.0.1:{self.port}/mailgrpc?sslmode=disable"
        return await asyncpg.connect(url, timeout=5)

    def _launch(self, argv: list[str], directory: Path) -> Process:
        return self._slot.launch(
            Launch(
                name=self._name,
                argv=argv,
                environ=server_environ(),
                orphan_plan=((signal.SIGQUIT, 2.0),),
                account=self._account,
                directory=directory,
            )
        )


class ReplicatedPair:
    """`first` is the primary, `second` its standby; `url` names both. Use it in a `with`."""

    def __enter__(self) -> Self:
        account = account_for_data(None)
        self._home = make_private_directory(account)
        binaries = find_binaries()
        if account is not None:
            binaries = copy_where_reachable(binaries, account)
        self.first = Node("first", self._home / "first", binaries, account)
        self.second = Node("second", self._home / "second", binaries, account)
        try:
            self.first.create()
            self.first.start()
            self.second.copy_of(self.first)
            self.second.start()
            until(lambda: bool(self.first.run("SELECT FROM pg_stat_replication")))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def url(self) -> str:
        """One URL for both, as an operator writes it."""
        hosts = f"127.0.0.1:{self.first.port},127.0.0.1:{self.second.port}"
        return f"postgresql://{cluster.ROLE}@{hosts}/{cluster.DATABASE}"

    def replicate_synchronously(self) -> None:
        """From now on a commit waits until the standby has it."""
        self.first.set("synchronous_standby_names", _STANDBY)
        state = "SELECT max(sync_state) FROM pg_stat_replication"
        until(lambda: self.first.value(state) == "sync")

    def catch_up(self) -> None:
        """Return once the standby has all that is written by now."""
        end = self.first.value("SELECT pg_current_wal_lsn()::text")
        behind = f"SELECT pg_last_wal_replay_lsn() < '{end}'"
        until(lambda: not self.second.value(behind))

    def cut(self) -> None:
        """The standby hears nothing more, and lives on."""
        self._conninfo = self.second.value("SHOW primary_conninfo")
        self.second.set("primary_conninfo", "")
        until(lambda: not self.first.run("SELECT FROM pg_stat_replication"))

    def mend(self) -> None:
        """The standby hears the primary again."""
        self.second.run(f"ALTER SYSTEM SET primary_conninfo = $${self._conninfo}$$")
        self.second.run("SELECT pg_reload_conf()")
        until(lambda: bool(self.first.run("SELECT FROM pg_stat_replication")))

    def fail_over(self) -> None:
        """The primary dies, and its standby takes its place."""
        self.first.kill()
        assert self.second.value("SELECT pg_promote(true, 20)")

    def _end(self) -> None:
        self.first.stop()
        self.second.stop()
        shutil.rmtree(self._home, ignore_errors=True)


def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds; fails after PATIENCE_S."""
    ends_at = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > ends_at:
            raise TimeoutError("it did not come to that")
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
