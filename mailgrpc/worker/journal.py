"""The journal: what providers answered, on this machine's disk until PostgreSQL has it.

Between "the provider took it" and "the row says so" a result lies in the memory of one process. The
reaper, who finds only that an attempt was started, must then call it unknown: RETRYING mail goes
out a second time, SEND_ONCE mail ends in doubt. The journal closes that gap. It only ever holds
results, never mail.

Promises. A result that was appended and synced is recorded some day, by this process or by a later
one on this directory, whatever is killed meanwhile. Nothing is sent that could not be written down:
a place is taken before a start, and without places there are no starts.

How. One file a process, of a fixed number of slots of 2 KiB, each a result with its length and
checksum. All of it is written and synced when it is made, so a disk that fills up later takes
nothing away; a file that cannot be made or written (`trouble`) has no places. A result goes into a
free slot; what was appended while one sync ran shares the next. Recording in PostgreSQL runs beside
that and does not wait for it. When a result is recorded its slot is marked free, without a sync: a
mark that is lost costs one more recording, which changes nothing (db/deliveries.py).

Who owns a file holds its lock (flock), which ends with the process however that ends. A new process
takes over a file that nobody holds, and with it the results that are live there; the others are
adopted one by one (`adopt`), recorded and removed. A process that ends with all recorded removes
its own.

What can go wrong.
- The process is killed. What was written stays, synced or not: the page cache is the kernel's.
- The machine is lost. What was synced stays. A slot whose write was cut short does not fit its
  checksum: it is skipped, its attempt is the reaper's, and the file is set aside as `.damaged`
  with an error in the log, because a disk that lost what it had synced looks just the same.
- A file that is not of this form, or of a later version: set aside likewise, never overwritten.
  One of another installation, which has a database of its own: left where it is.
- A write fails. The results stay in memory and are recorded from there; no start is made until
  a write succeeds again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from mailgrpc.db.deliveries import Recorded
from mailgrpc.worker.journal_entry import pack
from mailgrpc.worker.journal_file import (
    NO_INSTALLATION,
    DiskFile,
    Foreign,
    OpenFile,
    OtherInstallation,
    SlotFile,
    set_aside,
)

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

SLOTS = 4096
SUFFIX = ".journal"
_REST = 4  # times as long as the last writing took: what comes meanwhile shares the next sync
_LONGEST_REST_S = 0.003
_RETRY_S = 1.0


class Journal:
    """The journal of one process in a directory that others may share. Disk work has a thread."""

    def __init__(
        self, directory: Path, *, slots: int = SLOTS, open_file: OpenFile = DiskFile
    ) -> None:
        self._directory = directory
        self.slots = slots
        """How many results it can hold."""
        self._open_file = open_file
        self._file: SlotFile | None = None
        self._adopted: list[SlotFile] = []
        self._installation = NO_INSTALLATION
        self._told_of: set[tuple[Path, str]] = set()
        self._is_closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._unrecorded: set[uuid.UUID] = set()  # attempts whose results take up a slot
        self._reserved = 0
        self._pending: dict[uuid.UUID, bytes] = {}  # appended and not synced
        self._marks: list[uuid.UUID] = []  # recorded and not marked
        self._writer: asyncio.Task[None] | None = None
        self.trouble = ""  # why nothing may be started; empty: all is well

    async def open(self, installation: uuid.UUID = NO_INSTALLATION) -> list[Recorded]:
        """Take a file; the results that an earlier holder left in it, which are ours now.

        Only of this `installation` (db/schema.py): to the database of another one they say nothing.
        Never raises: what is wrong is `trouble`, and tried again.
        """
        self._installation = installation
        try:
            self._file, found = await self._in_thread(self._take_file)
        except OSError as error:
            self._in_trouble(error)
            self._write_soon()
            return []
        self._unrecorded = {r.attempt_id for r in found}
        return found

    def _take_file(self) -> tuple[SlotFile, list[Recorded]]:
        for path in self._others():
            if (taken := self._try_over(path)) is not None:
                return taken
        return self._create(), []

    def _create(self) -> SlotFile:
        """A new file of ours."""
        return SlotFile.create(
            self._directory, SUFFIX, self.slots, self._open_file, self._installation
        )

    def _others(self) -> list[Path]:
        held = {f.path for f in (self._file, *self._adopted) if f is not None}
        return sorted(p for p in self._directory.glob(f"*{SUFFIX}") if p not in held)

    def _try_over(self, path: Path) -> tuple[SlotFile, list[Recorded]] | None:
        try:
            return self._take_over(path)
        except OSError as error:
            self._tell_once(path, logging.WARNING, "cannot be taken over now: %s", error)
            return None

    def _take_over(self, path: Path) -> tuple[SlotFile, list[Recorded]] | None:
        """A file that nobody holds, with what is live in it, in a whole one where it was damaged."""
        try:
            file, found = SlotFile.take_over(path, self._open_file, self._installation)
        except (BlockingIOError, FileNotFoundError):
            return None
        except OtherInstallation:
            self._tell_once(path, logging.INFO, "is of another installation, and left alone")
            return None
        except Foreign as error:
            log.error("the journal %s is set aside: %s", path, error)
            set_aside(path)
            return None
        except OSError as error:
            # Of another account, or on a bad block: it must not hide those beside it.
            self._tell_once(
                path, logging.ERROR, "cannot be read, its results are left there: %s", error
            )
            return None
        if not file.damaged:
            return file, found
        try:
            return self._made_whole(file, found), found
        except BaseException:
            file.let_go()  # as it is: it is tried again
            raise

    def _tell_once(self, path: Path, level: int, text: str, *args: object) -> None:
        """It is met again every second."""
        if (path, text) not in self._told_of:
            log.log(level, "the journal %s " + text, path, *args)  # noqa: G003  it is a constant
        self._told_of.add((path, text))

    def _made_whole(self, file: SlotFile, found: Sequence[Recorded]) -> SlotFile:
        """A new file with what could be read of a damaged one, which is set aside."""
        log.error(
            "the journal %s is set aside: %d entries cannot be read, %d can;"
            " attempts whose result is lost are settled as unknown",
            file.path,
            file.damaged,
            len(found),
        )
        whole = self._create()
        try:
            whole.write([(r.attempt_id, pack(r)) for r in found])
        except BaseException:
            whole.live.clear()  # so that it goes
            whole.close()
            raise
        set_aside(file.path)
        file.let_go()
        return whole

    async def adopt(self) -> list[Recorded]:
        """What dead processes left in this directory, to be recorded; `recorded` is told as ever.

        Their files go when all of it is. One that cannot be taken now is tried again, and does not
        hide the others.
        """
        return await self._in_thread(self._adopt)

    def _adopt(self) -> list[Recorded]:
        found: list[Recorded] = []
        for path in [] if self._is_closed else self._others():
            if (taken := self._try_over(path)) is not None:
                self._adopted.append(taken[0])
                found += taken[1]
        self._told_of = {told for told in self._told_of if told[0].exists()}
        for file in [f for f in self._adopted if not f.live]:
            self._adopted.remove(file)
            file.close()
        return found

    @property
    def room(self) -> int:
        """How many results there is a place for that is not taken or reserved."""
        if self.trouble or self._file is None:
            return 0
        return max(0, self._file.slots - len(self._unrecorded) - self._reserved)

    def reserve(self, results: int) -> None:
        """Take places for results that are about to come; the caller has looked at `room`."""
        self._reserved += results

    def unreserve(self, results: int) -> None:
        """Give reserved places back: the results are appended, or will not come."""
        self._reserved -= results

    def append(self, recorded: Sequence[Recorded]) -> None:
        """Write results down, soon. Returns at once."""
        for one in recorded:
            try:
                self._pending[one.attempt_id] = pack(one)
            except Exception:
                # It is recorded from memory. Others must not suffer for it.
                log.exception("the result of %s cannot be written down", one.delivery_id)
            else:
                self._unrecorded.add(one.attempt_id)
        self._write_soon()

    def recorded(self, recorded: Sequence[Recorded]) -> None:
        """PostgreSQL has these. Returns at once."""
        for one in recorded:
            self._unrecorded.discard(one.attempt_id)
            self._pending.pop(one.attempt_id, None)
            # Also what was not written yet: it may be under way.
            self._marks.append(one.attempt_id)
        self._write_soon()

    async def synced(self) -> None:
        """Return when all that was appended is on the disk, or cannot be put there now."""
        while self._pending and not self.trouble and self._writer is not None:
            await asyncio.wait({self._writer}, timeout=_RETRY_S / 100)

    async def close(self) -> None:
        """Write what is left and let go; a file in which nothing is live goes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETRY_S):
                while (self._pending or self._marks) and self._writer is not None:
                    await asyncio.wait({self._writer}, timeout=_RETRY_S)
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        with contextlib.suppress(TimeoutError):  # a disk that hangs must not hold our end
            await asyncio.wait_for(self._in_thread(self._close_files), _RETRY_S)
        self._thread.shutdown(wait=False)

    def _close_files(self) -> None:
        self._is_closed = True
        files = [f for f in (self._file, *self._adopted) if f is not None]
        self._file, self._adopted = None, []
        for file in files:
            file.close()

    def _write_soon(self) -> None:
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write_all())

    async def _write_all(self) -> None:
        clock = asyncio.get_running_loop().time
        while self._pending or self._marks or self.trouble:
            began_at = clock()
            batch, marks = list(self._pending.items()), self._marks
            self._marks = []
            try:
                await self._in_thread(self._write, batch, marks)
            except Exception as error:  # noqa: BLE001  whatever it is: nothing may be started
                self._in_trouble(error)
                self._marks += marks
                await asyncio.sleep(_RETRY_S)
                continue
            if self.trouble:
                log.warning("the journal can be written again")
                self.trouble = ""
            for attempt_id, _ in batch:
                self._pending.pop(attempt_id, None)
            await asyncio.sleep(min((clock() - began_at) * _REST, _LONGEST_REST_S))

    def _write(self, batch: Sequence[tuple[uuid.UUID, bytes]], marks: Sequence[uuid.UUID]) -> None:
        if self._file is None:
            self._file = self._create()
        for file in (self._file, *self._adopted):
            file.mark(marks)
        if batch:
            self._file.write(batch)
        elif self.trouble:
            self._file.probe()

    def _in_trouble(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        text = f"the journal in {self._directory} cannot be written: {reason}"
        if not self.trouble:
            log.error("%s; nothing is started until it can", text)
        self.trouble = text

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        run = functools.partial(work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, run)
