"""Items that come singly and are worked through together.

Reading a message is a long way through Python. Between two calls gRPC and the kernel have the
processor, so that a message that is read in the task of its own call finds nothing of that in the
caches any more, and its answer leaves alone. Read behind one another, and answered so, the same
messages cost the server a third less of its time (docs/decisions/0020).

Whoever comes alone waits for a few turns of the event loop, which is some tens of microseconds; on a
server that is busy with other things for 40 turns, and for 50 ms at the most.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

FULL = 200
"""So many are not kept waiting for more."""
_IDLE_TURNS = 15
_IDLE_S = 0.001
"""An idle loop takes less for as many turns, some tens of microseconds; one that reads calls takes more."""
_QUIET_TURNS = 40  # whatever else the loop does meanwhile
_LONGEST_S = 0.050


class Together(Generic[T]):
    """Hands what was added to `work`, in the order in which it came, once no more is coming.

    `work` must not raise.
    """

    def __init__(self, work: Callable[[list[T]], None]) -> None:
        self._work = work
        self._items: list[T] = []
        self._gatherer: asyncio.Task[None] | None = None

    def add(self, item: T) -> None:
        """Have `item` worked on, in a few turns of the loop."""
        self._items.append(item)
        if self._gatherer is None:
            self._gatherer = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._items:
                await self._gather()
                items, self._items = self._items, []
                self._work(items)
        finally:
            self._gatherer = None

    async def _gather(self) -> None:
        """Let those in that have come and are still being read.

        On a busy server a call takes several turns of the loop until gRPC hands it over, and in those
        turns there is other work to do: the processor loses nothing, and the more come, the less each
        costs. Where a row of turns takes next to no time there is nothing to do, and no more to be had.
        """
        clock = time.perf_counter
        now = clock()
        until = now + _LONGEST_S
        seen, quiet, idle_from = len(self._items), 0, now
        while quiet < _QUIET_TURNS and seen < FULL and now < until:
            await asyncio.sleep(0)
            now = clock()
            quiet = quiet + 1 if len(self._items) == seen else 0
            seen = len(self._items)
            if quiet % _IDLE_TURNS == 0:
                if quiet and now - idle_from < _IDLE_S:
                    return
                idle_from = now
