"""How the suite starts programs of ours: `python -m tests.faults.entry work`.

The same as `python -m mailgrpc work`, after what FAULTS_PATCH names was applied, a list of words.
`lossy` and `full` replace the disk under the journal; the others are mutants: each takes one guard
out, and the suite must notice (mutants.py).
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mailgrpc.db.deliveries import Started, read_deliveries, start_deliveries
from mailgrpc.worker import credits as worker_credits
from mailgrpc.worker import drain, journal, runtime, sweep
from tests.worker.lossy_file import LossyFile

FULL = "FAULTS_FULL"
"""Names a file; while it exists the journal's disk is full."""


class Disk(LossyFile):
    """Loses what was not synced, and takes nothing while it is full."""

    def write(self, data: bytes, offset: int) -> None:
        flag = os.environ.get(FULL)
        if flag and Path(flag).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(data, offset)


def _lossy_journal() -> None:
    runtime.Journal = functools.partial(journal.Journal, open_file=Disk)  # type: ignore[misc,assignment]


def _no_sync() -> None:
    _lossy_journal()
    Disk.sync_nothing = True


def _reap_without_looking() -> None:
    """The reaper takes every silence for an end, also that of PostgreSQL's own making."""
    sweep.Reaper.forget = lambda self: None  # type: ignore[method-assign]
    sweep._LOOKS_APART_S = float("inf")


def _send_before_the_start() -> None:
    """What was claimed is sent at once; the start is committed when that is done."""

    async def started(self: Any, session_id: int, starting: Any) -> list[Started]:
        held = await read_deliveries(self._database, [s.delivery_id for s in starting])

        async def later() -> None:
            await drain.asyncio.sleep(2)
            await start_deliveries(
                self._database, session_id, self._lane, starting, epoch=self._epoch
            )

        self._later = drain.asyncio.create_task(later())
        now = drain.asyncio.get_running_loop().time
        return [
            Started(held[s.delivery_id], s.attempt_id, s.call_id, self.channel, _now())
            for s in starting
            if s.delivery_id in held and now()
        ]

    drain.Drain._started = started  # type: ignore[method-assign]


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)


def _take_nothing_back() -> None:
    """What was handed over and not told of is not looked for."""

    async def take_back(self: Any, *_: Any) -> None:
        """Nothing."""

    worker_credits.Credits.take_back = take_back  # type: ignore[method-assign]


PATCHES: dict[str, Callable[[], None]] = {
    "lossy": _lossy_journal,
    "no-sync": _no_sync,
    "reap-without-looking": _reap_without_looking,
    "send-before-the-start": _send_before_the_start,
    "take-nothing-back": _take_nothing_back,
}


def main() -> None:
    for name in os.environ.pop("FAULTS_PATCH", "").split():
        PATCHES[name]()
    from mailgrpc.__main__ import main as run

    sys.argv[0] = "mailgrpc"
    run()


if __name__ == "__main__":
    main()
