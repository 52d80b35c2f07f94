"""`mailgrpc key`: API keys, for servers that ask for them (MAILGRPC_AUTH=keys)."""

from __future__ import annotations

import click

from mailgrpc.cli.database import with_database
from mailgrpc.db.projects import create_key, list_keys, revoke_key


@click.group()
def key() -> None:
    """Make, list and revoke API keys. Asks the database, not the server."""


@key.command()
@click.argument("name")
@click.option("--project", default="default", show_default=True, help="Made if it is not there.")
def create(name: str, project: str) -> None:
    """Make a key and print it: once, it is stored as a hash only.

    NAME says whose it is; events tell it as their actor.
    """
    click.echo(with_database(lambda database: create_key(database, project, name)))


@key.command("list")
def list_() -> None:
    """List the keys: id, project, name, when made, whether revoked."""
    for row in with_database(list_keys):
        click.echo("\t".join(row))


@key.command()
@click.argument("key_id")
def revoke(key_id: str) -> None:
    """Revoke a key by its id. Servers trust what they have seen for ten seconds more."""
    if not with_database(lambda database: revoke_key(database, key_id)):
        raise click.ClickException(f"no key {key_id} that is not revoked; see `mailgrpc key list`")
