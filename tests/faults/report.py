"""What a run came to, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tests.faults.checker import Row, Verdict

_HEAD = (
    "| fault | struck | kills | acknowledged | lost | SEND_ONCE sent twice"
    " | RETRYING sent again (justified) | left in SENDING | SEND_ONCE in doubt (justified) |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def table(verdict: Verdict) -> str:
    """A row for each kind of fault, as Markdown, by name.

    A message stands under the fault that was the latest when it was acknowledged, with its losses
    and its copies; a doubt stands under the fault that explains it.
    """
    lines = [_line(kind, row) for kind, row in sorted(verdict.rows.items())]
    return "\n".join([_HEAD, *lines, _line("**all**", _sum(verdict))])


def totals(verdict: Verdict) -> Mapping[str, int]:
    """The sums of all columns, and what belongs to no fault."""
    return {
        **asdict(_sum(verdict)),
        "sent": verdict.sent,
        "given_up": verdict.given_up,
        "watch_gaps": verdict.gaps,
        "watch_repeats": verdict.repeats,
        "findings": len(verdict.findings),
    }


def as_json(verdict: Verdict) -> dict[str, Any]:
    """All of it."""
    return {
        "totals": totals(verdict),
        "faults": {kind: asdict(row) for kind, row in sorted(verdict.rows.items())},
        "findings": verdict.findings,
    }


def _sum(verdict: Verdict) -> Row:
    rows = [asdict(row) for row in verdict.rows.values()]
    return Row(**{name: sum(row[name] for row in rows) for name in Row.__slots__})


def _line(kind: str, r: Row) -> str:
    return (
        f"| {kind} | {r.struck} | {r.kills} | {r.acknowledged:,} | {r.lost} | {r.twice_once}"
        f" | {r.again} ({r.again_justified}) | {r.sending} | {r.unknown} ({r.unknown_justified}) |"
    )
