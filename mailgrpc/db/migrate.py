"""Bringing a database to the schema of this program.

Migrations are Alembic's, in `migrations/versions`; the tables are described a second time in
`tables.py` for queries, and a test holds the two together.
"""

from __future__ import annotations

from alembic import command
from alembic.config import Config

from mailgrpc.db.schema import MIGRATIONS, wanted_revision


def migrate(database_url: str, revision: str = "head") -> str:
    """Bring the database to `revision` and return it. Blocking; for the command line.

    Several at once are safe: they take an advisory lock. Raises SettingsError,
    StoreUnavailable.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["database_url"] = database_url
    command.upgrade(config, revision)
    return wanted_revision()
