"""`mailgrpc workers`: what an operator sees of the sessions."""

from __future__ import annotations

import asyncio
import json

import pytest
from click.testing import CliRunner

from mailgrpc.cli.main import root
from mailgrpc.core.ids import delivery_id, new_id
from mailgrpc.db.deliveries import Starting, claim_due, start_deliveries
from mailgrpc.db.engine import Database
from mailgrpc.db.workers import beat, end_session, open_session
from tests.worker.rig import Store


async def _fill(database_url: str) -> None:
    db = Database(database_url, pool_size=1)
    messages = await Store(db).put_many([[f"a{n}@example.com"] for n in range(3)])
    busy = await open_session(db, "host:1", ["bulk", "default"])
    await claim_due(db, busy, "default", 2, 0)
    start = Starting(delivery_id(messages[0], 1), new_id(), new_id())
    await start_deliveries(db, busy, 0, [start])
    await beat(db, busy, "", ["bulk"])
    held = await open_session(db, "host:2", ["default"])
    await beat(db, held, "the journal cannot be written: No space left on device")
    await open_session(db, "host:3", ["default"], lease_s=0.000001)
    await end_session(db, await open_session(db, "host:4", ["default"]))
    await db.close()


@pytest.fixture
def listed(database_url: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asyncio.run(_fill(database_url))
    monkeypatch.setenv("MAILGRPC_DATABASE_URL", database_url)
    return ["workers"]


def test_a_line_a_session_says_what_it_holds_and_why_it_does_not_work(listed: list[str]) -> None:
    result = CliRunner().invoke(root, listed)
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["host:1", "host:2", "host:3", "host:4"]
    assert [line[1] for line in lines] == [
        "paused: bulk",
        "held: the journal cannot be written: No space left on device",
        "silent",
        "ended, not settled yet",
    ]
    assert lines[0][5:] == ["2", "1"]


def test_json_is_an_object_a_line(listed: list[str]) -> None:
    result = CliRunner().invoke(root, [*listed, "--json"])
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    assert objects[0]["claimed"] == 2
    assert objects[0]["sending"] == 1
    assert objects[0]["pausedChannels"] == ["bulk"]
    assert objects[2]["leaseS"] == pytest.approx(0.000001)


def test_one_that_misses_its_beats_is_late(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, it is not over before its lease is: until then it does not pass for one that works."""

    async def fill() -> None:
        db = Database(database_url, pool_size=1)
        await open_session(db, "host:1", ["default"], lease_s=30.0)
        await db.write("UPDATE workers SET beat_at = now() - interval '14 s'")
        await db.close()

    asyncio.run(fill())
    monkeypatch.setenv("MAILGRPC_DATABASE_URL", database_url)
    [line] = CliRunner().invoke(root, ["workers"]).stdout.splitlines()
    assert line.split("\t")[1].startswith("late: no beat for ")


def test_doctor_names_those_that_start_nothing(listed: list[str]) -> None:
    result = CliRunner().invoke(root, ["--target", "127.0.0.1:1", "doctor"])
    assert result.exit_code == 1
    [line] = [line for line in result.stdout.splitlines() if "\tworkers\t" in line]
    assert line.startswith("✗\tworkers\t0 of 3 work; host:1 paused: bulk; host:2 held: the journal")


def test_doctor_takes_a_misspelt_setting_for_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAILGRPC_LEASE", "30")
    result = CliRunner().invoke(root, ["--target", "127.0.0.1:1", "doctor"])
    assert result.exit_code == 2
    assert "MAILGRPC_LEASE is not a setting" in result.stdout.splitlines()[0]
