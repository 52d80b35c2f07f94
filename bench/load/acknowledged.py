"""Which mail was acknowledged when: written by a load after its run, read by a row.

A line is a recipient (random, so it names its mail) and the Unix time at which the answer came.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def write_acknowledged(path: Path, found: Iterable[tuple[str, float]]) -> None:
    path.write_text("".join(f"{recipient} {at:.6f}\n" for recipient, at in found))


def read_acknowledged(path: Path) -> dict[str, float]:
    """By recipient, when it was acknowledged."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {recipient: float(at) for recipient, at in lines}
