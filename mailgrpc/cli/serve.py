"""`mailgrpc serve`: the gRPC server."""

from __future__ import annotations

import asyncio

import click

from mailgrpc.cli.process import load, run_until_stopped
from mailgrpc.config import Settings
from mailgrpc.db.engine import Database
from mailgrpc.server.app import MailServer
from mailgrpc.telemetry import notify_ready


@click.command()
@click.option("--listen", metavar="HOST:PORT", help="Where to listen (MAILGRPC_LISTEN).")
def serve(listen: str | None) -> None:
    """Serve gRPC until SIGTERM or Ctrl-C."""
    settings = load(listen=listen)
    run_until_stopped(lambda stop: _serve(settings, stop), settings.grace_s)


async def _serve(settings: Settings, stop: asyncio.Event) -> None:
    database = Database(settings.database_url, pool_size=settings.database_pool)
    try:
        server = MailServer(settings, database)
        await database.open()
        where = await server.start()
        click.echo(f"serving on {where}", err=True)
        notify_ready(settings.ready_fd, str(where))
        await stop.wait()
        await server.stop()
    finally:
        await database.close()
