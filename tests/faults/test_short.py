"""A short storm as a part of `make test`. The long one is `make faults`."""

from __future__ import annotations

from tests.faults.report import table
from tests.faults.run import run
from tests.faults.storm import Plan


async def test_nothing_is_lost_or_sent_twice_while_everything_is_hurt() -> None:
    plan = Plan(seed=7, seconds=8, servers=2, workers=2, callers=4, watchers=2, calm_s=0.3)
    verdict = await run(plan)
    assert not verdict.findings, "\n".join([*verdict.findings[:10], table(verdict)])
    assert verdict.sent > 0
    assert sum(row.kills for row in verdict.rows.values()) > 0
