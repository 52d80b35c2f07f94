"""docs/states.md says what `MOVES` says, and so does the database."""

from __future__ import annotations

import re
from pathlib import Path

from mailgrpc.core.delivery import MOVES, State

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "states.md").read_text()


def diagram() -> str:
    """The moves as mermaid draws them."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> QUEUED", "    [*] --> SUPPRESSED"]
    for source in State:
        lines += [f"    {source.name} --> {target.name}" for target in sorted(MOVES[source])]
    lines += [f"    {state.name} --> [*]" for state in State if not MOVES[state]]
    return "\n".join([*lines, "```"])


def test_the_diagram_is_the_table_of_moves() -> None:
    match = re.search(r"<!-- moves -->\n(.*?)\n?<!-- /moves -->", DOC, re.DOTALL)
    assert match is not None
    assert match[1] == diagram()


def test_the_document_tells_of_each_state_once_and_in_order() -> None:
    table = DOC.partition("## Moves")[0]
    assert re.findall(r"^\| ([A-Z_]+) \|", table, re.MULTILINE) == [s.name for s in State]


def test_every_state_has_its_moves_and_none_moves_to_itself() -> None:
    assert set(MOVES) == set(State)
    assert all(state not in targets for state, targets in MOVES.items())


def test_the_database_knows_these_states() -> None:
    tables = (ROOT / "mailgrpc/db/migrations/versions/0001_tables.sql").read_text()
    match = re.search(r"CHECK \(state BETWEEN (\d+) AND (\d+)\)", tables)
    assert match is not None
    assert (int(match[1]), int(match[2])) == (min(State), max(State))
    assert len(State) == max(State)
