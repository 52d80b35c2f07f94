"""`mailgrpc up`: everything on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from mailgrpc.cli import running
from mailgrpc.config import Settings, load_settings
from mailgrpc.embedded.familylog import FamilyLog
from mailgrpc.embedded.stack import Running, Stack

EXIT_IMPATIENT = 130
"""A second Ctrl-C: ended, but not in order."""


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the data is kept.")
@click.option("--listen", metavar="HOST:PORT", help="Where gRPC listens; port 0: a free one.")
@click.option("--quiet", is_flag=True, help="Do not show the log of what is started.")
def up(data_dir: Path | None, listen: str | None, quiet: bool) -> None:
    """Run all of mailgrpc here: PostgreSQL, Valkey, a local inbox, the server and a worker.

    What MAILGRPC_DATABASE_URL, MAILGRPC_REDIS_URL or MAILGRPC_CHANNEL_URL names is used instead
    of starting it. Ctrl-C ends all of it; a second one at once. The data stays.
    """
    console = Console()  # knows about terminals and NO_COLOR
    colours = console.is_terminal and not console.no_color
    log = FamilyLog(sys.stdout, colours=colours, quiet=quiet)
    given = {"data_dir": data_dir and str(data_dir), "listen": listen}
    overrides = {name: text for name, text in given.items() if text}
    settings = load_settings(overrides=overrides, warn=log.say)
    sys.exit(asyncio.run(_run(settings, log)))


async def _run(settings: Settings, log: FamilyLog) -> int:
    """Start, tell, wait for the end, end. Returns the exit code."""
    begun_at = time.monotonic()
    stack = Stack(settings, log=log)
    asked = _Asked(stack, log)
    is_written = False
    starting = asyncio.create_task(stack.start())
    try:
        if await asked.while_(starting):
            running.write(settings.data_dir, stack.database_url, stack.redis_url)
            is_written = True
            log.headline(_report(stack.running, time.monotonic() - begun_at))
            await asked.while_(asyncio.create_task(stack.wait()))
    finally:
        if is_written:  # else the file belongs to the one that runs on
            running.remove(settings.data_dir)
        await stack.stop()
        await asyncio.gather(starting, return_exceptions=True)
    log.say("ended")
    return EXIT_IMPATIENT if asked.times > 1 else 0


class _Asked:
    """How often a signal asked us to end."""

    def __init__(self, stack: Stack, log: FamilyLog) -> None:
        self.times = 0
        self._stack = stack
        self._log = log
        self._first = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a shell's background
                loop.add_signal_handler(number, self._ask, number)

    async def while_(self, task: asyncio.Task[None]) -> bool:
        """Wait for `task`, and raise its error; False when a signal came first."""
        first = asyncio.create_task(self._first.wait())
        await asyncio.wait({task, first}, return_when=asyncio.FIRST_COMPLETED)
        first.cancel()
        if self._first.is_set():
            return False
        task.result()
        return True

    def _ask(self, number: signal.Signals) -> None:
        self.times += 1
        if self.times == 1:
            self._log.say(f"ending ({number.name}); a second one ends it at once")
            self._first.set()
        else:
            self._log.say("ending at once")
            self._stack.hurry()


def _report(parts: Sequence[Running], took_s: float) -> str:
    shown = [" ".join(filter(None, (_mark(run), run.part.value, run.detail))) for run in parts]
    return "   ".join([*shown, f"{took_s:.1f} s"])


def _mark(run: Running) -> str:
    if run.detail.startswith("held: "):  # mailgrpc work
        return "✗"
    return "✓" if run.ours else "·"
