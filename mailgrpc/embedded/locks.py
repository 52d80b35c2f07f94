"""Who lives in a data directory: one family of processes at a time.

Two locks (flock), both gone by themselves when their holders are:

    family.lock   held by the parent, and inherited by every lifeline and every child. Free means
                  that nothing of an earlier family lives, whatever pid files say. (A pid file
                  lies after `kill -9`, and most of all in containers, where the number of a
                  process that died before the restart soon belongs to another one.)
    up.lock       held by the parent alone. While family.lock is taken, it tells a family that is
                  alive (refuse) from one whose parent died and which is ending (wait).

flock, not lockf: the lock belongs to the open file, which children share; a lock of lockf would
be the parent's alone and fall with any close of the file.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mailgrpc.errors import EmbeddedError

_POLL_S = 0.05
_PATIENCE_S = 60.0
"""Longer than any orphan's plan (`Launch.orphan_plan`): after that, somebody must look."""


class FamilyLock:
    """The right to run servers on `data_dir`, from `acquire` to `release`."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._parent_fd = -1
        self._abandoned = threading.Event()
        self.fd = -1
        """To be inherited by whatever is started; -1 while the lock is not held."""

    def acquire(
        self, say: Callable[[str], None] = lambda _text: None, patience_s: float = _PATIENCE_S
    ) -> None:
        """Take the lock; waits while an earlier family, whose parent is gone, is ending.

        Raises EmbeddedError when another parent lives, or when the old family does not end.
        """
        self._parent_fd = self._open("up.lock")
        try:
            if not _try(self._parent_fd):
                holder = os.pread(self._parent_fd, 20, 0).decode(errors="replace").strip()
                raise EmbeddedError(
                    f"another mailgrpc (process {holder or 'unknown'}) is running on"
                    f" {self._data_dir}: stop it, or choose another --data-dir"
                )
            os.ftruncate(self._parent_fd, 0)
            os.pwrite(self._parent_fd, b"%d\n" % os.getpid(), 0)
            self.fd = self._open("family.lock")
            self._wait(say, patience_s)
        except BaseException:
            self.release()
            raise

    def abandon(self) -> None:
        """From another thread: make an `acquire` that waits give up."""
        self._abandoned.set()

    def release(self) -> None:
        """Let go. Children that still live keep `family.lock` by themselves."""
        for fd in (self.fd, self._parent_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._parent_fd = -1

    def _open(self, name: str) -> int:
        path = self._data_dir / name
        # Root may work in another user's directory: no link there leads it astray.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags, 0o600)
        except OSError as error:
            raise EmbeddedError(
                f"cannot write {path}: {error.strerror}; is the directory another user's?"
                " Start mailgrpc as its owner, or choose another --data-dir"
            ) from None

    def _wait(self, say: Callable[[str], None], patience_s: float) -> None:
        give_up_at = time.monotonic() + patience_s
        told = False
        while not _try(self.fd):
            if not told:
                say("waiting for the processes of an earlier run to end")
                told = True
            if time.monotonic() > give_up_at:
                raise EmbeddedError(
                    f"processes of an earlier run still use {self._data_dir} after"
                    f" {patience_s:.0f} s: end them (`fuser {self._data_dir}/family.lock` names"
                    " them), or choose another --data-dir"
                )
            if self._abandoned.wait(_POLL_S):
                raise EmbeddedError("stopped while waiting for an earlier run to end")


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
