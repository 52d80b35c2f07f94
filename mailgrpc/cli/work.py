"""`mailgrpc work`: the worker."""

from __future__ import annotations

import asyncio

import click

from mailgrpc.cli.process import load, run_until_stopped
from mailgrpc.config import Settings
from mailgrpc.db.engine import Database
from mailgrpc.telemetry import notify_ready
from mailgrpc.worker.main import keep_arq_running
from mailgrpc.worker.runtime import Worker


@click.command()
@click.option("--burst", is_flag=True, help="Send what is due now, then exit.")
def work(burst: bool) -> None:
    """Deliver what is due until SIGTERM or Ctrl-C."""
    settings = load()
    run_until_stopped(lambda stop: _work(settings, stop, burst), settings.grace_s)


async def _work(settings: Settings, stop: asyncio.Event, burst: bool) -> None:
    database = Database(settings.database_url, pool_size=settings.database_pool)
    try:
        worker = Worker(settings, database)
        await database.open()
        if burst:
            stopper = asyncio.create_task(_stop_claiming(worker, stop))
            await worker.burst()
            stopper.cancel()
            return
        await worker.start()
        arq = None
        if settings.redis_url is not None:
            arq = asyncio.create_task(keep_arq_running(settings.redis_url, worker))
        click.echo(f"working on {', '.join(sorted(settings.channels))}", err=True)
        notify_ready(settings.ready_fd, f"held: {worker.held}" if worker.held else "")
        await stop.wait()
        # Side by side: arq's worker takes a while to end where Redis does not answer.
        if arq is not None:
            arq.cancel()
        await worker.stop()
        if arq is not None:
            await asyncio.wait({arq})
    finally:
        await database.close()


async def _stop_claiming(worker: Worker, stop: asyncio.Event) -> None:
    await stop.wait()
    worker.stop_claiming()
