"""`mailgrpc serve`: the gRPC server, or several that share a port."""

from __future__ import annotations

import asyncio
import gc
import sys

import click

from mailgrpc.cli.process import COLLECT_AFTER_CALLS, load, run_until_stopped, told
from mailgrpc.cli.siblings import Siblings, end_with_parent, give_way
from mailgrpc.config import Settings
from mailgrpc.server.port import reserved
from mailgrpc.telemetry import notify_ready


@click.command()
@click.option("--listen", metavar="HOST:PORT", help="Where to listen (MAILGRPC_LISTEN).")
@click.option(
    "--processes",
    metavar="N",
    help="Server processes that share the port, on Linux: about one a core (MAILGRPC_PROCESSES).",
)
def serve(listen: str | None, processes: str | None) -> None:
    """Serve gRPC until SIGTERM or Ctrl-C."""
    settings = load(listen=listen, processes=processes)
    if settings.sibling is not None:
        give_way()
        end_with_parent(settings.grace_s)
    elif settings.processes > 1:
        sys.exit(_serve_together(settings))
    run_until_stopped(
        lambda stop: _serve(settings, stop), settings.grace_s, collect_after=COLLECT_AFTER_CALLS
    )


def _serve_together(settings: Settings) -> int:
    """Keep several servers; the exit code."""
    with told(), reserved(settings.listen) as where:
        siblings = Siblings(settings, where)
        # The children tell for themselves what hangs, and are waited for until they have.
        run_until_stopped(siblings.run, settings.grace_s + 3.0)
    return siblings.exit_code


async def _serve(settings: Settings, stop: asyncio.Event) -> None:
    # The parent of several servers needs none of this.
    from mailgrpc.db.engine import Database  # noqa: PLC0415
    from mailgrpc.server import wakeups  # noqa: PLC0415
    from mailgrpc.server.app import MailServer  # noqa: PLC0415

    database = Database(settings.database_url, pool_size=settings.database_pool)
    with wakeups.gathered():
        try:
            server = MailServer(settings, database)
            await database.open()
            where = await server.start()
            gc.freeze()  # all that was imported by now: looking through it takes 30 ms
            if settings.sibling is None:
                click.echo(f"serving on {where}", err=True)
            notify_ready(settings.ready_fd, str(where))
            await stop.wait()
            await server.stop()
        finally:
            await database.close()
