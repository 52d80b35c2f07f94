"""The embedded PostgreSQL: what was committed stays, and every start succeeds by itself."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from mailgrpc.embedded import cluster
from mailgrpc.embedded.binaries import PostgresBinaries, find_binaries
from mailgrpc.embedded.postgres import EmbeddedPostgres
from mailgrpc.errors import EmbeddedError

from .conftest import AsNobody
from .watching import descendants, is_alive, wait_until


async def put(url: str, note: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE IF NOT EXISTS notes (note text)")
    await connection.execute("INSERT INTO notes VALUES ($1)", note)
    await connection.close()


async def notes(url: str) -> list[str]:
    connection = await asyncpg.connect(url)
    rows = await connection.fetch("SELECT note FROM notes ORDER BY note")
    await connection.close()
    return [row["note"] for row in rows]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[EmbeddedPostgres, Path]]:
    """One server for the tests that only look, and its data directory."""
    place = Path(tempfile.mkdtemp(prefix="mailgrpc-test-", dir="/tmp"))
    place.chmod(0o755)
    with EmbeddedPostgres(place / "data") as postgres:
        yield postgres, place / "data"
    shutil.rmtree(place)


Running = tuple[EmbeddedPostgres, Path]


async def test_a_restart_keeps_the_data(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as postgres:
        await put(postgres.url, "kept")
        process = postgres.process
    assert process is not None
    assert not is_alive(process.pid)
    with EmbeddedPostgres(data_dir) as postgres:
        assert await notes(postgres.url) == ["kept"]


async def test_a_crash_keeps_what_was_committed_and_the_url(made_data_dir: Path) -> None:
    with EmbeddedPostgres(made_data_dir) as postgres:
        url = postgres.url
        await put(url, "committed")
        assert postgres.process is not None
        os.kill(postgres.process.pid, signal.SIGKILL)
        assert postgres.process.ended.wait(5)
        start_until_backends_have_left(postgres)
        assert postgres.url == url
        assert await notes(url) == ["committed"]


def start_until_backends_have_left(postgres: EmbeddedPostgres) -> None:
    """As the supervisor does: while backends of the dead server leave, a start is refused."""

    def started() -> bool:
        try:
            postgres.start()
        except EmbeddedError as error:
            if "shared memory" not in str(error):
                raise
            return False
        return True

    wait_until(started)


async def test_the_settings_are_those_of_a_durable_server(running: Running) -> None:
    connection = await asyncpg.connect(running[0].url)
    for name in ("fsync", "synchronous_commit", "full_page_writes"):
        assert await connection.fetchval(f"SHOW {name}") == "on"
    assert await connection.fetchval("SHOW listen_addresses") == ""
    assert await connection.fetchval("SHOW server_encoding") == "UTF8"
    assert await connection.fetchval("SELECT lower('ÄÖ')") == "äö"
    await connection.close()


async def test_the_role_may_make_databases_and_is_no_superuser(running: Running) -> None:
    is_super = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
    connection = await asyncpg.connect(running[0].url)
    assert await connection.fetchval(is_super) is False
    await connection.execute("CREATE DATABASE template_for_tests")
    await connection.close()
    superuser = await asyncpg.connect(running[0].url_of("postgres", user="postgres"))
    assert await superuser.fetchval(is_super) is True
    await superuser.close()


async def test_sqlalchemy_takes_the_url(running: Running) -> None:
    engine = create_async_engine(running[0].url.replace("postgresql:", "postgresql+asyncpg:"))
    async with engine.connect() as connection:
        who = await connection.execute(text("SELECT current_user, current_database()"))
        assert tuple(who.one()) == ("mailgrpc", "mailgrpc")
    await engine.dispose()


def test_a_second_start_on_the_same_directory_is_refused(running: Running) -> None:
    with pytest.raises(EmbeddedError, match="stop it, or choose another --data-dir"):
        EmbeddedPostgres(running[1]).start()


def test_without_a_data_dir_nothing_stays() -> None:
    postgres = EmbeddedPostgres(durable=False)
    postgres.start()
    private = Path(postgres.url.partition("host=")[2].partition("&")[0])
    assert (private.stat().st_mode & 0o777, (private / "data").is_dir()) == (0o700, True)
    postgres.stop()
    assert not private.exists()


async def test_a_stale_pid_file_with_a_living_number_does_not_block(made_data_dir: Path) -> None:
    # The number of a process of the same user that lives and is not PostgreSQL: as after a
    # container's restart, where numbers begin anew.
    stale = made_data_dir / "postgres" / "postmaster.pid"
    owner = stale.parent.stat().st_uid
    other = subprocess.Popen(["sleep", "1000"], user=owner if os.geteuid() == 0 else None)
    try:
        stale.write_text(f"{other.pid}\n{stale.parent}\n1700000000\n5432\n/tmp\n\n0 0\nready\n")
        stale.chmod(0o644)
        with EmbeddedPostgres(made_data_dir) as postgres:
            await put(postgres.url, "written")
    finally:
        other.kill()
        other.wait()


async def test_a_deep_directory_is_no_problem(place: Path, made_data_dir: Path) -> None:
    deep = place / ("d" * 100) / ("e" * 100)
    deep.parent.mkdir()
    made_data_dir.rename(deep)
    with EmbeddedPostgres(deep) as postgres:
        await put(postgres.url, "deep down")
        assert await notes(postgres.url) == ["deep down"]


async def test_an_interrupted_initdb_is_begun_anew(data_dir: Path) -> None:
    draft = data_dir / "postgres.draft"
    (draft / "base").mkdir(parents=True)
    data_dir.chmod(0o711)
    (draft / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(data_dir) as postgres:
        await put(postgres.url, "new")
    assert not draft.exists()


def test_a_stop_ends_a_start_that_is_under_way(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    errors: list[EmbeddedError] = []

    def start() -> None:
        try:
            postgres.start()
        except EmbeddedError as error:
            errors.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    wait_until(lambda: any("initdb" in line for line in descendants(os.getpid()).values()))
    postgres.stop(now=True)
    starting.join(10)
    assert not starting.is_alive()
    assert errors
    assert not (data_dir / "postgres").exists()
    with EmbeddedPostgres(data_dir):
        pass


def test_a_server_that_dies_at_its_start_is_told_with_its_last_words(made_data_dir: Path) -> None:
    with (made_data_dir / "postgres" / "postgresql.conf").open("a") as file:
        file.write("\nshared_buffers = plenty\n")
    with pytest.raises(EmbeddedError, match='invalid value for parameter "shared_buffers"'):
        EmbeddedPostgres(made_data_dir).start()


def test_data_of_another_major_version_is_refused(data_dir: Path) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres" / "PG_VERSION").write_text("16\n")
    data_dir.chmod(0o711)
    with pytest.raises(EmbeddedError, match=r"holds data of PostgreSQL 16, and this is 18\."):
        EmbeddedPostgres(data_dir).start()


def test_something_else_in_its_place_is_not_touched(data_dir: Path) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres" / "precious").write_text("mine")
    data_dir.chmod(0o711)
    with pytest.raises(EmbeddedError, match="no data directory of PostgreSQL: move it away"):
        EmbeddedPostgres(data_dir).start()
    assert (data_dir / "postgres" / "precious").read_text() == "mine"


async def test_another_installed_version_can_be_chosen() -> None:
    with EmbeddedPostgres(durable=False, binaries=find_binaries(16)) as postgres:
        connection = await asyncpg.connect(postgres.url)
        assert connection.get_server_version().major == 16
        await connection.close()


def test_a_version_that_is_not_installed_is_told() -> None:
    with pytest.raises(EmbeddedError, match="and 11 is needed: pip install --upgrade"):
        find_binaries(11)


def test_an_odd_environment_changes_nothing(
    data_dir: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = place / ("t" * 150)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("LANG", "LC_ALL", "LC_MESSAGES"):
        monkeypatch.setenv(name, "xx_YY.no-such-locale")
    monkeypatch.setenv("PGDATA", "/nonexistent")
    monkeypatch.setenv("PGOPTIONS", "--nonsense")
    monkeypatch.setenv("TZ", "Nowhere/Land")
    monkeypatch.delenv("HOME", raising=False)
    with EmbeddedPostgres(data_dir, durable=False) as postgres:
        assert len(postgres.url) < 107
    monkeypatch.setattr(tempfile, "tempdir", None)


async def test_too_small_a_shared_memory_is_not_used(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_ENOUGH_SHARED_MEMORY", 1 << 62)
    with EmbeddedPostgres(data_dir, durable=False) as postgres:
        connection = await asyncpg.connect(postgres.url)
        assert await connection.fetchval("SHOW dynamic_shared_memory_type") == "mmap"
        await connection.close()


@pytest.fixture
def closed_place() -> Iterator[Path]:
    """A directory that only its owner can enter."""
    path = Path(tempfile.mkdtemp(prefix="mailgrpc-test-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as another user")
async def test_root_finds_its_data_where_postgres_can_reach_it(
    closed_place: Path, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.setattr(cluster, "_ELSEWHERE", place / "var")
    said: list[str] = []
    with EmbeddedPostgres(closed_place, on_line=said.append) as postgres:
        await put(postgres.url, "reached")
        assert postgres.process is not None
        assert Path(f"/proc/{postgres.process.pid}").stat().st_uid != 0
    assert any("cannot enter" in line and "the data goes to" in line for line in said)
    assert (closed_place / "postgres").resolve().is_relative_to(place / "var")
    with EmbeddedPostgres(closed_place) as postgres:
        assert await notes(postgres.url) == ["reached"]
    # Found by the directory's name too: the link may be lost, the data is not.
    (closed_place / "postgres").unlink()
    with EmbeddedPostgres(closed_place) as postgres:
        assert await notes(postgres.url) == ["reached"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as another user")
def test_root_copies_binaries_that_postgres_cannot_reach(
    closed_place: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.setattr("mailgrpc.embedded.binaries._SHARED_BINARIES", place / "var" / "binaries")
    installed = find_binaries()
    package = installed.root.parent
    for name in (package.name, f"{package.name}.libs"):
        shutil.copytree(
            package.parent / name, closed_place / name, copy_function=os.link, symlinks=True
        )
    closed = PostgresBinaries(closed_place / package.name / installed.root.name, installed.release)
    with EmbeddedPostgres(data_dir, binaries=closed) as postgres:
        assert postgres.process is not None
        running = Path(f"/proc/{postgres.process.pid}/exe").resolve()
    assert running.is_relative_to(place / "var")
    copies = list((place / "var" / "binaries").iterdir())
    with EmbeddedPostgres(data_dir, binaries=closed):
        assert list((place / "var" / "binaries").iterdir()) == copies


def test_a_user_without_a_name_is_told(place: Path, as_nobody: AsNobody) -> None:
    place.chmod(0o777)
    nameless = dataclasses.replace(as_nobody, uid=54321, gid=54321)
    ran = nameless.run("-c", SCRIPT, str(place / "data"))
    assert "user id 54321 has no entry in /etc/passwd" in ran.stderr


SCRIPT = """
import os, sys
from pathlib import Path
from mailgrpc.embedded.postgres import EmbeddedPostgres
with EmbeddedPostgres(Path(sys.argv[1])) as postgres:
    print(Path(f"/proc/{postgres.process.pid}").stat().st_uid, postgres.url)
"""


async def test_an_ordinary_user_runs_it_as_itself_and_root_keeps_to_that(
    place: Path, as_nobody: AsNobody
) -> None:
    place.chmod(0o777)
    data_dir = place / "data"
    ran = as_nobody.run("-c", SCRIPT, str(data_dir))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"{as_nobody.uid} postgresql://mailgrpc@/")
    with EmbeddedPostgres(data_dir) as postgres:  # as root: the data stays nobody's
        assert postgres.process is not None
        assert Path(f"/proc/{postgres.process.pid}").stat().st_uid == as_nobody.uid
    assert as_nobody.run("-c", SCRIPT, str(data_dir)).returncode == 0


def test_an_ordinary_user_is_told_whose_data_it_is(
    made_data_dir: Path, as_nobody: AsNobody
) -> None:
    ran = as_nobody.run("-c", SCRIPT, str(made_data_dir))
    assert "is the directory another user's?" in ran.stderr
    assert "choose another --data-dir" in ran.stderr


@pytest.mark.parametrize(
    ("memory_gb", "disk_gb", "buffers", "log"),
    [(0.5, 2, "128MB", "256MB"), (4, 20, "512MB", "1024MB"), (64, 500, "1024MB", "2048MB")],
    ids=["small", "middling", "large"],
)
def test_what_a_new_database_takes_follows_the_machine(
    memory_gb: float, disk_gb: float, buffers: str, log: str
) -> None:
    found = cluster.sizes(int(memory_gb * 2**30), int(disk_gb * 2**30))
    assert found == {"shared_buffers": buffers, "max_wal_size": log}
