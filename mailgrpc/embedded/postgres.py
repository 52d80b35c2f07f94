"""The embedded PostgreSQL: the real server, started, recovered and stopped by us.

What is promised
  - What was committed survives the end of everything: `kill -9`, a lost machine (fsync and
    synchronous_commit are on unless `durable=False`).
  - A start after any end succeeds without help. It takes as long as recovery takes; there is no
    limit after which a start is thought to have failed. A server that died is reported at once,
    with its last words.
  - Nobody else on the machine can connect.

What can go wrong, and what is done about it
  - postmaster.pid lies there after a crash, and its number belongs to another process by now:
    PostgreSQL would refuse to start for ever. The `FamilyLock`, which the server and its backends
    inherit, says that nothing of an earlier run lives; then the file is removed. (Not when the
    server is started again within one run: there its own check is right, and needed while
    backends of the dead server are still leaving.)
  - Root: see `accounts`. Half-made data: see `cluster`. A dead parent: see `lifeline`; an orphan
    is told to shut down fast (SIGINT), then at once (SIGQUIT: recovery at the next start).
  - A socket's path must be short, and data directories can lie deep: the socket has a directory
    of its own, 0700, new for each instance.

Why a socket without a password, and no TCP: the directory's mode lets in the server's user and
root alone, both of whom could read the data files anyway. A password in a URL would be seen in
more places than it guards; `peer` would need a map, because the server runs as another user than
root's clients.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from mailgrpc.embedded import cluster
from mailgrpc.embedded.accounts import (
    Account,
    account_for_data,
    make_data_directory,
    make_private_directory,
)
from mailgrpc.embedded.binaries import PostgresBinaries, copy_where_reachable, find_binaries
from mailgrpc.embedded.locks import FamilyLock
from mailgrpc.embedded.process import Launch, Process, Slot, server_environ
from mailgrpc.errors import EmbeddedError

PORT = 5432
"""Part of the socket's name; nothing listens on a TCP port."""

_STILL_STARTING_S = 10.0
_FAST_STOP_S = 30.0
_IMMEDIATE_STOP_S = 5.0


class EmbeddedPostgres:
    """One server over one data directory. `start` and `stop` block; both can be repeated.

    Without `data_dir` the data is temporary: it goes with `stop`, and with this process. With
    `durable=False` commits are not synced: fast, for tests, and lost with the machine.
    `lock` is the data directory's, held by the caller; without it the server takes its own.
    `on_line` hears each line of the server's log, from another thread.
    """

    name = "postgres"

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        durable: bool = True,
        binaries: PostgresBinaries | None = None,
        lock: FamilyLock | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._durable = durable
        self._binaries = binaries
        self._lock = lock
        self._own_lock: FamilyLock | None = None
        self._say = on_line or (lambda _text: None)
        self._slot = Slot()
        self._private: Path | None = None
        self._place: Path | None = None
        self._account: Account | None = None

    def start(self) -> str:
        """Start, after recovery if need be, and return the release, e.g. `18.4`.

        Blocks until the server takes connections. Raises EmbeddedError, whose text says what to
        do; nothing is left running then.
        """
        self._slot.open()
        first = self._private is None
        try:
            if first:
                self._prepare()
            return self._run()
        except BaseException:
            self._slot.close(signal.SIGQUIT, _IMMEDIATE_STOP_S)
            if first:  # a repeated start keeps its socket: clients know the URL
                self._let_go()
            raise

    def stop(self, grace_s: float = _FAST_STOP_S, *, now: bool = False) -> None:
        """Shut down: sessions are ended, what is committed is written. Blocks until it is down.

        `now` skips the writing: the next start recovers. May be called from another thread to end
        a `start` that is under way.
        """
        if now or self._data_dir is None:
            self._slot.close(signal.SIGQUIT, _IMMEDIATE_STOP_S)
        else:
            self._slot.close(signal.SIGINT, grace_s)
        self._let_go()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def process(self) -> Process | None:
        """The server's process, while it runs or of its last run. Its `pid` is the postmaster."""
        return self._slot.process

    @property
    def url(self) -> str:
        """For SQLAlchemy (with `+asyncpg`), asyncpg and psql.

        The same when `start` is repeated after a crash, another one after `stop`.
        """
        return self.url_of(cluster.DATABASE)

    def url_of(self, database: str, user: str = cluster.ROLE) -> str:
        """The URL of another database; `user="postgres"` is the superuser."""
        return f"postgresql://{user}@/{database}?host={self._private}&port={PORT}"

    def _prepare(self) -> None:
        """Find or make data, a directory for the socket, and binaries that the user can run."""
        binaries = self._binaries or find_binaries()
        if self._data_dir is None:
            self._account = account_for_data(None)
            self._private = make_private_directory(self._account)
            self._place = self._private / "data"
        else:
            if self._lock is None:
                make_data_directory(self._data_dir)
                self._own_lock = FamilyLock(self._data_dir)
                self._own_lock.acquire(self._say)
            self._place, self._account = cluster.locate(self._data_dir, self._say)
            self._private = make_private_directory(self._account)
        if self._account is not None:
            binaries = copy_where_reachable(binaries, self._account)
        self._binaries = binaries
        if self._place.exists():
            cluster.check_version(self._place, binaries)
            # The lock was just taken: no server on this directory can be alive.
            (self._place / "postmaster.pid").unlink(missing_ok=True)
        else:
            cluster.create(
                self._place,
                binaries,
                self._account,
                durable=self._durable,
                locks=self._lock_fds(),
                launch=self._slot.launch,
            )

    def _let_go(self) -> None:
        private, self._private = self._private, None
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)
        lock, self._own_lock = self._own_lock, None
        if lock is not None:
            lock.release()

    def _run(self) -> str:
        assert self._binaries is not None
        assert self._place is not None
        launch = Launch(
            name=self.name,
            argv=[self._binaries.postgres, *self._arguments()],
            environ=server_environ(),
            orphan_plan=((signal.SIGINT, 5.0), (signal.SIGQUIT, 2.0)),
            account=self._account,
            directory=self._place,
            locks=self._lock_fds(),
            remove=self._private,
        )
        process = self._slot.launch(launch, self._say)
        self._wait_until_ready(process)
        return self._binaries.release

    def _arguments(self) -> list[str]:
        """What is ours to decide; what may be tuned lies in postgresql.conf."""
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._private),
            "unix_socket_permissions": "0700",
            "port": str(PORT),
            "dynamic_shared_memory_type": cluster.shared_memory_type(),
            "logging_collector": "off",
            "log_destination": "stderr",
            "log_line_prefix": "",  # the family's log has its own
            "cluster_name": "mailgrpc",
            "fsync": "on" if self._durable else "off",
            "full_page_writes": "on" if self._durable else "off",
            "synchronous_commit": "on",
        }
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return ["-D", str(self._place), *settings]

    def _wait_until_ready(self, process: Process) -> None:
        """Wait for `ready`, for as long as it takes; its log tells how recovery goes on."""
        assert self._place is not None
        begun_at = told_at = time.monotonic()
        pause_s = 0.005
        while not process.ended.wait(pause_s):
            if cluster.postmaster_state(self._place) == (process.pid, "ready"):
                return
            now = time.monotonic()
            if now - told_at >= _STILL_STARTING_S:
                told_at = now
                self._say(f"still starting after {now - begun_at:.0f} s")
            pause_s = min(pause_s * 1.5, 0.1)
        raise EmbeddedError(f"PostgreSQL did not start: it {process.describe_end()}")

    def _lock_fds(self) -> tuple[int, ...]:
        lock = self._own_lock or self._lock
        return () if lock is None else (lock.fd,)
