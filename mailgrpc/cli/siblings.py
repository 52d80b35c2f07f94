"""`mailgrpc serve --processes N`: one parent that serves nothing, and N servers on one port.

What is promised: while the parent runs, each of its children serves or is being started again,
later each time while it keeps dying, for as long as it takes (a database that is away is no
reason to end those that wait for it). A child that fails its very first start ends all, with its
exit code: then it is the settings. When the parent is told to stop, every child stops in order;
when the parent dies, however that happens, every child stops too.

How: the children's standard input is a pipe whose other end the parent alone holds, so that its
end of file means that the parent is gone (`end_with_parent`). They have sessions of their own: a
Ctrl-C is the parent's, who tells each child once. The first child is ready before the others
start, so that what is wrong with the settings is said once.

What can go wrong: connections that the kernel gave to a child which dies before it has accepted
them are reset, and a client calls again, as it does whenever a server dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import threading
import time

import click

from mailgrpc.cli.process import OVERTIME_S
from mailgrpc.config import HostPort, Settings
from mailgrpc.embedded.command import python_command
from mailgrpc.embedded.process import inherited_environ
from mailgrpc.telemetry import notify_ready

log = logging.getLogger(__name__)

BACKOFF_S = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)
_LONG_LIFE_S = 30.0
"""Who lived this long died of something new: the backoff begins anew."""
_HURRY_S = 2.0


class Siblings:
    """The children on one port, which the caller holds (`server.port`)."""

    def __init__(self, settings: Settings, where: HostPort) -> None:
        self.exit_code = 0
        """0 when all stopped in order."""
        self._settings = settings
        self._where = where
        # Servers of other machines begin with another lane of the feed.
        first = 1 + secrets.randbelow(settings.feed_lanes)
        self._numbers = range(first, first + settings.processes)
        self._running: dict[int, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._life_r, self._life_w = os.pipe()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`. A cancellation after it ends the children at once."""
        starting = asyncio.create_task(self._start_all())
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set() and starting.result():
                click.echo(f"serving on {self._where} in {len(self._numbers)} processes", err=True)
                notify_ready(self._settings.ready_fd, str(self._where))
                await stopped
        finally:
            await self._end()

    async def _start_all(self) -> bool:
        """Whether each child became ready."""
        for numbers in (self._numbers[:1], self._numbers[1:]):
            starts = []
            for number in numbers:
                started: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
                self._keepers.append(asyncio.create_task(self._keep(number, started)))
                starts.append(started)
            if not all(await asyncio.gather(*starts)):
                return False
        return True

    async def _keep(self, number: int, started: asyncio.Future[bool]) -> None:
        """One child's lives, one after the other; `started` hears how the first one began."""
        short_lives = 0
        while True:
            begun_at = time.monotonic()
            how = await self._live(number, started)
            if self._stopping.is_set() or not started.done():
                break
            lived_s = time.monotonic() - begun_at
            short_lives = short_lives + 1 if lived_s < _LONG_LIFE_S else 0
            pause_s = BACKOFF_S[min(max(short_lives - 1, 0), len(BACKOFF_S) - 1)]
            log.warning("a server process %s; starting another in %g s", how, pause_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
            if self._stopping.is_set():
                break
        if not started.done():
            started.set_result(False)

    async def _live(self, number: int, started: asyncio.Future[bool]) -> str:
        """One life of a child; how it ended."""
        try:
            process, ready_pipe = await self._start(number)
        except OSError as error:
            log.error("a server process could not be started: %s", error)
            self.exit_code = 1
            return "could not be started"
        ready = (await _first_line(ready_pipe)).startswith(b"ready")
        if ready and started.done():
            log.info("server process %d serves in its place", process.pid)
        elif ready:
            started.set_result(True)
        code = await process.wait()
        del self._running[number]
        # Before it is ready a child cannot yet stop in order, and need not.
        unasked = ready or code != -signal.SIGTERM
        if code and unasked and (self._stopping.is_set() or not started.done()):
            self.exit_code = code if code > 0 else 1
        how = (
            f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        )
        return f"({process.pid}) {how}"

    async def _start(self, number: int) -> tuple[asyncio.subprocess.Process, int]:
        """Start a child; it, and the pipe by which it says that it serves."""
        ready_r, ready_w = os.pipe()
        environ = {"MAILGRPC_SIBLING": str(number), "MAILGRPC_READY_FD": str(ready_w)}
        try:
            process = await asyncio.create_subprocess_exec(
                *python_command("mailgrpc", "serve", "--listen", str(self._where)),
                env=inherited_environ() | environ,
                stdin=self._life_r,
                pass_fds=(ready_w,),
                start_new_session=True,
            )
        except OSError:
            os.close(ready_r)
            raise
        finally:
            os.close(ready_w)
        self._running[number] = process
        if self._stopping.is_set():  # it was being made while its siblings were told
            process.send_signal(signal.SIGTERM)
        return process, ready_r

    async def _end(self) -> None:
        """Stop all: in order, at once when cancelled, by force when that does not help."""
        self._stopping.set()
        self._tell(signal.SIGTERM)
        try:
            await self._ended(self._settings.grace_s + OVERTIME_S + 0.5)  # they tell what hangs
        except asyncio.CancelledError:
            self._tell(signal.SIGTERM)
            await self._ended(_HURRY_S)
            raise
        finally:
            self._tell(signal.SIGKILL)
            await self._ended(_HURRY_S)

    async def _ended(self, patience_s: float) -> None:
        if self._keepers:
            await asyncio.wait(self._keepers, timeout=patience_s)

    def _tell(self, number: signal.Signals) -> None:
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


async def _first_line(fd: int) -> bytes:
    """What is read from a pipe up to a line's end, or its own."""
    reader = asyncio.StreamReader()
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
    )
    try:
        return await reader.readline()
    finally:
        pipe.close()


def give_way() -> None:
    """In a child: not take the processor from whoever has it when there is something to do.

    As it is, a server that is woken pushes aside the sibling, the worker or the PostgreSQL that runs, does a
    little, and leaves its caches cold; on full processors that cost a fifth of the servers' time
    (docs/decisions/0020). Free ones are taken at once. Linux alone knows how, and a sandbox may forbid it;
    a policy that an operator has chosen is left.
    """
    with contextlib.suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def end_with_parent(grace_s: float) -> None:
    """In a child: stop as by SIGTERM when the parent is gone, by force when that does not help.

    A thread, because the loop may be what hangs.
    """

    def watch() -> None:
        while os.read(0, 64):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s + OVERTIME_S + 0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
