"""How results are told: lines while it runs, one table at the end, one chart for the docs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from bench.row import Measured

median = statistics.median


def as_text(row: Measured) -> str:
    lines = [f"\n{row.title}"]
    if row.ours:
        lines.append(f"  {'ours':44} {number(median(row.ours))}{row.unit}  {_spread(row.ours)}")
    if row.theirs:
        lines.append(
            f"  {row.against[:44]:44} {number(median(row.theirs))}{row.unit}  {_spread(row.theirs)}"
        )
    if row.ratio is not None:
        lines.append(f"  {'ratio':44} {row.ratio:.2f}  (wanted: {row.wanted or '—'})")
    lines += [f"  {label:44} {value}" for label, value in row.facts.items()]
    lines += [f"  {'held' if held else 'NOT HELD':44} {text}" for text, held in row.limits]
    lines += [f"  VOID: {why}" for why in row.void]
    return "\n".join(lines)


def as_table(rows: Sequence[Measured]) -> str:
    lines = [
        "\n| work | against | ours | theirs | ratio | wanted | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = f"{number(median(row.ours))}{row.unit}" if row.ours else ""
        theirs = f"{number(median(row.theirs))}{row.unit}" if row.theirs else ""
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        wanted = "; ".join([row.wanted, *(text for text, _ in row.limits)]).strip("; ")
        said = "void" if row.void else "held" if row.holds else "**short**"
        lines.append(
            f"| {row.title} | {row.against} | {ours} | {theirs} | {ratio} | {wanted} | {said} |"
        )
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"


def _spread(values: Sequence[float]) -> str:
    return f"({number(min(values))} – {number(max(values))})" if len(values) > 1 else ""


_WIDTH, _LEFT, _LINE = 900, 330, 34


def draw(rows: Sequence[Measured], path: Path) -> None:
    """Each ratio as a bar, with a mark where it has to reach (or must not pass)."""
    shown = [r for r in rows if r.ratio is not None]
    most = max([1.0, *(max(r.ratio or 0, r.at_least or 0, r.at_most or 0) for r in shown)])
    scale = (_WIDTH - _LEFT - 130) / most
    height = _LINE * len(shown) + 50
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            'font-family="system-ui, sans-serif" font-size="13">'
        ),
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        (
            f'<text x="{_LEFT}" y="20" fill="#555">ratio to the counterpart; '
            "the line is what is wanted</text>"
        ),
    ]
    for index, row in enumerate(shown):
        y = 34 + index * _LINE
        ratio = row.ratio or 0.0
        colour = "#2f7d4f" if row.holds else "#b3452c"
        parts += [
            f'<text x="{_LEFT - 10}" y="{y + 16}" text-anchor="end">{escape(row.title)}</text>',
            (
                f'<rect x="{_LEFT}" y="{y + 3}" width="{max(1.0, ratio * scale):.1f}" height="18" '
                f'fill="{colour}"/>'
            ),
            f'<text x="{_LEFT + max(ratio, row.at_least or 0, row.at_most or 0) * scale + 8:.1f}" '
            f'y="{y + 16}">{ratio:.2f} × ({"≥" if row.at_least is not None else "≤"} '
            f"{row.at_least if row.at_least is not None else row.at_most:g})</text>"
            if row.wanted
            else f'<text x="{_LEFT + ratio * scale + 8:.1f}" y="{y + 16}">{ratio:.2f} ×</text>',
        ]
        if row.wanted:
            x = _LEFT + (row.at_least if row.at_least is not None else row.at_most or 0) * scale
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 24}" stroke="#222" '
                'stroke-width="2"/>'
            )
    parts.append("</svg>")
    path.write_text("\n".join(parts) + "\n")
