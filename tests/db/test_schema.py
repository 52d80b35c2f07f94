"""The schema: what the migrations make is what the program thinks, and no other is served."""

from __future__ import annotations

import asyncio
import enum
import os
import sys
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from mailgrpc import errors
from mailgrpc.core import delivery as domain
from mailgrpc.db import schema
from mailgrpc.db.connecting import SCHEMA
from mailgrpc.db.engine import Database
from mailgrpc.db.migrate import migrate
from mailgrpc.db.schema import check_schema, wanted_revision
from mailgrpc.db.tables import metadata
from mailgrpc.errors import SchemaError
from mailgrpc.v1 import delivery_pb2, errors_pb2, message_pb2


def _differences(connection: sa.Connection) -> list[Any]:
    def is_described(entity: Any, name: str, kind: str, reflected: bool, other: Any) -> bool:
        return kind != "index" and (kind != "table" or f"{SCHEMA}.{name}" in metadata.tables)

    context = MigrationContext.configure(
        connection,
        opts={"include_schemas": True, "include_object": is_described, "compare_type": True},
    )
    return compare_metadata(context, metadata)


async def test_the_tables_are_described_as_they_are(db: Database) -> None:
    async with db.engine.connect() as connection:
        assert await connection.run_sync(_differences) == []


ENUMS: list[tuple[type[enum.IntEnum], Any]] = [
    (domain.State, delivery_pb2.DeliveryState),
    (domain.Outcome, delivery_pb2.AttemptOutcome),
    (domain.Cause, delivery_pb2.FailureCause),
    (domain.WaitReason, delivery_pb2.WaitReason),
    (domain.SuppressionReason, delivery_pb2.SuppressionReason),
    (domain.Role, delivery_pb2.RecipientRole),
    (domain.Mode, message_pb2.DeliveryMode),
    (errors.Reason, errors_pb2.ErrorReason),
]


@pytest.mark.parametrize(("ours", "contract"), ENUMS, ids=[ours.__name__ for ours, _ in ENUMS])
def test_the_numbers_of_the_domain_are_those_of_the_contract(ours: Any, contract: Any) -> None:
    said = {number: name for name, number in contract.items() if number}
    assert {int(m): m.name for m in ours if m} == {
        number: name[-len(ours(number).name) :] for number, name in said.items()
    }


async def accepts(db: Database, sql: str, *args: Any) -> bool:
    try:
        await db.write(sql, *args)
    except asyncpg.CheckViolationError:
        return False
    return True


@pytest.mark.parametrize(
    ("column", "members"),
    [("state", domain.State), ("role", domain.Role), ("mode", domain.Mode)],
)
async def test_a_delivery_holds_the_numbers_of_the_domain_and_no_others(
    db: Database, column: str, members: type[enum.IntEnum]
) -> None:
    values = {"state": "1", "role": "1", "mode": "1", "attempt_id": "NULL"}
    for number in range(-1, max(members) + 3):
        values[column] = str(number)
        values["attempt_id"] = "gen_random_uuid()" if values["state"] == "2" else "NULL"
        sql = (
            "INSERT INTO deliveries (id, project_id, recipient, channel, priority, flags, "
            f"state_since, version, {', '.join(values)}) VALUES (gen_random_uuid(), 1, 'a', 'c', "
            f"20, 0, now(), 1, {', '.join(values.values())})"
        )
        assert await accepts(db, sql) == (number in set(members))


async def test_sending_has_an_attempt_and_nothing_else_has(db: Database) -> None:
    sql = (
        "INSERT INTO deliveries (id, project_id, recipient, role, channel, priority, mode, flags, "
        "state, state_since, version, attempt_id) VALUES (gen_random_uuid(), 1, 'a', 1, 'c', 20, "
        "1, 0, $1, now(), 1, CASE WHEN $2 THEN gen_random_uuid() END)"
    )
    for state in domain.State:
        for has_attempt in (False, True):
            is_right = has_attempt == (state is domain.State.SENDING)
            assert await accepts(db, sql, int(state), has_attempt) == is_right


async def test_an_attempt_holds_the_outcomes_of_the_domain_and_no_others(db: Database) -> None:
    sql = (
        "INSERT INTO attempts VALUES (gen_random_uuid(), 1, gen_random_uuid(), gen_random_uuid(), "
        "'c', 'p', now(), now(), $1, 0, 0, '', '', '', NULL)"
    )
    for number in range(-1, max(domain.Outcome) + 3):
        assert await accepts(db, sql, number) == (number in set(domain.Outcome))


async def test_a_mask_of_0_cannot_be_stored(db: Database) -> None:
    for mask in (-2, 0, 1, 2**31 - 2):
        sql = "INSERT INTO preferences VALUES (1, $2, $1, now())"
        assert await accepts(db, sql, mask, str(mask)) == (mask > 0)


async def test_the_migrated_schema_is_accepted(db: Database) -> None:
    await check_schema(db)


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("0000", "upgrade mailgrpc"),
        ("9999", "upgrade mailgrpc"),
        (None, "run `mailgrpc migrate`"),
    ],
    ids=["unheard of", "newer", "interrupted"],
)
async def test_another_schema_is_refused_with_what_to_do(
    db: Database, version: str | None, told: str
) -> None:
    if version is None:
        await db.write("DELETE FROM alembic_version")
    else:
        await db.write("UPDATE alembic_version SET version_num = $1", version)
    with pytest.raises(SchemaError, match=told) as caught:
        await check_schema(db)
    assert wanted_revision() in str(caught.value)
    assert (version or "none") in str(caught.value)


async def test_an_older_schema_is_refused_with_what_to_do(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a program of the next version."""
    monkeypatch.setattr(schema, "wanted_revision", lambda: "9999")
    with pytest.raises(SchemaError, match=r"schema \d{4}, this program needs 9999.*migrate"):
        await check_schema(db)


async def test_an_empty_database_is_refused_with_what_to_do(empty_database_url: str) -> None:
    database = Database(empty_database_url, pool_size=1)
    with pytest.raises(SchemaError, match=r"empty.*mailgrpc migrate"):
        await check_schema(database)
    await database.close()


async def test_migrations_at_once_are_safe(empty_database_url: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAILGRPC_")}
    environment["MAILGRPC_DATABASE_URL"] = empty_database_url

    async def run() -> tuple[int | None, bytes]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mailgrpc", "migrate"),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        return process.returncode, said

    for code, said in await asyncio.gather(*(run() for _ in range(3))):
        assert code == 0, said
    database = Database(empty_database_url, pool_size=1)
    await check_schema(database)
    await database.close()


def test_a_second_migration_changes_nothing(database_url: str) -> None:
    assert migrate(database_url) == wanted_revision()


def test_the_files_are_named_by_their_revisions() -> None:
    config = Config()
    config.set_main_option("script_location", str(schema.MIGRATIONS))
    scripts = ScriptDirectory.from_config(config)
    assert schema._revisions() == sorted(s.revision for s in scripts.walk_revisions())
    assert wanted_revision() == scripts.get_current_head()
