"""A child process held by a lifeline: started, listened to, ended.

Blocking on purpose. PostgreSQL and Valkey are started by synchronous test fixtures as well as by
the asyncio supervisor; threads serve both, twins of everything in async would not. Each process
has two threads that only wait: one reads its output, one its end.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mailgrpc.embedded import lifeline
from mailgrpc.embedded.accounts import Account
from mailgrpc.errors import EmbeddedError

_TAIL_LINES = 20
_LONGEST_LINE = 64 * 1024
_KILLED_WITHIN_S = 10.0
_SIGNALLED = 128
"""Above it, an exit code names the signal that ended the child."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start, and how to end it when this process is gone."""

    name: str
    argv: Sequence[str]
    environ: Mapping[str, str]
    orphan_plan: Sequence[tuple[signal.Signals, float]] = ((signal.SIGTERM, 5.0),)
    """Signals in order, each with the seconds to wait before the next; the last is SIGKILL."""
    account: Account | None = None
    directory: Path | None = None
    locks: Sequence[int] = ()
    """Descriptors that the lifeline and the child keep for as long as they live."""
    handed_over: Sequence[int] = ()
    """Descriptors for the child alone."""
    remove: Path | None = None
    """A directory that goes when an orphan has ended."""
    stdin: bytes = b""
    """At most what a pipe holds (64 KiB)."""


class Process:
    """A running child. The constructor starts it; its methods may be called from any thread."""

    def __init__(self, launch: Launch, on_line: Callable[[str], None] | None = None) -> None:
        self.name = launch.name
        self.ended = threading.Event()
        self._on_line = on_line
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._control, theirs = socket.socketpair()
        with theirs:
            self._holder = _start_lifeline(launch, theirs.fileno())
        reader = threading.Thread(target=self._read, name=f"{self.name}-output", daemon=True)
        reader.start()
        self.pid = self._read_pid()
        """Of the child itself; 0 if it never came to be."""
        threading.Thread(
            target=self._wait, args=(reader,), name=f"{self.name}-end", daemon=True
        ).start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; 128 + the signal's number when a signal ended it."""
        return self._holder.returncode if self.ended.is_set() else None

    def send(self, number: signal.Signals) -> None:
        """Signal the child; SIGKILL also ends what it had started. No-op once it has ended."""
        # Locked, so that the descriptor is not closed, and given out anew, meanwhile.
        with self._lock, contextlib.suppress(OSError):
            self._control.send(bytes([number]))

    def stop(self, number: signal.Signals, grace_s: float) -> None:
        """Ask by a signal, wait, then kill. Returns when the process has ended."""
        self.send(number)
        if not self.ended.wait(grace_s):
            self.send(signal.SIGKILL)
            self.ended.wait(_KILLED_WITHIN_S)

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call back once, from another thread; at once if it has ended."""
        with self._lock:
            if not self.ended.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def how_it_ended(self) -> str:
        """As `ended by SIGKILL` or `ended with exit code 1`."""
        code = self.exit_code
        if code is not None and code > _SIGNALLED:
            try:
                return f"ended by {signal.Signals(code - _SIGNALLED).name}"
            except ValueError:
                pass
        return f"ended with exit code {code}"

    def describe_end(self) -> str:
        """How it ended and the last lines it wrote, for an error's text."""
        how = self.how_it_ended()
        tail = "\n".join(f"    {line}" for line in self._tail)
        return f"{how}; its last lines:\n{tail}" if tail else f"{how}, without a word"

    def _read_pid(self) -> int:
        text = b""
        while not text.endswith(b"\n"):
            part = self._control.recv(16)
            if not part:
                break
            text += part
        return int(text or b"0")

    def _read(self) -> None:
        stream = self._holder.stdout
        assert stream is not None
        with stream:
            while line := stream.readline(_LONGEST_LINE):
                text = line.decode(errors="replace").rstrip()
                self._tail.append(text)
                if self._on_line is not None:
                    self._on_line(text)

    def _wait(self, reader: threading.Thread) -> None:
        if self._holder.wait() < 0 and self.pid:
            # Somebody killed the lifeline alone: nothing holds the child any more.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        reader.join(1.0)  # its last words; a grandchild may keep the pipe open for longer
        with self._lock:
            self._control.close()
            self.ended.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


class Slot:
    """Room for one process of a server at a time.

    `close`, from any thread, also ends a start that is under way in another: what it launched is
    stopped, and what it would launch next is refused.
    """

    def __init__(self) -> None:
        self.process: Process | None = None
        self._closed = False
        self._lock = threading.Lock()

    def open(self) -> None:
        """Allow launches (again). Raises EmbeddedError while a process runs."""
        with self._lock:
            if self.process is not None and not self.process.ended.is_set():
                raise EmbeddedError(f"{self.process.name} is running already")
            self._closed = False

    def launch(self, launch: Launch, on_line: Callable[[str], None] | None = None) -> Process:
        """Start a process. Raises EmbeddedError once the slot is closed."""
        with self._lock:
            if self._closed:
                raise EmbeddedError(f"{launch.name}: stopped before it was ready")
            self.process = Process(launch, on_line)
            return self.process

    def close(self, number: signal.Signals, grace_s: float) -> None:
        """Allow no more launches, and stop what runs as `Process.stop` does."""
        with self._lock:
            self._closed = True
            process = self.process
        if process is not None:
            process.stop(number, grace_s)


def server_environ() -> dict[str, str]:
    """The environment of PostgreSQL and Valkey: ours, without what would change what they do.

    An odd locale stops both at the start; a PGDATA or PGOPTIONS meant for other databases would
    be heard by this one.
    """
    kept = {
        name: value
        for name, value in inherited_environ().items()
        if not name.startswith(("LC_", "PG")) and name not in ("LANG", "LANGUAGE")
    }
    return kept | {"LC_ALL": "C"}


def inherited_environ() -> dict[str, str]:
    """A copy of this process's environment, to be handed on; `config` alone reads settings."""
    return dict(os.environ)


def _start_lifeline(launch: Launch, control: int) -> subprocess.Popen[bytes]:
    plan = ",".join(f"{int(number)}:{seconds:g}" for number, seconds in launch.orphan_plan)
    close = ",".join(map(str, launch.handed_over)) or "-"
    script = [sys.executable, "-I", "-S", lifeline.__file__]
    arguments = [control, plan, launch.account or "-", launch.remove or "-", close, "--"]
    stdin_r, stdin_w = os.pipe()
    try:
        os.write(stdin_w, launch.stdin)
        os.close(stdin_w)
        return subprocess.Popen(  # noqa: S603  what we were asked to start
            [*script, *map(str, arguments), *launch.argv],
            env=dict(launch.environ),
            cwd=launch.directory,
            stdin=stdin_r,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(control, *launch.locks, *launch.handed_over),
            start_new_session=True,  # Ctrl-C is the parent's: it ends the family in order
        )
    except OSError as error:
        raise EmbeddedError(f"cannot start {launch.name}: {error}") from error
    finally:
        os.close(stdin_r)


def wait_for_success(process: Process, doing: str) -> None:
    """Wait for a process that ends by itself. Raises EmbeddedError unless it ended well."""
    process.ended.wait()
    if process.exit_code != 0:
        raise EmbeddedError(f"{doing}: {process.describe_end()}")
