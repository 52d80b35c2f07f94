"""A row of the table: what is measured, against what, and what it has to reach.

A row measures its own side and its counterpart in turns, so that what the machine does meanwhile
happens to both. Its ratio is that of the medians. `check` voids a row whose books do not balance:
what was acknowledged, what the ledger has and what the rows say must be one number.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.family import Family


@dataclass(slots=True)
class Measured:
    """What a row gave. Rates and times are lists, one value a round."""

    title: str
    against: str = ""
    unit: str = "/s"
    at_least: float | None = None  # the ratio that is wanted
    at_most: float | None = None
    against_itself: bool = False  # the other side is this program too, so that it has no floor
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    """Everything else worth a line, by its label."""
    limits: list[tuple[str, bool]] = field(default_factory=list)
    """Other things that had to hold, and whether they did."""
    void: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Ours to theirs."""
        if not self.ours or not self.theirs:
            return None
        return statistics.median(self.ours) / statistics.median(self.theirs)

    @property
    def holds(self) -> bool:
        """Whether all that was wanted was reached."""
        ratio = self.ratio
        if self.void or not all(held for _, held in self.limits):
            return False
        if self.at_least is not None and (ratio is None or ratio < self.at_least):
            return False
        return not (self.at_most is not None and (ratio is None or ratio > self.at_most))

    @property
    def wanted(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g} ×"
        return f"≤ {self.at_most:g} ×" if self.at_most is not None else ""

    def check(self, what: str, **counts: int) -> None:
        """Void the row unless these counts are all the same."""
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            self.void.append(f"{what}: {said}")

    def limit(self, text: str, held: bool) -> None:
        """Something else that is wanted of this row."""
        self.limits.append((text, held))

    def as_json(self) -> dict:
        return {**asdict(self), "ratio": self.ratio, "holds": self.holds}


Row = Callable[["Family"], list[Measured]]
"""A file of bench/rows/ has `run`, which is one: it starts what it needs and stops it again."""
