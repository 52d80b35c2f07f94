"""`make profile`: where the time of a server or a worker goes under a row's load.

    python -m bench.profile enqueue | batch | drain

Samples the process with py-spy while it works, prints which functions had the processor (by
themselves, and by file), and leaves a flame graph in bench/results/. Samples are of threads that
hold the interpreter or run native code; a thread that waits is left out.
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.family import Child, Family, backlog, batches, calls, family

RESULTS = Path(__file__).parent / "results"
SECONDS = 6
RATE = 250
BACKLOG = 40_000
_PY_SPY = Path(sys.executable).parent / "py-spy"


def _sample(process: Child, name: str) -> list[tuple[list[str], int]]:
    """Stacks, outermost first, and how often each was seen."""
    RESULTS.mkdir(exist_ok=True)
    raw, graph = RESULTS / f"{name}.stacks", RESULTS / f"{name}.svg"
    common = ["-p", str(process.process.pid), "-d", str(SECONDS), "-r", str(RATE), "--nonblocking"]
    both = [
        subprocess.Popen(
            [str(_PY_SPY), "record", *common, "-f", kind, "-o", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for kind, path in (("raw", raw), ("flamegraph", graph))
    ]
    for each in both:
        each.wait(SECONDS * 5)
    stacks = []
    for line in raw.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        stacks.append((stack.split(";"), int(count)))
    return stacks


def _server(stores: Family, name: str) -> list[tuple[list[str], int]]:
    with stores.running("serve") as server:
        if name == "enqueue":
            load = threading.Thread(
                target=calls,
                args=[server.address],
                kwargs={"seconds": SECONDS + 2, "concurrency": 256},
            )
        else:
            load = threading.Thread(
                target=batches,
                args=[server.address],
                kwargs={"seconds": SECONDS + 2, "concurrency": 8, "size": 100},
            )
        load.start()
        time.sleep(2)  # it prepares its requests first
        found = _sample(server, name)
        load.join()
    return found


def _drain(stores: Family, name: str) -> list[tuple[list[str], int]]:
    with stores.running("serve") as server:
        backlog(server.address, BACKLOG)
    with stores.running("work") as worker:
        return _sample(worker, name)


ROWS = {"enqueue": _server, "batch": _server, "drain": _drain}


def _told(stacks: list[tuple[list[str], int]]) -> None:
    functions: collections.Counter[str] = collections.Counter()
    files: collections.Counter[str] = collections.Counter()
    for stack, count in stacks:
        function = re.sub(r":\d+\)$", ")", stack[-1])
        functions[function] += count
        where = re.search(r"\((.*)\)$", function)
        files[where[1] if where else function] += count
    whole = max(functions.total(), 1)
    for title, counted in (("by function", functions), ("by file", files)):
        print(f"\n{title}")
        for label, count in counted.most_common(25):
            print(f"  {count / whole:6.1%}  {label}")


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "enqueue"
    if name not in ROWS:
        raise SystemExit(f"no such row: {name}; there are {', '.join(ROWS)}")
    with family() as stores:
        _told(ROWS[name](stores, name))
    print(f"\nflame graph: {RESULTS / f'{name}.svg'}")


if __name__ == "__main__":
    main()
