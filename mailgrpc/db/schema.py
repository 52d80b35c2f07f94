"""The version of the schema, and refusing any other.

Bringing a database to it is apart (migrate.py): what serves and works need not load Alembic, which
takes 8 MB.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from mailgrpc.db.engine import Database
from mailgrpc.errors import SchemaError

MIGRATIONS = Path(__file__).parent / "migrations"


def wanted_revision() -> str:
    """The revision that this program was written for."""
    return _revisions()[-1]


def _revisions() -> list[str]:
    """All that this program knows, by the names of their files: NNNN_title.py."""
    return sorted(p.name[:4] for p in (MIGRATIONS / "versions").glob("[0-9][0-9][0-9][0-9]_*.py"))


async def read_installation(database: Database) -> uuid.UUID:
    """Which database this is: drawn once, the same on its standbys and in its backups."""
    [row] = await database.fetch("SELECT id FROM installation")
    return uuid.UUID(bytes=row["id"].bytes)  # a plain one: asyncpg's is a class of its own


async def check_schema(database: Database) -> None:
    """Raise SchemaError with what to do unless the database is at the wanted revision."""
    wanted = wanted_revision()
    [(table,)] = await database.fetch("SELECT to_regclass('mailgrpc.alembic_version')::text")
    if table is None:
        raise SchemaError("the database is empty: run `mailgrpc migrate`")
    rows = await database.fetch("SELECT version_num FROM mailgrpc.alembic_version")
    found = rows[0][0] if rows else "none"
    if found == wanted:
        return
    if found in _revisions() or found == "none":
        raise SchemaError(
            f"the database is at schema {found}, this program needs {wanted}: run `mailgrpc migrate`"
        )
    raise SchemaError(
        f"the database is at schema {found}, which this program (schema {wanted}) does not know: "
        "it is older than the database; upgrade mailgrpc"
    )
