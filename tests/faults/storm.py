"""The storm: everything is hurt, at random, under load; then healed, and held to every promise.

A seed drives it: what strikes, whom, when, and at which step of the message's way a program is to
die (mailgrpc/failpoints.py). The same seed makes the same plan; what the machine makes of it differs
as machines do.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg

from mailgrpc.core.delivery import Cause, Outcome, State
from mailgrpc.core.ids import to_text
from mailgrpc.failpoints import FAILPOINTS
from tests.faults.checker import Box, Fault, Tried, Verdict, check
from tests.faults.clients import Clients
from tests.faults.ledger import read
from tests.faults.world import LEASE_S, Program, World, a_world, until

_OF_SERVERS = ("intake.", "feed.", "watch.")
_RARE = frozenset({"reaper.ended", "reaper.released", "reaper.settled", "sessions.beat"})


@dataclass(frozen=True, slots=True)
class Plan:
    """How hard a run is."""

    seed: int
    seconds: float
    servers: int = 2
    workers: int = 3
    callers: int = 12
    pause_s: float = 0.12
    watchers: int = 2
    calm_s: float = 1.0  # between two faults, on average
    faults: tuple[str, ...] = ()  # empty: all


class Storm:
    """One run over a world."""

    def __init__(self, world: World, plan: Plan) -> None:
        self._world = world
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self.faults: list[Fault] = []
        self._striking: dict[str, asyncio.Task[None]] = {}  # by what is being hurt
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[int]]]] = {
            "worker killed": (24, self._worker_killed),
            "server killed": (12, self._server_killed),
            "process of a worker frozen past its lease": (4, self._worker_frozen),
            "worker told to stop": (4, self._worker_stopped),
            "server told to stop": (3, self._server_stopped),
            "PostgreSQL crashed": (3, self._postgres_crashed),
            "PostgreSQL away past a lease": (1, self._postgres_away),
            "Valkey killed": (2, self._valkey_killed),
            "Valkey flushed": (2, self._valkey_flushed),
            "Valkey out of memory": (2, self._valkey_full),
            "provider's line silent": (2, lambda: self._line("silent")),
            "provider's line slow": (1, lambda: self._line("slow")),
            "provider's line reset": (2, lambda: self._line("reset")),
            "provider's answers swallowed": (2, lambda: self._line("deaf")),
            "provider's port closed": (2, lambda: self._line("gone")),
            "journal's disk full": (2, self._disk_full),
        }

    async def rage(self) -> None:
        """Strike until the time is over. What lasts goes on while other things are struck."""
        tending = asyncio.create_task(self._tend())
        ends_at = time.monotonic() + self._plan.seconds
        chosen = self._plan.faults or tuple(self._kinds)
        weights = [self._kinds[kind][0] for kind in chosen]
        while time.monotonic() < ends_at:
            await asyncio.sleep(self._rng.expovariate(1 / self._plan.calm_s))
            [kind] = self._rng.choices(chosen, weights)
            hurt = kind.split()[0]
            if hurt not in self._striking or self._striking[hurt].done():
                self._striking[hurt] = asyncio.create_task(self._strike(kind))
        await asyncio.gather(*self._striking.values())
        tending.cancel()
        await asyncio.gather(tending, return_exceptions=True)
        self.faults.sort(key=lambda fault: fault.begun_at)

    async def _strike(self, kind: str) -> None:
        begun_at = time.time()
        kills = await self._kinds[kind][1]()
        self.faults.append(Fault(kind, begun_at, time.time(), kills))

    async def _tend(self) -> None:
        """Whoever died where its failpoint said is buried and gets another life."""
        while True:
            await asyncio.sleep(0.1)
            for program in (*self._world.servers, *self._world.workers):
                if program.process is not None and not program.lives_on:
                    if program.process.returncode == -signal.SIGKILL:
                        now = time.time()
                        kind = "server" if program.kind == "serve" else "worker"
                        self.faults.append(Fault(f"{kind} died at a named step", now, now, 1))
                    await self._revive(program)

    async def _revive(self, program: Program) -> None:
        """Another life; half of them are aimed at."""
        await program.start(self._aim(program.kind) if self._rng.random() < 0.6 else "")

    def _aim(self, kind: str) -> str:
        is_server = kind == "serve"
        places = [p for p in FAILPOINTS if p.startswith(_OF_SERVERS) == is_server]
        place = self._rng.choice(places)
        most = 2 if place in _RARE else 60
        return f"{place}=kill@{self._rng.randint(1, most)}"

    def _one_of(self, programs: list[Program]) -> Program:
        return self._rng.choice([p for p in programs if p.lives_on] or programs)

    async def _worker_killed(self) -> int:
        return await self._killed(self._one_of(self._world.workers))

    async def _server_killed(self) -> int:
        return await self._killed(self._one_of(self._world.servers))

    async def _killed(self, program: Program) -> int:
        if not program.lives_on:
            return 0
        program.send(signal.SIGKILL)
        process = program.process
        assert process is not None
        await process.wait()
        if program.process is process:
            await self._revive(program)
        return 1

    async def _worker_frozen(self) -> int:
        worker = self._one_of(self._world.workers)
        worker.send(signal.SIGSTOP)
        await asyncio.sleep(LEASE_S * self._rng.uniform(1.2, 2.5))
        worker.send(signal.SIGCONT)
        return 0

    async def _worker_stopped(self) -> int:
        return await self._stopped(self._one_of(self._world.workers))

    async def _server_stopped(self) -> int:
        return await self._stopped(self._one_of(self._world.servers))

    async def _stopped(self, program: Program) -> int:
        if not program.lives_on:
            return 0
        process = program.process
        await program.end(within_s=8)
        if program.process is process:
            await self._revive(program)
        return 0

    async def _postgres_crashed(self) -> int:
        await self._world.crash_postgres()
        await self._world.revive_postgres()
        return 1

    async def _postgres_away(self) -> int:
        await self._world.crash_postgres()
        await asyncio.sleep(LEASE_S * self._rng.uniform(1.1, 2))
        await self._world.revive_postgres()
        return 1

    async def _valkey_killed(self) -> int:
        await self._world.kill_valkey()
        await asyncio.sleep(self._rng.uniform(0, 3))
        await self._world.revive_valkey()
        return 1

    async def _valkey_flushed(self) -> int:
        await self._world.tell_valkey("FLUSHALL")
        return 0

    async def _valkey_full(self) -> int:
        await self._world.tell_valkey("CONFIG", "SET", "maxmemory", "1")
        await asyncio.sleep(self._rng.uniform(0.5, 2))
        await self._world.tell_valkey("CONFIG", "SET", "maxmemory", "256mb")
        return 0

    async def _line(self, mood: str) -> int:
        await self._world.proxy.set(mood)
        await asyncio.sleep(self._rng.uniform(0.5, 3))
        await self._world.proxy.set("pass")
        return 0

    async def _disk_full(self) -> int:
        self._world.fill_disk(True)
        await asyncio.sleep(self._rng.uniform(0.5, 2))
        self._world.fill_disk(False)
        return 0


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
            await heal(world)
            await clients.stop()
            await until(lambda: _open_deliveries(world, say), within_s=180, every_s=1)
            boxes = await read_boxes(world.postgres.url)
            await _told_all(clients, boxes)
            return check(clients.history, boxes, read(world.ledger), storm.faults)
        finally:
            await clients.close()


async def heal(world: World) -> None:
    """Nothing is hurt any more, everything runs, and the providers take every mail."""
    world.fill_disk(False)
    await world.proxy.set("pass")
    world.behave("sure")
    for program in (*world.servers, *world.workers):
        program.send(signal.SIGCONT)
        if not program.lives_on or "=" in program.environ.get("MAILGRPC_FAILPOINTS", ""):
            await program.start()
        else:
            await program.kill()  # it may be aimed at
            await program.start()


async def _open_deliveries(world: World, say: Callable[[str], Any]) -> bool:
    """Whether all have ended."""
    connection = await asyncpg.connect(world.postgres.url)
    try:
        left = await connection.fetchval(
            "SELECT count(*) FROM mailgrpc.deliveries WHERE state IN (1, 2, 3)"
        )
        # What was decided while providers misbehaved may lie far ahead; it need not be waited for.
        await connection.execute(
            "UPDATE mailgrpc.due SET due_at = now() WHERE session_id IS NULL AND due_at > now()"
        )
    finally:
        await connection.close()
    if left:
        say(f"{left} have not ended yet")
    return left == 0


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
        )
        for row in rows
    ]
