"""`make bench`: the rows in one run, one table and one chart, and the results as JSON.

    python -m bench [ROW …] [--record]

Exit 1 where a row is void or short of what is wanted; one that breaks off is void, and the others go on.
`--record` writes the counterparts' rates as the floors of this kind of machine: a later row in which one
falls below 0.9 of its floor is void, because then the machine was busy with something else. Times of
single mails have none: they double from one minute to the next.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path

from bench import machine, report
from bench.family import family
from bench.row import Measured
from bench.rows import ROWS

RESULTS = Path(__file__).parent / "results"
FLOORS = Path(__file__).parent / "counterparts" / "floors.json"
_OF_FLOOR = 0.9


def _hold_to_floor(row: Measured, floors: dict[str, float]) -> None:
    floor = floors.get(row.title)
    if floor is None or not row.theirs:
        return
    if (found := report.median(row.theirs)) < floor * _OF_FLOOR:
        row.void.append(f"the counterpart had {found:,.1f}, its floor is {floor:,.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--record", action="store_true", help="set the counterparts' floors")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    facts = machine.facts()
    every_floor = json.loads(FLOORS.read_text()) if FLOORS.exists() else {}
    floors = every_floor.setdefault(machine.kind(), {})
    facts["floors"] = (
        f"of {len(floors)} counterparts" if floors else "none for this kind of machine"
    )
    print("\n".join(f"{label}: {value}" for label, value in facts.items()), flush=True)
    measured: list[Measured] = []
    took: dict[str, float] = {}
    for name in options.rows or ROWS:
        began = time.monotonic()
        try:
            with family() as stores:
                rows = ROWS[name](stores)
        except Exception as error:  # noqa: BLE001  an hour of other rows is not lost with it
            traceback.print_exc()
            rows = [Measured(name, void=[f"it broke off: {error!r}"])]
        took[name] = time.monotonic() - began
        for row in rows:
            if not options.record:
                _hold_to_floor(row, floors)
            measured.append(row)
            print(report.as_text(row), flush=True)
    RESULTS.mkdir(exist_ok=True)
    whole = not options.rows
    if options.record:
        rates = [r for r in measured if r.theirs and r.unit == "/s" and not r.against_itself]
        floors |= {r.title: round(report.median(r.theirs), 3) for r in rates}
        FLOORS.write_text(json.dumps(every_floor, indent=1, ensure_ascii=False) + "\n")
    found = {"machine": facts, "rows": [r.as_json() for r in measured], "took_s": took}
    name = "latest.json" if whole else f"{'-'.join(options.rows)}.json"
    (RESULTS / name).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(report.as_table(measured))
    if whole:
        report.draw(measured, RESULTS.parent.parent / "docs" / "performance.svg")
    raise SystemExit(0 if all(row.holds for row in measured) else 1)


if __name__ == "__main__":
    main()
