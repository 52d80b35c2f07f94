"""The version of the schema: bringing a database to it, and refusing any other.

Migrations are Alembic's, in `migrations/versions`; the tables are described a second time in
`tables.py` for queries, and a test holds the two together.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from mailgrpc.db.engine import Database
from mailgrpc.errors import SchemaError


def migrate(database_url: str, revision: str = "head") -> str:
    """Bring the database to `revision` and return it. Blocking; for the command line.

    Several at once are safe: they take an advisory lock. Raises SettingsError,
    StoreUnavailable.
    """
    config = _alembic_config()
    config.attributes["database_url"] = database_url
    command.upgrade(config, revision)
    return wanted_revision()


def wanted_revision() -> str:
    """The revision that this program was written for."""
    revision = ScriptDirectory.from_config(_alembic_config()).get_current_head()
    assert revision is not None
    return revision


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
    known = {
        script.revision
        for script in ScriptDirectory.from_config(_alembic_config()).walk_revisions()
    }
    if found in known or found == "none":
        raise SchemaError(
            f"the database is at schema {found}, this program needs {wanted}: run `mailgrpc migrate`"
        )
    raise SchemaError(
        f"the database is at schema {found}, which this program (schema {wanted}) does not know: "
        "it is older than the database; upgrade mailgrpc"
    )


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config
