"""A journal's file: slots of a fixed size, each empty or a result with its length and checksum.

    slot 0        magic, bytes a slot, number of slots, the installation whose results these are
    slot 1 …      length of the entry, CRC-32 of it, the entry (journal_entry.py)

Fixed slots because results come to an end in any order: a log would have to be copied to free the
room before one that waits. All of the file is written when it is made, so no later write needs
space. The file is a small layer of its own (`File`), so that a test can lose what was not synced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import struct
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from mailgrpc import failpoints
from mailgrpc.db.deliveries import Recorded
from mailgrpc.worker.journal_entry import MOST_BYTES, unpack

SLOT_BYTES = 2048
_HEADER = struct.Struct("<8sII16s")  # magic, bytes a slot, slots, installation
_MAGIC = b"MGJOURN1"
_SLOT = struct.Struct("<II")  # all zero: free
_SYNC = getattr(os, "fdatasync", os.fsync)  # not everywhere; fsync does more

assert _SLOT.size + MOST_BYTES <= SLOT_BYTES


class File(Protocol):
    """What the journal needs of a file; a test's own form loses what was not synced."""

    def write(self, data: bytes, offset: int) -> None:
        """Write all of it. Raises OSError."""

    def sync(self) -> None:
        """Return when everything written is on the disk. Raises OSError."""

    def read(self, most: int | None = None) -> bytes:
        """The whole content, or its first bytes."""

    def close(self) -> None:
        """Let go of the file and of its lock."""


class DiskFile:
    """A file on the disk, locked: one holder at a time, over all processes."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open and lock it. Raises BlockingIOError where somebody holds it, OSError."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        self._fd = os.open(path, flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise

    def write(self, data: bytes, offset: int) -> None:
        """See File."""
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def sync(self) -> None:
        """See File."""
        _SYNC(self._fd)

    def read(self, most: int | None = None) -> bytes:
        """See File."""
        if most is not None:
            return os.pread(self._fd, most, 0)
        parts, offset = [], 0
        while part := os.pread(self._fd, 1 << 20, offset):
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

    def close(self) -> None:
        """See File."""
        os.close(self._fd)


OpenFile = Callable[..., File]


NO_INSTALLATION = uuid.UUID(int=0)
"""In files from before there were any; who takes one over makes it his."""


class Foreign(Exception):
    """A file that this version did not write."""


class OtherInstallation(Exception):
    """A file of another installation, whose database knows nothing of ours."""


class SlotFile:
    """A journal file that is open and ours: its slots, and which of them are free."""

    def __init__(self, path: Path, file: File, slots: int) -> None:
        self.path = path
        self.slots = slots
        self.live: dict[uuid.UUID, int] = {}  # attempt -> its slot
        self.damaged = 0  # slots that cannot be read
        self._file = file
        self._free = list(range(slots, 0, -1))

    @classmethod
    def create(
        cls,
        directory: Path,
        suffix: str,
        slots: int,
        open_file: OpenFile,
        installation: uuid.UUID = NO_INSTALLATION,
    ) -> SlotFile:
        """A new file, all of it on the disk. Raises OSError; nothing is left then."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / f"{secrets.token_hex(8)}{suffix}"
        # Under a name that nobody adopts, until it is whole.
        unready = path.with_suffix(".new")
        file = open_file(unready, create=True)
        try:
            file.write(bytes(SLOT_BYTES * (slots + 1)), 0)
            file.write(_HEADER.pack(_MAGIC, SLOT_BYTES, slots, installation.bytes), 0)
            file.sync()
            unready.rename(path)
            _sync_directory(directory)
        except BaseException:
            file.close()
            for name in (unready, path):
                with contextlib.suppress(OSError):
                    name.unlink()
            raise
        return cls(path, file, slots)

    @classmethod
    def take_over(
        cls, path: Path, open_file: OpenFile, installation: uuid.UUID = NO_INSTALLATION
    ) -> tuple[SlotFile, list[Recorded]]:
        """A file that nobody holds, and what is live in it.

        Raises BlockingIOError where somebody does, FileNotFoundError, OtherInstallation, Foreign, OSError.
        """
        file = open_file(path)
        try:
            if not path.exists():  # its holder removed it between our two steps
                raise FileNotFoundError(path)
            # First whose it is: another's is met every second, and 8 MiB.
            slots, owner = _header_of(file.read(_HEADER.size))
            if owner not in (NO_INSTALLATION, installation):
                raise OtherInstallation(path)
            content = file.read()
            if len(content) < SLOT_BYTES * (slots + 1):
                raise Foreign("it is shorter than it says")
            taken = cls(path, file, slots)
            found = taken._read(content, slots)
            if owner != installation:  # from before there were any: ours from now on
                file.write(_HEADER.pack(_MAGIC, SLOT_BYTES, slots, installation.bytes), 0)
                file.sync()
            return taken, found
        except BaseException:
            file.close()
            raise

    def _read(self, content: bytes, slots: int) -> list[Recorded]:
        found = []
        for slot in range(1, slots + 1):
            start = slot * SLOT_BYTES
            length, checksum = _SLOT.unpack_from(content, start)
            if length == 0:
                continue
            entry = content[start + _SLOT.size : start + _SLOT.size + length]
            try:
                if len(entry) != length or zlib.crc32(entry) != checksum:
                    raise ValueError("its checksum is another one")
                recorded = unpack(entry)
            except ValueError:
                self.damaged += 1
                continue
            found.append(recorded)
            self.live[recorded.attempt_id] = slot
        taken = set(self.live.values())
        self._free = [slot for slot in self._free if slot not in taken]
        return found

    def write(self, entries: Sequence[tuple[uuid.UUID, bytes]]) -> None:
        """Put entries, each by its attempt, into slots and sync them. Raises OSError.

        Then it is not known which of them are in; to write them again takes the same slots.
        """
        failpoints.reach("journal.write")
        content: dict[int, bytes] = {}
        for attempt_id, entry in entries:
            if attempt_id not in self.live:
                self.live[attempt_id] = self._free.pop()
            head = _SLOT.pack(len(entry), zlib.crc32(entry))
            content[self.live[attempt_id]] = head + entry
        for run in _runs(content):
            slots = [content[slot].ljust(SLOT_BYTES, b"\0") for slot in run[:-1]]
            self._file.write(b"".join([*slots, content[run[-1]]]), run[0] * SLOT_BYTES)
        failpoints.reach("journal.written")
        self._file.sync()
        failpoints.reach("journal.synced")

    def mark(self, attempt_ids: Sequence[uuid.UUID]) -> None:
        """These are recorded: their slots, where they have one here, are free. Raises OSError."""
        found = {i: slot for i in attempt_ids if (slot := self.live.get(i)) is not None}
        for run in _runs(found.values()):
            free = bytes((len(run) - 1) * SLOT_BYTES + _SLOT.size)
            self._file.write(free, run[0] * SLOT_BYTES)
        for attempt_id in found:
            del self.live[attempt_id]
        # Those that lie side by side stay together: they are taken from the end.
        self._free += sorted(found.values(), reverse=True)

    def probe(self) -> None:
        """Write and sync something that changes nothing. Raises OSError."""
        self._file.write(_MAGIC, 0)
        self._file.sync()

    def let_go(self) -> None:
        """Unlock it, and leave it as it is."""
        self._file.close()

    def close(self) -> None:
        """Let go of it; removed where nothing is live in it."""
        if not self.live:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._file.close()


def _runs(slots: Iterable[int]) -> list[list[int]]:
    """The slots in order, those that lie side by side together: each run is one write."""
    runs: list[list[int]] = []
    for slot in sorted(slots):
        if runs and runs[-1][-1] == slot - 1:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return runs


def _header_of(content: bytes) -> tuple[int, uuid.UUID]:
    """How many slots a file has, and whose it is. Raises Foreign."""
    if len(content) < _HEADER.size:
        raise Foreign("it has no header")
    magic, slot_bytes, slots, owner = _HEADER.unpack_from(content)
    if magic != _MAGIC or slot_bytes != SLOT_BYTES:
        raise Foreign("it is not a journal of this version")
    return int(slots), uuid.UUID(bytes=owner)


def set_aside(path: Path) -> None:
    """Take a file out of the way, for whoever looks into it."""
    with contextlib.suppress(OSError):
        path.rename(path.with_suffix(".damaged"))


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
