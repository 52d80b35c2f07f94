"""Memory of a process and of all below it."""

from __future__ import annotations

from pathlib import Path


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in tree(int(child)))]


def pss_mb(pid: int) -> float:
    """What is resident; pages that several share count for each by its part."""
    return sum(_field_kb(each, "Pss:") for each in tree(pid)) / 1024


def anonymous_mb(pid: int) -> dict[int, float]:
    """What is resident and of no file and no shared memory, of each process."""
    return {each: _field_kb(each, "Pss_Anon:") / 1024 for each in tree(pid)}


def rss_mb(pid: int) -> float:
    """What is resident, shared pages counted in full: what `ps` shows."""
    return sum(_field_kb(each, "Rss:") for each in tree(pid)) / 1024


def _field_kb(pid: int, name: str) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
