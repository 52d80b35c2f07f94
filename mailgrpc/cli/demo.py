"""`mailgrpc demo`: the main job, for real, on this machine, in a few seconds.

Starts what `mailgrpc up` starts, with data of its own that goes afterwards, and lets `story` use
it. Nothing of the user's settings takes part, so that no mail can leave the machine. At the end it
looks whether really nothing runs any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import click

from mailgrpc.cli.output import Output, Styled
from mailgrpc.cli.story import CATEGORIES, Mishap, tell_story
from mailgrpc.client import AsyncMailClient
from mailgrpc.config import HostPort, Settings
from mailgrpc.embedded.accounts import make_data_directory
from mailgrpc.embedded.locks import FamilyLock
from mailgrpc.embedded.stack import Stack
from mailgrpc.errors import EmbeddedError

USUAL = Settings()
ANY_PORT = HostPort(USUAL.listen.host, 0)
EXIT_TERMINATED = 143


@click.command()
def demo() -> None:
    """Show the main job with real mails, and exit.

    Starts a PostgreSQL, a Valkey, a local inbox, a server and a worker, hands over three mails,
    watches what becomes of them, looks into the inbox, and ends everything. No mail leaves this
    machine. Exit code 1 when something is not as it should be.
    """
    try:
        asyncio.run(_demo(Output(for_people=True)))
    except asyncio.CancelledError:
        raise click.exceptions.Exit(EXIT_TERMINATED) from None


async def _demo(output: Output) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    data_dir = Path(tempfile.gettempdir()) / f"mailgrpc-demo-{secrets.token_hex(8)}"
    summary = ""
    try:
        async with _family(data_dir, output) as stack:
            assert stack.listen is not None
            async with AsyncMailClient(stack.listen) as client:
                summary = await tell_story(client, data_dir / "inbox", output)
    except asyncio.CancelledError:
        summary = "Interrupted."
        raise
    finally:
        left = await asyncio.to_thread(_what_is_left, data_dir)
        shutil.rmtree(data_dir, ignore_errors=True)
        if left:
            raise Mishap(left)
        if summary:
            output.line(Styled(f"{summary} Nothing left running.", "bold"))


@contextlib.asynccontextmanager
async def _family(data_dir: Path, output: Output) -> AsyncIterator[Stack]:
    """Everything running, on the usual ports where these are free."""
    begun_at = time.monotonic()
    make_data_directory(data_dir)
    for listen in (USUAL.listen, ANY_PORT) if _is_free(USUAL.listen) else (ANY_PORT,):
        stack = _stack(data_dir, listen)
        # A task of its own: a start is not cancelled, it is ended by `stop`, and then awaited.
        starting = asyncio.create_task(stack.start())
        try:
            try:
                await asyncio.shield(starting)
            except EmbeddedError:
                if listen is ANY_PORT or _is_free(listen):
                    raise
                continue  # somebody took the port while PostgreSQL started
            _report(output, stack, time.monotonic() - begun_at)
            yield stack
            return
        finally:
            await stack.stop()
            await asyncio.gather(starting, return_exceptions=True)


def _stack(data_dir: Path, listen: HostPort) -> Stack:
    """What is started. The settings of the user that could change the story are overridden."""
    no_settings = data_dir / "mailgrpc.toml"
    no_settings.touch()
    environ = {
        "MAILGRPC_CATEGORIES": ",".join(f"{name}={bit}" for name, bit in CATEGORIES.items()),
        "MAILGRPC_CONFIG": str(no_settings),
        "MAILGRPC_AUTH": "off",
        "MAILGRPC_LOG_LEVEL": "warning",
    }
    return Stack(Settings(listen=listen, data_dir=data_dir, grace_s=5.0), environ=environ)


def _report(output: Output, stack: Stack, took_s: float) -> None:
    parts = [f"✓ {running.part.value} {running.detail}".rstrip() for running in stack.running]
    output.line("   ".join([*parts, f"{took_s:.1f} s"]))
    _tell_other_port(output, USUAL.listen, stack.listen)
    _tell_other_port(output, USUAL.inbox_smtp_listen, stack.inbox)


def _tell_other_port(output: Output, usual: HostPort, taken: str | None) -> None:
    if taken is not None and taken != str(usual):
        output.line(Styled(f"  {usual} is taken by another program, so it is {taken}", "dim"))


def _is_free(where: HostPort) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((where.host, where.port))
        except OSError:
            return False
    return True


def _what_is_left(data_dir: Path) -> str:
    """What still runs of the family, in a line; empty where nothing does.

    Each of its processes holds the family's lock: who gets it has proof that none is left.
    """
    if not data_dir.exists():
        return ""
    lock = FamilyLock(data_dir)
    try:
        lock.acquire(patience_s=2.0)
    except EmbeddedError as error:
        return str(error)
    lock.release()
    return ""
