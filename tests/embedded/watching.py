"""Watching processes, with a bound on every wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(predicate: Callable[[], object], within_s: float = 15.0, what: str = "") -> None:
    """Poll until `predicate` holds; AssertionError when it does not in time."""
    give_up_at = time.monotonic() + within_s
    while not predicate():
        assert time.monotonic() < give_up_at, f"not within {within_s} s: {what or predicate}"
        threading.Event().wait(0.01)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that is only not yet waited for does not."""
    return _status(pid)[:1] not in ([], ["Z"])


def parent_of(pid: int) -> int:
    return int(_status(pid)[1])


def descendants(pid: int) -> dict[int, str]:
    """Process id and command line of all below `pid`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (status := _status(int(entry.name))):
            children.setdefault(int(status[1]), []).append(int(entry.name))
    found: dict[int, str] = {}
    queue = [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue  # ended meanwhile
            found[child] = command.replace(b"\0", b" ").decode(errors="replace")
            queue.append(child)
    return found


def _status(pid: int) -> list[str]:
    """State, parent and so on, as in proc(5); empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
