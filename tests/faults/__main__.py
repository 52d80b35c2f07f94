"""`make faults`: a long storm, its table and its verdict; exit 1 on any broken promise."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from pathlib import Path

from tests.faults.report import as_json, table, totals
from tests.faults.run import run
from tests.faults.storm import Plan


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], help="this fault, by its name")
    parser.add_argument("--out", type=Path, help="the result as JSON")
    parser.add_argument("--logs", type=Path, help="a directory for what all programs logged")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as on Ctrl-C, in order
    begun_at = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun_at:6.0f} s  {text}", file=sys.stderr, flush=True)

    plan = Plan(
        seed=options.seed,
        seconds=options.minutes * 60,
        logs=options.logs,
        faults=tuple(options.only),
    )
    verdict = asyncio.run(run(plan, say))
    numbers = totals(verdict)
    print(table(verdict))
    print(
        f"\nSeed {plan.seed}, {options.minutes:g} minutes: {numbers['kills']} kills,"
        f" {numbers['acknowledged']:,} messages acknowledged, {numbers['sent']:,} deliveries SENT,"
        f" watch gaps {numbers['watch_gaps']}, watch repeats {numbers['watch_repeats']},"
        f" given up {numbers['given_up']}, broken promises {numbers['findings']}."
    )
    for finding in verdict.findings[:50]:
        print("BROKEN:", finding)
    if options.out:
        options.out.write_text(json.dumps({"seed": plan.seed, **as_json(verdict)}, indent=1))
    sys.exit(1 if verdict.findings else 0)


if __name__ == "__main__":
    main()
