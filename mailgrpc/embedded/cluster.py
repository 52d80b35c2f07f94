"""The data directory of the embedded PostgreSQL: where it lies, how it comes to be.

What is promised: the directory is complete, with the role and the database `mailgrpc` in it and
all of it on disk, or it is not there. It is made under another name, and renamed as the last
step; what an interrupted run left is removed by the next. Whoever starts a cluster therefore has
no half-made states to recognise.

It lies in `data_dir/postgres`. Where PostgreSQL runs as another user than we (because we are
root) and that user cannot enter `data_dir`, it lies in `/var/lib/mailgrpc/<hash of data_dir>/`,
and `data_dir/postgres` is a link to it. The link is believed before the hash, so that a data
directory can be moved.

All functions here expect the caller to hold the `FamilyLock`.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mailgrpc.embedded.accounts import Account, account_for_data, can_enter
from mailgrpc.embedded.binaries import PostgresBinaries
from mailgrpc.embedded.process import Launch, Process, server_environ, wait_for_success
from mailgrpc.errors import EmbeddedError

ROLE = "mailgrpc"
DATABASE = "mailgrpc"
SUPERUSER = "postgres"

_ELSEWHERE = Path("/var/lib/mailgrpc")

# Runs in single-user mode, where each line is one statement. The role owns its database and may
# create others (test suites copy a template), nothing more: what works here works on a managed
# server.
_SETUP_SQL = f"""\
CREATE ROLE {ROLE} LOGIN CREATEDB;
CREATE DATABASE {DATABASE} OWNER {ROLE};
"""

# Written to postgresql.conf, where whoever looks after the data may change them.
_DEFAULTS = {
    "max_connections": "100",
    # Short statements over few rows: parallel plans gain nothing, and their shared memory fails
    # in containers with a small /dev/shm.
    "max_parallel_workers_per_gather": "0",
    "max_parallel_maintenance_workers": "0",
    "jit": "off",
    # A file of 16 MB each is kept ready; a small installation need not keep a gigabyte.
    "min_wal_size": "48MB",
    # The queue is small, and all of it changes all the time: look often.
    "autovacuum_naptime": "15s",
    # All else only grows. While it is small it does by a fifth from one look to the next, and would be
    # read through at each, for statistics by which hardly a statement here is planned.
    "autovacuum_vacuum_insert_threshold": "100000",
    "autovacuum_analyze_threshold": "100000",
    "default_statistics_target": "30",
    # A statement locks all ranges of days that its plan knows: without a common table for it.
    "max_locks_per_transaction": "128",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


_MB = 1024 * 1024


def sizes(memory: int, free_disk: int) -> dict[str, str]:
    """Settings that follow the machine, from its bytes of memory and of free disk.

    A request id may lie anywhere in its index. While that (about 75 bytes a message) fits into the
    buffers, a row costs 15 to 20 µs of processor time there, and 45 where it does not. The first
    change of a page after a checkpoint logs the whole page, so checkpoints are far apart: by half of
    max_wal_size, which is also what a start after a crash may have to read. Memory and files are
    taken as they are needed.
    """
    buffers = min(max(memory // 8, 128 * _MB), 1024 * _MB)
    log = min(max(free_disk // 20, 256 * _MB), 2048 * _MB)
    return {"shared_buffers": f"{buffers // _MB}MB", "max_wal_size": f"{log // _MB}MB"}


def _memory() -> int:
    """Bytes that this process and others like it may use: the machine's, or its container's."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # there is none, or it says "max"
        return machine


_ENOUGH_SHARED_MEMORY = 16 * 1024 * 1024
"""Bytes. PostgreSQL takes 1 MiB at once, and more by the number of sessions."""


def locate(data_dir: Path, say: Callable[[str], None]) -> tuple[Path, Account | None]:
    """Where the data lies or will lie, and whom PostgreSQL runs as.

    Raises EmbeddedError with what to do when the place cannot be reached.
    """
    place = data_dir / "postgres"
    if place.is_symlink() and not place.exists():
        raise EmbeddedError(
            f"{place} points to {place.readlink()}, which is not there: bring it back, or remove"
            " the link to begin with an empty database"
        )
    place = place.resolve()
    account = account_for_data(place)
    if account is None or can_enter(place.parent, account):
        return place, account
    if place.exists():
        raise EmbeddedError(
            f"PostgreSQL runs as user {account.name}, which cannot enter {place.parent}: let it"
            " (chmod o+x on each directory above), or move the data to where it can"
        )
    return _link_elsewhere(data_dir, account, say), account


def _link_elsewhere(data_dir: Path, account: Account, say: Callable[[str], None]) -> Path:
    name = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:16]
    home = _ELSEWHERE / name / "postgres"
    try:
        for parent in (_ELSEWHERE, home.parent):
            parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        (home.parent / "data_dir").write_text(f"{data_dir.resolve()}\n")
        (data_dir / "postgres").symlink_to(home)
    except OSError as error:
        raise EmbeddedError(
            f"PostgreSQL runs as user {account.name}, which cannot enter {data_dir}, and"
            f" {home} cannot be made: {error.strerror}; choose a --data-dir that it can enter"
        ) from error
    if not can_enter(home.parent, account):
        raise EmbeddedError(f"user {account.name} cannot enter {home.parent}: chmod o+x it")
    found = "the data found in" if home.exists() else "the data goes to"
    say(f"user {account.name} cannot enter {data_dir}: {found} {home}")
    return home


def check_version(place: Path, binaries: PostgresBinaries) -> None:
    """Raises EmbeddedError if the data is another major version's, or no data of PostgreSQL."""
    try:
        found = (place / "PG_VERSION").read_text().strip()
    except PermissionError:
        raise EmbeddedError(
            f"{place} belongs to another user: start mailgrpc as that user (or root), or choose"
            " another --data-dir"
        ) from None
    except OSError:
        raise EmbeddedError(
            f"{place} is no data directory of PostgreSQL: move it away, or choose another"
            " --data-dir"
        ) from None
    if found != str(binaries.major):
        raise EmbeddedError(
            f"{place} holds data of PostgreSQL {found}, and this is {binaries.release}: dump it"
            f" with the pg_dump of {found} and restore it into another --data-dir, or use the"
            " mailgrpc that made it"
        )


def create(
    place: Path,
    binaries: PostgresBinaries,
    account: Account | None,
    *,
    durable: bool,
    locks: Sequence[int],
    launch: Callable[[Launch], Process],
) -> None:
    """Make the data directory `place`, with the role and the database.

    `launch` starts a process (`Slot.launch`: so that a stop in the middle is heard). With
    `durable` false nothing is synced. Raises EmbeddedError with initdb's own words.
    """
    _check_our_name()
    draft = place.with_name(place.name + ".draft")

    def run(argv: Sequence[str], doing: str, stdin: bytes = b"") -> None:
        process = launch(
            Launch(
                name="initdb",
                argv=argv,
                environ=server_environ(),
                orphan_plan=((signal.SIGTERM, 2.0),),
                account=account,
                directory=draft,
                locks=locks,
                stdin=stdin,
            )
        )
        wait_for_success(process, doing)

    _make_empty(draft, account)
    run(_initdb_command(binaries, draft), "PostgreSQL could not make its data directory")
    run(
        [
            binaries.postgres,
            "--single",
            "-F",
            "-D",
            str(draft),
            "-c",
            "exit_on_error=on",
            "-c",
            "log_min_messages=error",
            "postgres",
        ],
        "PostgreSQL could not make the database",
        _SETUP_SQL.encode(),
    )
    if durable:
        # Once at the end instead of after each of the steps.
        run([binaries.initdb, "--sync-only", "-D", str(draft)], "the data could not be synced")
    draft.rename(place)
    if durable:
        _sync_directory(place.parent)


def _initdb_command(binaries: PostgresBinaries, draft: Path) -> list[str]:
    # Sorting and case by code points, in every version and on every machine the same: a library's
    # own order changes with its updates, and indexes over text break with it.
    settings = _DEFAULTS | sizes(_memory(), shutil.disk_usage(draft).free)
    builtin = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    return [
        binaries.initdb,
        f"--pgdata={draft}",
        f"--username={SUPERUSER}",
        "--encoding=UTF8",
        "--locale=C",
        *(builtin if binaries.major >= 17 else []),
        # Only the socket is listened on, in a directory that nobody else can enter.
        "--auth-local=trust",
        "--auth-host=reject",
        "--no-instructions",
        "--no-sync",
        f"--set=dynamic_shared_memory_type={shared_memory_type()}",
        *(f"--set={name}={value}" for name, value in settings.items()),
    ]


def _check_our_name() -> None:
    """The user needs a name, which initdb looks up; containers run with mere numbers."""
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise EmbeddedError(
            f"user id {os.geteuid()} has no entry in /etc/passwd, which PostgreSQL needs: add one,"
            " run as a user that has one, or give MAILGRPC_DATABASE_URL"
        ) from None


def _make_empty(draft: Path, account: Account | None) -> None:
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        if account is not None:
            account.own(draft)
    except OSError as error:
        raise EmbeddedError(
            f"cannot make {draft}: {error.strerror}; choose another --data-dir"
        ) from error


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def shared_memory_type() -> str:
    """Which memory PostgreSQL's processes share beside the main block, for its setting.

    Ordinarily POSIX shared memory. In a container whose /dev/shm is all but missing, files.
    """
    if sys.platform != "linux":
        return "posix"
    try:
        room = os.statvfs("/dev/shm")  # noqa: S108  looked at, not written to
    except OSError:
        return "mmap"
    return "posix" if room.f_bavail * room.f_frsize >= _ENOUGH_SHARED_MEMORY else "mmap"


def postmaster_state(place: Path) -> tuple[int, str]:
    """(process id, state) as the postmaster wrote it down; (0, "") where nothing is written.

    The state is line 8 of postmaster.pid: `starting`, `stopping`, `ready` or `standby`. It is
    what pg_ctl reads too; no client, no password and no free connection is needed for it.
    """
    try:
        lines = (place / "postmaster.pid").read_text(errors="replace").splitlines()
        return int(lines[0]), lines[7].strip() if len(lines) > 7 else ""
    except (OSError, ValueError, IndexError):
        return 0, ""
