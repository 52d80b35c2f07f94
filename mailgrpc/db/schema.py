"""The version of the schema: bringing a database to it, and refusing any other.

Migrations are Alembic's, in `migrations/versions`; the tables are described a second time in
`tables.py` for queries, and a test holds the two together. Programs that only look whether the
revision is theirs do not load Alembic, which takes 8 MB.
"""

from __future__ import annotations

from pathlib import Path

from mailgrpc.db.engine import Database
from mailgrpc.errors import SchemaError

_MIGRATIONS = Path(__file__).parent / "migrations"


def migrate(database_url: str, revision: str = "head") -> str:
    """Bring the database to `revision` and return it. Blocking; for the command line.

    Several at once are safe: they take an advisory lock. Raises SettingsError,
    StoreUnavailable.
    """
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["database_url"] = database_url
    command.upgrade(config, revision)
    return wanted_revision()


def wanted_revision() -> str:
    """The revision that this program was written for."""
    return _revisions()[-1]


def _revisions() -> list[str]:
    """All that this program knows, by the names of their files: NNNN_title.py."""
    return sorted(p.name[:4] for p in (_MIGRATIONS / "versions").glob("[0-9][0-9][0-9][0-9]_*.py"))


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
