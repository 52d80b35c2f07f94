"""The embedded Valkey, which carries the doorbell.

It keeps nothing on disk. Whatever lies in it says "there is work", and where that work is lies in
PostgreSQL; a Valkey that comes up empty costs the sweeper's two seconds, once, while a snapshot
would cost a fork and writes for as long as it runs.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from mailgrpc.embedded.accounts import make_private_directory
from mailgrpc.embedded.binaries import find_valkey
from mailgrpc.embedded.process import Launch, Process, Slot, server_environ
from mailgrpc.errors import EmbeddedError

_STOP_S = 5.0
_ANSWER_WITHIN_S = 1.0
_MAX_MEMORY = "256mb"
"""Rings wait in it while no worker runs. Full, it refuses the ring, and mail still flows."""

# `12644:M 20 Nov 2026 21:02:46.303 # text`: the family's log has its own prefix.
_LOG_PREFIX = re.compile(r"^\d+:\w \d+ \w+ \d+ [\d:.]+ [.\-*#] ")
# A warning about snapshots, and two good-byes.
_BESIDE_THE_POINT = re.compile(r"Memory overcommit must be enabled|signal-handler|ready to exit")


class EmbeddedValkey:
    """One server on a socket of its own. `start` and `stop` block; both can be repeated.

    `locks` are descriptors that the server keeps while it lives (`FamilyLock.fd`). `on_line`
    hears each line of the server's log, from another thread.
    """

    name = "valkey"

    def __init__(
        self, *, locks: Sequence[int] = (), on_line: Callable[[str], None] | None = None
    ) -> None:
        self._locks = tuple(locks)
        self._say = on_line or (lambda _text: None)
        self._slot = Slot()
        self._private: Path | None = None

    def start(self) -> str:
        """Start and return the version, e.g. `9.1`. Blocks until it answers.

        Raises EmbeddedError; nothing is left running then.
        """
        self._slot.open()
        first = self._private is None
        try:
            binary, version = find_valkey()
            if self._private is None:
                self._private = make_private_directory(None)
            process = self._slot.launch(self._launch(binary), self._hear)
            while not process.ended.wait(0.005):
                if self._answers():
                    return version
            raise EmbeddedError(f"Valkey did not start: it {process.describe_end()}")
        except BaseException:
            self._slot.close(signal.SIGTERM, _STOP_S)
            if first:  # a repeated start keeps its socket: clients know the URL
                self._let_go()
            raise

    def stop(self, grace_s: float = _STOP_S, *, now: bool = False) -> None:
        """End it. May be called from another thread to end a `start` that is under way."""
        self._slot.close(signal.SIGKILL if now else signal.SIGTERM, grace_s)
        self._let_go()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def process(self) -> Process | None:
        """The server's process, while it runs or of its last run."""
        return self._slot.process

    @property
    def url(self) -> str:
        """For redis-py and arq.

        The same when `start` is repeated after a crash, another one after `stop`.
        """
        return f"unix://{self._socket}"

    @property
    def _socket(self) -> str:
        return f"{self._private}/valkey.sock"

    def _launch(self, binary: str) -> Launch:
        options = {
            "port": "0",
            "unixsocket": self._socket,
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "no",
            "maxmemory": _MAX_MEMORY,
            "maxmemory-policy": "noeviction",
            "dir": str(self._private),
            "daemonize": "no",
            "loglevel": "warning",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        return Launch(
            name=self.name,
            argv=[binary, *arguments],
            environ=server_environ(),
            orphan_plan=((signal.SIGTERM, 2.0),),
            locks=self._locks,
            remove=self._private,
        )

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_ANSWER_WITHIN_S)
                connection.connect(self._socket)
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def _hear(self, line: str) -> None:
        if not _BESIDE_THE_POINT.search(line):
            self._say(_LOG_PREFIX.sub("", line))

    def _let_go(self) -> None:
        private, self._private = self._private, None
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)
