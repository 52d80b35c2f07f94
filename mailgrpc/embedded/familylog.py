"""One log for the whole family: whose line it is, aligned; colours where people look."""

from __future__ import annotations

import threading
import time
from typing import TextIO

_WIDTH = len("postgres")
_COLOURS = {
    "postgres": "34",
    "valkey": "35",
    "inbox": "36",
    "server": "32",
    "worker": "33",
}
_OURS = "up"


class FamilyLog:
    """Writes lines to `stream`, from any thread, each whole.

    A stream that is gone (`mailgrpc up | head`) ends the log and nothing else. With `quiet`,
    lines that the children wrote by themselves are left out.
    """

    def __init__(self, stream: TextIO, *, colours: bool = False, quiet: bool = False) -> None:
        self._stream = stream
        self._colours = colours
        self._quiet = quiet
        self._lock = threading.Lock()
        self._gone = False

    def say(self, text: str, name: str = _OURS) -> None:
        """A line about the family, with the time of day."""
        now = time.time()
        moment = time.strftime("%H:%M:%S", time.localtime(now))
        self._write(name, f"{moment}.{int(now % 1 * 1000):03d} {text}")

    def pass_on(self, name: str, line: str, *, timed: bool) -> None:
        """A line that a child wrote; `timed` where it does not say the time by itself."""
        if self._quiet:
            return
        if timed:
            self.say(line, name)
        else:
            self._write(name, line)

    def headline(self, text: str) -> None:
        """A line for everybody, without a prefix."""
        self._print(f"\x1b[1m{text}\x1b[0m" if self._colours else text)

    def _write(self, name: str, text: str) -> None:
        prefix = f"{name:<{_WIDTH}} │"
        if self._colours:
            prefix = f"\x1b[{_COLOURS.get(name, '2')}m{prefix}\x1b[0m"
        self._print(f"{prefix} {text}")

    def _print(self, line: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        writable = line.encode(encoding, "replace").decode(encoding)
        with self._lock:
            if self._gone:
                return
            try:
                self._stream.write(f"{writable}\n")
                self._stream.flush()
            except (OSError, ValueError):  # a broken pipe; a closed file
                self._gone = True
