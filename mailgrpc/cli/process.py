"""What the long-running commands share: settings, logs, signals, and errors told in a line."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import click
import uvloop

from mailgrpc import failpoints
from mailgrpc.config import Settings, load_settings
from mailgrpc.errors import MailgrpcError, SettingsError
from mailgrpc.telemetry import start_logging

_M_MMAP_THRESHOLD = -3  # malloc.h
_OWN_MAPPING_BYTES = 2 * 1024 * 1024


def load(**flags: str | None) -> Settings:
    """The settings, with flags that were given; logging has begun. Exits 2 on a wrong one."""
    warnings: list[str] = []
    overrides = {name: text for name, text in flags.items() if text is not None}
    try:
        settings = load_settings(overrides=overrides, warn=warnings.append)
    except MailgrpcError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    start_logging(settings.log_format, settings.log_level, for_people=settings.under_up)
    with told():
        failpoints.arm(settings.failpoints)
    for warning in warnings if settings.sibling is None else ():
        click.echo(f"Warning: {warning}", err=True)
    return settings


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Tell an error of ours in one line and exit: 2 for a wrong setting, else 1."""
    try:
        yield
    except SettingsError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except MailgrpcError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


COLLECT_AFTER = 50_000
"""New objects, after which cycles among them are looked for. Python does after 700."""
COLLECT_AFTER_CALLS = 2_000
"""The same for a process that answers calls: gRPC leaves three objects of each in a cycle. Freeing 50,000
of these takes 25 to 55 ms, in which nobody is answered, every few seconds; 2,000 take one."""
OVERTIME_S = 4.0
"""How long after its grace time a `main` that still runs is thought to hang."""


def run_until_stopped(
    main: Callable[[asyncio.Event], Awaitable[None]],
    grace_s: float,
    *,
    collect_after: int = COLLECT_AFTER,
) -> None:
    """Run `main` with an event that SIGTERM or Ctrl-C sets; a second one ends at once.

    Cycles among new objects are looked for whenever there are `collect_after` more of these.

    A `main` that has not returned well after its grace time hangs: the process says where, and
    ends, before whoever sent the signal loses patience and nobody learns why.
    """

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(main(stop))

        def asked() -> None:
            if stop.is_set():
                task.cancel()
            else:
                overtime = threading.Timer(grace_s + OVERTIME_S, _give_up, [loop])
                overtime.daemon = True
                overtime.start()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    _collect_seldom(collect_after)
    _give_memory_back()
    with told():
        uvloop.run(run())


def _collect_seldom(collect_after: int) -> None:
    """Look for cycles among objects far less often than Python does by itself.

    Nearly all that a call makes is freed by its references, and looking at what is alive after
    every few hundred objects took a tenth of the processor.
    """
    gc.freeze()
    gc.set_threshold(collect_after, 50, 100)


def _give_memory_back() -> None:
    """Let the memory of large requests go back to the system when they are done.

    The C library keeps what it has freed in one piece of the heap the more, the larger the pieces
    were that it saw; after a few attachments of megabytes a process would stay that large. With a
    limit that is set, whatever is larger has its own mapping, which goes when it is freed.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)


def _awaited(coroutine: Any) -> Iterator[str]:
    """Where a coroutine stands, and what it awaits there, down to a future."""
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        yield f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        coroutine = coroutine.cr_await


def _give_up(loop: asyncio.AbstractEventLoop) -> None:
    """In a thread of its own: the loop itself may be what hangs."""
    click.echo("mailgrpc: told to stop, and still not over; this is what hangs:", err=True)
    for thread, frame in sys._current_frames().items():  # noqa: SLF001  the only way to see them
        if thread != threading.get_ident():
            traceback.print_stack(frame)
    for task in asyncio.all_tasks(loop):
        click.echo(f"{task.get_name()}: {' > '.join(_awaited(task.get_coro()))}", err=True)
    sys.stderr.flush()
    os._exit(1)
