"""The ledger: what the outside world got, written down where no fault of ours reaches.

A provider's process of its own keeps it. A mail is entered, and the entry synced, when its last byte
was read and it is decided to take it, before any answer: from then on a recipient may have it,
whatever the sender learns. An entry is a line of JSON: when, the mail's key (its subject, which is
the caller's request_id), the recipient, and what happened.

    taken      the mail is in and an acceptance was written
    swallowed  the mail is in, and the connection was broken instead of an answer
    stalled    the mail is in, and nothing was said at all
    failed     the mail is in, and the answer was a fault of the server's own (5xx of HTTP)
    cut        the connection was broken before the mail was in; its sender cannot always know
    deferred, rejected, paused   it was refused, in words, and is not in
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

IN_THE_BOX = frozenset({"taken", "swallowed", "stalled", "failed"})
UNCLEAR = frozenset({"swallowed", "stalled", "failed", "cut"})
"""After these nobody but the provider can know whether the mail is in."""


class Ledger:
    """The writing end."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def enter(self, key: str, recipients: Iterable[str], what: str) -> None:
        """Return when it is on the disk."""
        now = time.time()
        lines = [json.dumps([now, key, r.lower(), what]) + "\n" for r in recipients]
        os.write(self._fd, "".join(lines).encode())
        os.fsync(self._fd)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of it."""

    at: float
    key: str
    recipient: str
    what: str


def read(path: Path) -> list[Entry]:
    """All that was entered."""
    return [Entry(*json.loads(line)) for line in path.read_text().splitlines()]


def copies(entries: Iterable[Entry]) -> Counter[tuple[str, str]]:
    """How many mails lie in each box: by key and recipient."""
    return Counter((e.key, e.recipient) for e in entries if e.what in IN_THE_BOX)


def said(entries: Iterable[Entry]) -> dict[str, Counter[str]]:
    """What was done with the mails of each recipient, and how often."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        counts[entry.recipient][entry.what] += 1
    return counts
