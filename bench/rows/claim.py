"""The time of a claim of 200 beside a million that are none of its business.

    a paused channel    a million due rows of a channel that nobody claims from now
    scheduled           a million deliveries that are due next week
    another project     a million due rows of the same channel; projects take turns, so the claim
                        takes 100 of each

each against the same claim where there is nothing else. Four databases of one cluster hold the four
cases, each with 2,000 due deliveries of its own, filled by SQL with ids as ours are: ordered by
time. They are claimed from in turns by the worker's own call (db/deliveries.py), and what was
claimed is given back each time, so that every claim finds the same.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from urllib.parse import urlsplit

import asyncpg

from bench.family import Family
from bench.row import Measured
from mailgrpc.db.deliveries import claim_due, release_claims
from mailgrpc.db.engine import Database
from mailgrpc.db.workers import open_session

BESIDE = 1_000_000
OWN = 2_000
CLAIM = 200
CLAIMS = 100
_WARM = 10

# (what is beside, its table, channel, project, how far ahead)
_CASES = {
    "claim_alone": ("", "due", "default", 1, "0"),
    "claim_paused": ("due of a paused channel", "due", "paused", 1, "0"),
    "claim_scheduled": ("scheduled", "scheduled", "default", 1, "7 days"),
    "claim_project": ("due of another project", "due", "default", 2, "0"),
}

# The delivery to the only recipient of a message of these milliseconds: see core/ids.py.
_INSERT = """WITH made AS (
        INSERT INTO deliveries (id, project_id, recipient, role, channel, priority, mode, flags,
            state, state_since, version, wait_reason, due_at, expire_at)
        SELECT (lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - 600000 + i / 4), 12, '0')
                || '7' || substr(md5('a' || i), 1, 3) || '8' || substr(md5('b' || i), 1, 11)
                || '0001')::uuid,
            $3, md5('c' || i) || '@example.test', 1, $2, 20, 1, 0, 1, now(), 1, 1,
            now() - interval '10 min' + i * interval '250 microseconds' + $4::text::interval,
            now() + interval '12 days'
        FROM generate_series(1, $1::integer) AS i
        RETURNING id, channel, project_id, priority, due_at)
    INSERT INTO {table} (delivery_id, channel, project_id, priority, due_at) SELECT * FROM made"""


def run(family: Family) -> list[Measured]:
    for name in _CASES:
        # The same schema, in files of its own.
        template = urlsplit(family.url).path.strip("/")
        family.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
    urls = {n: urlsplit(family.url)._replace(path=f"/{n}").geturl() for n in _CASES}
    return asyncio.run(_measure(urls))


async def _measure(urls: dict[str, str]) -> list[Measured]:
    rows = {
        name: Measured(
            f"claim of {CLAIM} beside {BESIDE:,} {case[0]}", "the same alone", " ms", at_most=1.5
        )
        for name, case in _CASES.items()
        if case[0]
    }
    for name, url in urls.items():
        await _fill(url, name)
    claimers = {name: await Claimer.connected(url) for name, url in urls.items()}
    for number in range(_WARM + CLAIMS):
        times = {name: await claimer.claim() for name, claimer in claimers.items()}
        if number >= _WARM:
            for name, row in rows.items():
                row.theirs.append(times["claim_alone"])
                row.ours.append(times[name])
    for name, row in rows.items():
        for side in ("claim_alone", name):
            claimer = claimers[side]
            row.check(side, wanted=(_WARM + CLAIMS) * CLAIM, claimed=claimer.claimed)
            row.check(f"{side}, given back", none=0, held=await claimer.held())
        tenths = statistics.quantiles(row.ours, n=10)
        row.facts = {"nine claims of ten take at most": f"{tenths[-1]:.2f} ms"}
    for claimer in claimers.values():
        await claimer.close()
    return list(rows.values())


async def _fill(url: str, name: str) -> None:
    what, table, channel, project, ahead = _CASES[name]
    connection = await asyncpg.connect(url, server_settings={"search_path": "mailgrpc"})
    if what:
        await connection.execute("INSERT INTO projects (name) VALUES ('other')")
        await connection.execute(_INSERT.format(table=table), BESIDE, channel, project, ahead)
    await connection.execute(_INSERT.format(table="due"), OWN, "default", 1, "0")
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


class Claimer:
    """A worker's session in one database that claims, and gives back what it got."""

    def __init__(self, database: Database, session_id: int) -> None:
        self._database = database
        self._session_id = session_id
        self._after_project = 0
        self.claimed = 0

    @classmethod
    async def connected(cls, url: str) -> Claimer:
        database = Database(url, pool_size=1)
        return cls(database, await open_session(database, "bench", ["default"]))

    async def claim(self) -> float:
        """One claim, in milliseconds."""
        began = time.perf_counter()
        claims = await claim_due(
            self._database, self._session_id, "default", CLAIM, self._after_project
        )
        took = time.perf_counter() - began
        self.claimed += len(claims.claimed)
        self._after_project = claims.claimed[-1].project_id
        ids = [one.delivery_id for one in claims.claimed]
        await release_claims(self._database, self._session_id, ids)
        return took * 1e3

    async def held(self) -> int:
        """How much is claimed now."""
        [row] = await self._database.fetch(
            "SELECT count(*) AS n FROM due WHERE session_id IS NOT NULL OR claims > 0"
        )
        return row["n"]

    async def close(self) -> None:
        await self._database.close()
