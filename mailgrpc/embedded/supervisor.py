"""Keeps a family of servers: started in order, started again when they die, ended in reverse.

What is promised: while `wait` waits, each server runs or is being started again; after `stop`
nothing runs. A server that has once been ready and dies is started again, later each time if it
keeps dying; one that fails to start five times in a row ends the family, with its error. A first
start that fails ends it at once: then it is the settings, and waiting will not mend them.

Servers block (`start`, `stop`), so they are called in threads. A thread cannot be cancelled; what
ends a start under way is the server's own `stop`, from another thread. So a start, once begun, is
always awaited, and `stop` is repeated until the start has seen it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from mailgrpc.embedded.process import Process
from mailgrpc.errors import EmbeddedError

BACKOFF_S = (0.2, 1.0, 2.0, 5.0, 10.0)
STARTS_IN_A_ROW = 5
_LONG_LIFE_S = 30.0
"""Who lived this long died of something new: the backoff begins anew."""


class Server(Protocol):
    """What the supervisor asks of a server; each method blocks and may be repeated."""

    name: str

    def start(self) -> str:
        """Start, and return what to show beside the name. Raises EmbeddedError."""

    def stop(self, *, now: bool = False) -> None:
        """End it, or a start that is under way."""

    @property
    def process(self) -> Process | None:
        """The process that `start` made."""


class Step(Protocol):
    """Something on the way that ends by itself."""

    def run(self) -> object:
        """Do it, blocking. Raises EmbeddedError."""

    def stop(self, *, now: bool = False) -> None:
        """Make `run` end early."""


@dataclass(slots=True)
class _Member:
    server: Server | Step
    starting: asyncio.Task[Any] | None = None
    keeper: asyncio.Task[None] | None = None


class Supervisor:
    """The family. Belongs to the event loop that it is first used in.

    `say(name, text)` hears what happens to a server.
    """

    def __init__(self, say: Callable[[str, str], None]) -> None:
        self._say = say
        self._generations: list[list[_Member]] = []
        self._failed = asyncio.Event()
        self._failure: BaseException | None = None
        self._hurried = asyncio.Event()
        self._stopping = False

    async def start(self, *servers: Server) -> list[str]:
        """Start servers side by side, after those of earlier calls, and keep them running.

        Returns what each start returned. Raises the first error; the rest waits for `stop`.
        """
        members = self._add(servers)
        starts = (self._start(*pair) for pair in zip(members, servers, strict=True))
        shown = await asyncio.gather(*starts)
        for member, server in zip(members, servers, strict=True):
            member.keeper = asyncio.create_task(self._keep(member, server))
        return shown

    async def run(self, step: Step) -> None:
        """Take a step before the next start. Raises its error."""
        (member,) = self._add([step])
        member.starting = asyncio.create_task(asyncio.to_thread(step.run))
        await asyncio.shield(member.starting)

    async def wait(self) -> None:
        """Wait until a server cannot be kept running, and raise its error."""
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    async def stop(self) -> None:
        """End all, the youngest first. Can be repeated; safe where a start failed or goes on."""
        self._stopping = True
        for generation in reversed(self._generations):
            await asyncio.gather(*(self._stop(member) for member in generation))

    def hurry(self) -> None:
        """Make a `stop`, also one under way, end everything at once."""
        self._hurried.set()

    def _add(self, servers: Iterable[Server | Step]) -> list[_Member]:
        if self._stopping:
            raise EmbeddedError("stopped before all was ready")
        members = [_Member(server) for server in servers]
        self._generations.append(members)
        return members

    async def _start(self, member: _Member, server: Server) -> str:
        if self._stopping:
            raise EmbeddedError(f"{server.name}: stopped before it was ready")
        starting = member.starting = asyncio.create_task(asyncio.to_thread(server.start))
        return await asyncio.shield(starting)

    async def _keep(self, member: _Member, server: Server) -> None:
        """Start a server again whenever it has ended."""
        name = server.name
        short_lives = 0
        try:
            while True:
                process = server.process
                assert process is not None
                begun_at = time.monotonic()
                await _end_of(process)
                if self._stopping:
                    return
                lived_s = time.monotonic() - begun_at
                short_lives = short_lives + 1 if lived_s < _LONG_LIFE_S else 0
                self._say(name, f"{process.how_it_ended()}; starting it again")
                await self._start_again(member, server, short_lives)
                self._say(name, "running again")
        except Exception as error:  # noqa: BLE001  whatever it is, `wait` must raise it
            if not self._stopping:
                self._failure = error
                self._failed.set()

    async def _start_again(self, member: _Member, server: Server, short_lives: int) -> None:
        for failures in range(STARTS_IN_A_ROW):
            pauses = max(short_lives - 1, 0) + failures
            await asyncio.sleep(BACKOFF_S[min(pauses, len(BACKOFF_S) - 1)])
            try:
                await self._start(member, server)
                return
            except (EmbeddedError, OSError) as error:
                if failures == STARTS_IN_A_ROW - 1 or self._stopping:
                    raise
                first_line = str(error).partition("\n")[0]
                self._say(server.name, f"{first_line} (will be tried again)")

    async def _stop(self, member: _Member) -> None:
        if member.keeper is not None:
            member.keeper.cancel()
        while True:
            settled = member.starting is None or member.starting.done()
            await self._stop_once(member.server)
            if settled or member.starting is None:
                return
            # The stop may have come before the start had anything to be stopped.
            await asyncio.wait({member.starting}, timeout=0.05)

    async def _stop_once(self, server: Server | Step) -> None:
        hurried = asyncio.create_task(self._hurried.wait())
        stopping = asyncio.create_task(asyncio.to_thread(server.stop, now=self._hurried.is_set()))
        await asyncio.wait({stopping, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await asyncio.to_thread(server.stop, now=True)
        hurried.cancel()
        await stopping


async def _end_of(process: Process) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def tell() -> None:  # from the process's own thread
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(ended.set)

    process.when_ended(tell)
    await ended.wait()
