"""A whole run: load, a storm, healing, and the verdict."""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import asyncpg

from mailgrpc.core.delivery import Cause, Outcome, State
from mailgrpc.core.ids import to_text
from tests.faults.checker import Box, Tried, Verdict, check
from tests.faults.clients import Clients
from tests.faults.ledger import read
from tests.faults.storm import Plan, Storm
from tests.faults.world import ENDS_WITHIN_S, Program, World, a_world, until

_STUCK_S = 60.0


async def run(plan: Plan, say: Callable[[str], Any] = lambda _text: None) -> Verdict:
    """A whole run: load, faults, healing, and the verdict."""
    async with a_world(plan.seed) as world:
        for _ in range(plan.servers):
            await world.add("serve")
        for _ in range(plan.workers):
            await world.add("work")
        clients = Clients(world.targets, plan.seed)
        try:
            await clients.watch(plan.watchers)
            clients.call(plan.callers, plan.pause_s)
            await until(lambda: len(clients.history.acknowledged) > 20)
            storm = Storm(world, plan)
            await storm.rage()
            say(f"{len(storm.faults)} faults, {len(clients.history.acknowledged)} acknowledged")
            await storm.heal()
            await clients.stop()
            await drain(world, say)
            findings = storm.findings + await stop_all(world.workers)
            boxes = await read_boxes(world.postgres.url)
            await _told_all(clients, boxes)
            await clients.close()
            findings += await stop_all(world.servers)
            faults = sorted(storm.faults, key=lambda fault: fault.begun_at)
            verdict = check(clients.history, boxes, read(world.ledger), faults)
            verdict.findings += findings
            return verdict
        finally:
            await clients.close()
            if plan.logs is not None:
                shutil.copytree(world.directory, plan.logs, dirs_exist_ok=True)


async def stop_all(programs: Sequence[Program]) -> list[str]:
    """SIGTERM, with nothing in the way: each ends in time and well, or it is a finding."""
    await until(lambda: all(program.is_ready for program in programs))
    codes = await asyncio.gather(*(program.end(ENDS_WITHIN_S) for program in programs))
    return [
        f"a {program.who} was told to stop in calm, and its exit code was {code}: …{program.said[-600:]}"
        for program, code in zip(programs, codes, strict=True)
        if code != 0
    ]


async def drain(world: World, say: Callable[[str], Any]) -> None:
    """Return when every delivery has ended, or when that gets no further.

    What has not ended then is a finding of the checker.
    """
    fewest, since = math.inf, time.monotonic()
    while time.monotonic() - since < _STUCK_S:
        connection = await asyncpg.connect(world.postgres.url)
        left = await connection.fetchval(
            "SELECT count(*) FROM mailgrpc.deliveries WHERE state IN (1, 2, 3)"
        )
        await connection.close()
        if not left:
            return
        if left < fewest:
            fewest, since = left, time.monotonic()
        say(f"{left} have not ended yet")
        await asyncio.sleep(2)


async def _told_all(clients: Clients, boxes: list[Box]) -> None:
    """Give the subscribers the time to hear the end; what they then lack, they lack."""
    events = sum(box.version for box in boxes)
    for _ in range(100):
        if all(len(seen) >= events for seen in clients.history.watchers):
            return
        await asyncio.sleep(0.1)


async def read_boxes(url: str) -> list[Box]:
    """Every delivery with its attempts, as the rows say."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            """SELECT d.*, m.id AS message_id, m.request_id FROM mailgrpc.deliveries d
               JOIN mailgrpc.messages m ON m.id = mailgrpc.message_of(d.id)"""
        )
        tried: dict[Any, list[Tried]] = {}
        for a in await connection.fetch("SELECT * FROM mailgrpc.attempts ORDER BY number"):
            tried.setdefault(a["delivery_id"], []).append(
                Tried(
                    a["number"],
                    a["started_at"].timestamp(),
                    a["ended_at"].timestamp(),
                    Outcome(a["outcome"]),
                    Cause(a["cause"]),
                )
            )
    finally:
        await connection.close()
    return [
        Box(
            delivery_id=to_text("dlv_", row["id"]),
            message_id=to_text("msg_", row["message_id"]),
            key=row["request_id"],
            recipient=row["recipient"],
            once=row["mode"] == 2,
            state=State(row["state"]),
            version=row["version"],
            possibly_sent=row["possibly_sent"],
            attempts=tuple(tried.get(row["id"], ())),
            channel=row["channel"],
        )
        for row in rows
    ]
