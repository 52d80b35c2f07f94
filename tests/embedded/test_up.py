"""`mailgrpc up` as a whole, with stand-ins for the server and the worker."""

from __future__ import annotations

import os
import re
import signal
import smtplib
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from mailgrpc.config import HostPort, Settings
from mailgrpc.embedded.mailbox import list_inbox
from mailgrpc.embedded.stack import Part, Running, Stack

from .conftest import AsNobody, Family
from .watching import is_alive, wait_until

RunFamily = Callable[..., Family]


def member(family: Family, part: str) -> int:
    """The process id of a part (not of its lifeline)."""
    (pid,) = (
        pid
        for pid, command in family.members().items()
        if re.search(part, command) and "lifeline.py" not in command
    )
    return pid


POSTGRES = r"bin/postgres -D "
WORKER = r"standin.py work"


def database_url(family: Family) -> str:
    command = family.members()[member(family, POSTGRES)]
    found = re.search(r"unix_socket_directories=(\S+)", command)
    assert found is not None
    return f"postgresql://mailgrpc@/mailgrpc?host={found[1]}&port=5432"


async def execute(family: Family, statement: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(database_url(family))
    try:
        return await connection.fetch(statement)
    finally:
        await connection.close()


async def test_it_starts_all_says_so_and_ends_on_ctrl_c(
    data_dir: Path, run_family: RunFamily
) -> None:
    family = run_family(data_dir).wait_ready()
    line = re.search(
        r"^✓ postgres 18\.\d+   ✓ valkey 9\.\d+   ✓ server 127\.0\.0\.1:\d+   ✓ worker"
        r"   ✓ inbox 127\.0\.0\.1:(\d+)   \d+\.\d s$",
        family.output,
        re.MULTILINE,
    )
    assert line is not None, family.output
    assert f"worker   │ work with smtp://127.0.0.1:{line[1]}" in family.output
    with smtplib.SMTP("127.0.0.1", int(line[1])) as client:
        client.sendmail("a@x.example", ["b@y.example"], b"Subject: hello\r\n\r\n")
    assert [mail.subject for mail in list_inbox(data_dir / "inbox")] == ["hello"]
    assert (data_dir / ".gitignore").read_text() == "*\n"
    members = family.members()
    assert len(members) > 10
    family.signal(signal.SIGINT)
    assert family.wait() == 0, family.output
    assert not any(map(is_alive, members))
    assert "\x1b" not in family.output


async def test_killed_it_leaves_nobody_and_comes_back_with_its_data(
    made_data_dir: Path, run_family: RunFamily
) -> None:
    family = run_family(made_data_dir, STANDIN_STUBBORN="work").wait_ready()
    await execute(family, "CREATE TABLE notes AS SELECT 'kept' AS note")
    members = family.members()
    family.signal(signal.SIGKILL)
    family.wait()
    # At once, while the old family is still ending.
    next_family = run_family(made_data_dir).wait_ready()
    assert not [command for pid, command in members.items() if is_alive(pid)]
    assert "waiting for the processes of an earlier run to end" in next_family.output
    (row,) = await execute(next_family, "SELECT note FROM notes")
    assert row["note"] == "kept"


def test_a_second_one_is_refused_and_harms_nobody(
    made_data_dir: Path, run_family: RunFamily
) -> None:
    family = run_family(made_data_dir).wait_ready()
    second = run_family(made_data_dir)
    assert second.wait() == 1
    assert f"another mailgrpc (process {family.process.pid}) is running on" in second.output
    assert family.process.poll() is None
    assert is_alive(member(family, POSTGRES))
    assert (made_data_dir / "up.json").exists()  # by which other commands find it


async def test_what_dies_comes_back(made_data_dir: Path, run_family: RunFamily) -> None:
    family = run_family(made_data_dir).wait_ready()
    url = database_url(family)
    for part in (POSTGRES, WORKER, "valkey-server", "embedded.inbox", "standin.py serve"):
        os.kill(member(family, part), signal.SIGKILL)
    wait_until(lambda: family.output.count("running again") == 5, what=family.output)
    assert database_url(family) == url
    assert (await execute(family, "SELECT 1 AS one"))[0]["one"] == 1
    assert family.process.poll() is None


def test_a_start_that_fails_ends_plainly(made_data_dir: Path, run_family: RunFamily) -> None:
    family = run_family(made_data_dir, STANDIN_FAIL="serve")
    assert family.wait() == 1
    plain = family.output[family.output.index("Error: ") :]
    assert plain.startswith("Error: server did not start: it ended with exit code 1; its last")
    assert "cannot listen on 127.0.0.1:50051: Address already in use" in plain
    assert "Traceback" not in family.output
    assert not family.members()


def test_a_second_ctrl_c_is_impatient(made_data_dir: Path, run_family: RunFamily) -> None:
    family = run_family(made_data_dir, STANDIN_STUBBORN="work").wait_ready()
    members = family.members()
    family.signal(signal.SIGINT)
    wait_until(lambda: "a second one ends it at once" in family.output)
    family.signal(signal.SIGINT)
    assert family.wait(10) == 130
    assert not any(map(is_alive, members))


async def test_what_is_given_is_not_started(data_dir: Path, run_family: RunFamily) -> None:
    family = run_family(
        data_dir,
        MAILGRPC_DATABASE_URL="postgresql://u:secret@db.example:5432/x",
        MAILGRPC_REDIS_URL="redis://cache.example:6379/0",
        MAILGRPC_CHANNEL_URL="capture:",
    )
    wait_until(lambda: "✓ worker" in family.output)
    report = r"^· postgres db\.example:5432   · valkey cache\.example:6379   ✓ server \S+   ✓ wor"
    assert re.search(report, family.output, re.MULTILINE), family.output
    assert "secret" not in family.output
    assert "inbox" not in family.output


async def test_a_stack_of_some_parts(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", inbox_smtp_listen=HostPort("127.0.0.1", 0))
    parts = {Part.POSTGRES, Part.VALKEY, Part.INBOX}
    async with Stack(settings, parts=parts, durable=False) as stack:
        assert [running.part for running in stack.running] == [
            Part.POSTGRES,
            Part.VALKEY,
            Part.INBOX,
        ]
        assert stack.running[2] == Running(Part.INBOX, stack.inbox or "")
        assert str(stack.redis_url).startswith("unix:///")
        connection = await asyncpg.connect(stack.database_url)
        assert await connection.fetchval("SHOW fsync") == "off"
        await connection.close()


STACK_SCRIPT = """
import asyncio, os, sys
from pathlib import Path
from mailgrpc.config import HostPort, Settings
from mailgrpc.embedded.stack import Part, Stack
async def main():
    settings = Settings(data_dir=Path(sys.argv[1]), inbox_smtp_listen=HostPort("127.0.0.1", 0))
    async with Stack(settings, parts={Part.POSTGRES, Part.VALKEY, Part.INBOX}) as stack:
        print([running.part.value for running in stack.running])
asyncio.run(main())
"""


@pytest.mark.parametrize("mode", [0o777, 0o755])
def test_an_ordinary_user_runs_it_where_it_may_write(
    place: Path, as_nobody: AsNobody, mode: int
) -> None:
    place.chmod(mode)
    ran = as_nobody.run("-c", STACK_SCRIPT, str(place / "data"))
    if mode == 0o777:
        assert ran.stdout == "['postgres', 'valkey', 'inbox']\n", ran.stderr
    else:
        assert "cannot make the data directory" in ran.stderr
        assert "Permission denied; choose another --data-dir" in ran.stderr
