"""What `serve` and `work` take when there is nothing to do: memory and processor time.

Both run as shipped, beside each other, over the stores and a doorbell that nobody rings. Memory is
told twice: PSS, in which pages that both share count half, and RSS, what `ps` shows.
"""

from __future__ import annotations

import time

from bench.family import Child, Family
from bench.memory import pss_mb, rss_mb
from bench.row import Measured

SETTLE_S = 3.0
SECONDS = 20.0
MEMORY_MB = 100
OF_A_CORE = 0.01


def run(family: Family) -> list[Measured]:
    with family.running("serve") as server, family.running("work") as worker:
        time.sleep(SETTLE_S)
        both = {"serve": server, "work": worker}
        used = {name: child.cpu_s() for name, child in both.items()}
        stores_used = family.postgres_cpu_s()
        time.sleep(SECONDS)
        rows = [_row(name, child, used[name]) for name, child in both.items()]
        stores = (family.postgres_cpu_s() - stores_used) / SECONDS
    rows[-1].facts["PostgreSQL meanwhile, for both"] = f"{stores:.2%} of a core"
    return rows


def _row(name: str, child: Child, used: float) -> Measured:
    row = Measured(f"{name}, idle")
    pss, rss = pss_mb(child.process.pid), rss_mb(child.process.pid)
    core = (child.cpu_s() - used) / SECONDS
    row.limit(f"PSS and RSS at most {MEMORY_MB} MB", max(pss, rss) <= MEMORY_MB)
    row.limit(f"less than {OF_A_CORE:.0%} of a core", core < OF_A_CORE)
    row.facts = {
        "memory": f"PSS {pss:.1f} MB, RSS {rss:.1f} MB",
        f"processor over {SECONDS:.0f} s": f"{core:.2%} of a core",
    }
    return row
