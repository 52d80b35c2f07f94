"""`mailgrpc migrate`: bring the database to this program's schema."""

from __future__ import annotations

import click

from mailgrpc.cli.process import load, told
from mailgrpc.db.migrate import migrate as migrate_database
from mailgrpc.errors import SettingsError


@click.command()
def migrate() -> None:
    """Create or upgrade the database schema. Safe to run at any time, and twice at once."""
    settings = load()
    with told():
        if settings.database_url is None:
            raise SettingsError("MAILGRPC_DATABASE_URL is not set")
        revision = migrate_database(settings.database_url)
    click.echo(f"the database is at schema {revision}")
