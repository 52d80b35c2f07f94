"""A journal's file on a machine that may go at any moment: what was not synced is lost with it."""

from __future__ import annotations

from pathlib import Path

from mailgrpc.worker.journal_file import DiskFile


class LossyFile:
    """A File that keeps writes in this process's memory until they are synced.

    So whoever kills the process takes them away, as a power cut would. `sync_nothing` makes a sync
    say that it has happened: a journal that only thinks it is durable.
    """

    sync_nothing = False

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._disk = DiskFile(path, create=create)
        self._unsynced: list[tuple[bytes, int]] = []

    def write(self, data: bytes, offset: int) -> None:
        self._unsynced.append((bytes(data), offset))

    def sync(self) -> None:
        if self.sync_nothing:
            return
        for data, offset in self._unsynced:
            self._disk.write(data, offset)
        self._unsynced.clear()
        self._disk.sync()

    def read(self, most: int | None = None) -> bytes:
        return self._disk.read(most)

    def close(self) -> None:
        self._disk.close()
