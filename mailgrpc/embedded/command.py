"""Our own programs as children: `mailgrpc serve`, `mailgrpc work`, the inbox.

A child says that it does its work by one line, `ready` and what should be known (the address that
it got), on a pipe whose number it finds in MAILGRPC_READY_FD (`telemetry.notify_ready`). A port
that answers would say less: it may be another program's.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mailgrpc.embedded.process import Launch, Process, Slot, wait_for_success
from mailgrpc.errors import EmbeddedError

_STILL_STARTING_S = 10.0


class Command:
    """A program that runs until it is stopped. `start` and `stop` block; both can be repeated.

    `environ` is the child's whole environment. It and `argv` may be changed between starts:
    `on_ready`, called with what the child said, may so give the next one the same address.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        environ: Mapping[str, str],
        *,
        grace_s: float = 5.0,
        locks: Sequence[int] = (),
        on_line: Callable[[str], None] | None = None,
        on_ready: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.environ = dict(environ)
        self._grace_s = grace_s
        self._locks = tuple(locks)
        self._on_line = on_line or (lambda _text: None)
        self.on_ready = on_ready or (lambda _text: None)
        self._slot = Slot()

    def start(self) -> str:
        """Start, and return what the child said beside `ready`. Blocks until it said so.

        Raises EmbeddedError with the child's last lines when it ends before.
        """
        self._slot.open()
        ready_r, ready_w = os.pipe()
        try:
            try:
                environ = {**self.environ, "MAILGRPC_READY_FD": str(ready_w)}
                process = self._launch(environ, handed_over=(ready_w,))
            finally:
                os.close(ready_w)
            text = self._wait_until_ready(process, ready_r)
        except BaseException:
            self._slot.close(signal.SIGTERM, self._grace_s)
            raise
        finally:
            os.close(ready_r)
        self.on_ready(text)
        return text

    def run(self) -> None:
        """Run a program that ends by itself. Raises EmbeddedError unless it ends well."""
        self._slot.open()
        wait_for_success(self._launch(self.environ), f"{self.name} failed")

    def stop(self, *, now: bool = False) -> None:
        """Ask it to end, and wait for as long as its grace. From any thread."""
        self._slot.close(signal.SIGKILL if now else signal.SIGTERM, self._grace_s)

    @property
    def process(self) -> Process | None:
        """The child, while it runs or of its last run."""
        return self._slot.process

    def _launch(self, environ: Mapping[str, str], handed_over: Sequence[int] = ()) -> Process:
        launch = Launch(
            name=self.name,
            argv=self.argv,
            environ=environ,
            # An orphan has nobody left to wait for it: less than the grace of an orderly stop.
            orphan_plan=((signal.SIGTERM, min(self._grace_s, 5.0)),),
            locks=self._locks,
            handed_over=handed_over,
        )
        return self._slot.launch(launch, self._on_line)

    def _wait_until_ready(self, process: Process, ready_r: int) -> str:
        begun_at = time.monotonic()
        said = b""
        while not said.endswith(b"\n"):
            if select.select([ready_r], [], [], _STILL_STARTING_S)[0]:
                part = os.read(ready_r, 4096)
                if not part:
                    break
                said += part
            else:
                self._on_line(f"still starting after {time.monotonic() - begun_at:.0f} s")
        word, _, text = said.decode(errors="replace").strip().partition(" ")
        if word == "ready":
            return text.strip()
        if not process.ended.wait(self._grace_s):
            raise EmbeddedError(f"{self.name} did not say that it is ready")
        raise EmbeddedError(f"{self.name} did not start: it {process.describe_end()}")


def python_command(module: str, *arguments: str) -> list[str]:
    """How this Python runs a module of ours, found where this process found it.

    `-m` puts the working directory before everything else: right when we were found there,
    and otherwise a folder that happens to bear our name would be run instead.
    """
    from_here = "" in sys.path or str(Path.cwd()) in sys.path
    return [sys.executable, *([] if from_here else ["-P"]), "-m", module, *arguments]
