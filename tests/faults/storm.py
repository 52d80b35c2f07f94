"""The storm: everything is hurt, at random, under load; then healed, and held to every promise.

A seed drives it: what strikes, whom, when, and at which step of the message's way a program is to
die (mailgrpc/failpoints.py). The same seed makes the same plan; what the machine makes of it differs
as machines do.
"""

from __future__ import annotations

import asyncio
import functools
import math
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mailgrpc.failpoints import FAILPOINTS
from mailgrpc.worker.runtime import PATIENCE_S
from tests.faults.checker import Fault
from tests.faults.proxy import LATE_S
from tests.faults.world import ENDS_WITHIN_S, LEASE_S, Program, World

_OF_SERVERS = ("intake.", "feed.", "watch.")
_RARE = frozenset({"reaper.ended", "reaper.released", "reaper.settled", "sessions.beat"})


@dataclass(frozen=True, slots=True)
class Plan:
    """How hard a run is."""

    seed: int
    seconds: float
    servers: int = 2
    workers: int = 3
    callers: int = 16
    pause_s: float = 0.12
    watchers: int = 3
    calm_s: float = 0.9  # between two faults, on average
    faults: tuple[str, ...] = ()  # empty: all
    logs: Path | None = None  # where to leave what everybody said


class Storm:
    """One run over a world.

    A fault is named by what it hurts, its first word. Each store and line is hurt in one way at a
    time; of the programs, each for itself.
    Whoever ends, however that comes, is buried and revived in one place, `_tend`.
    """

    def __init__(self, world: World, plan: Plan) -> None:
        self._world = world
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self.faults: list[Fault] = []
        self.findings: list[str] = []
        self._striking: dict[str, asyncio.Task[None]] = {}  # by what is being hurt
        self._thawing: set[asyncio.Task[None]] = set()
        self._is_over = False
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[int]]]] = {
            "worker killed": (24, lambda: self._killed(self._world.workers)),
            "server killed": (12, lambda: self._killed(self._world.servers)),
            "worker frozen past its lease": (4, lambda: self._frozen(self._world.workers)),
            "server frozen": (1, lambda: self._frozen(self._world.servers)),
            "worker told to stop": (4, lambda: self._told_to_stop(self._world.workers)),
            "server told to stop": (3, lambda: self._told_to_stop(self._world.servers)),
            "PostgreSQL crashed": (1, self._postgres_crashed),
            "PostgreSQL's backend killed": (1, self._backend_killed),
            "PostgreSQL away past a lease": (1, self._postgres_away),
            "Valkey killed": (2, self._valkey_killed),
            "Valkey flushed": (2, self._valkey_flushed),
            "Valkey out of memory": (2, self._valkey_full),
            "disk of the journal full": (2, self._disk_full),
            **self._lines("SMTP", silent=2, slow=1, reset=2, deaf=2, gone=2),
            **self._lines("HTTP", silent=1, slow=1, reset=1, deaf=1, gone=1),
            **self._lines("PostgreSQL", silent=1, slow=1, reset=1, deaf=1, gone=1, late=1),
        }

    def _lines(self, line: str, **weights: int) -> dict[str, tuple[int, Callable[[], Any]]]:
        return {
            f"{line} line {mood}": (weight, functools.partial(self._line, line, mood))
            for mood, weight in weights.items()
        }

    async def rage(self) -> None:
        """Strike until the time is over. What lasts goes on while other things are struck."""
        tending = asyncio.create_task(self._tend())
        ends_at = time.monotonic() + self._plan.seconds
        chosen = self._plan.faults or tuple(self._kinds)
        weights = [self._kinds[kind][0] for kind in chosen]
        while time.monotonic() < ends_at and not tending.done():
            await asyncio.sleep(self._rng.expovariate(1 / self._plan.calm_s))
            [kind] = self._rng.choices(chosen, weights)
            hurt = kind if kind.startswith(("worker", "server")) else Fault(kind, 0, 0).hurts
            if hurt not in self._striking or self._striking[hurt].done():
                self._striking[hurt] = asyncio.create_task(self._strike(kind))
        await asyncio.gather(*self._striking.values())
        self._is_over = True
        await tending
        await asyncio.gather(*self._thawing)

    async def heal(self) -> None:
        """Nothing is hurt any more, everything runs, and the providers take every mail."""
        self._world.fill_disk(False)
        for line in self._world.lines.values():
            await line.set("pass")
        self._world.behave("sure")
        for program in (*self._world.servers, *self._world.workers):
            if program.is_ready and not (program.aim or program.ending):
                continue
            now = time.time()
            await program.kill()  # it may be aimed at
            self.faults.append(Fault(f"{program.who} replaced, to heal", now, now))
            await program.start()

    async def _strike(self, kind: str) -> None:
        begun_at = time.time()
        kills = await self._kinds[kind][1]()
        if kills >= 0:
            self.faults.append(Fault(kind, begun_at, time.time(), kills))

    async def _tend(self) -> None:
        """Notice who has ended or was frozen by its failpoint, and see to it."""
        while not self._is_over:
            await asyncio.sleep(0.05)
            for program in (*self._world.servers, *self._world.workers):
                if program.process is None:
                    continue
                if program.has_stopped_itself:
                    task = asyncio.create_task(self._thaw(program))
                    self._thawing.add(task)
                    task.add_done_callback(self._thawing.discard)
                elif not program.lives_on:
                    self._bury(program)
                    aim = self._aim(program.kind) if self._rng.random() < 0.35 else ""
                    line = self._world.behind_line if self._rng.random() < 0.4 else {}
                    await program.start(aim, **line)

    def _bury(self, program: Program) -> None:
        """Say what a life ended by; what nobody did to it is a finding."""
        assert program.process is not None
        code, now = program.process.returncode, time.time()
        if program.ending == "killed" and code == -signal.SIGKILL:
            return
        if code == -signal.SIGKILL and f"hit at {program.place}" in program.said:
            self.faults.append(Fault(f"{program.who} died at {program.place}", now, now, 1))
        elif self._postgres_was_hurt(program.begun_at, now) and code == 1:
            pass  # it could not start, and said so: whoever runs it starts it again
        elif code != 0 or program.ending != "told to stop":
            tail = program.said[-600:]
            self.findings.append(f"a {program.who} ended by itself, exit code {code}: …{tail}")

    def _postgres_was_hurt(self, since: float, until_: float) -> bool:
        task = self._striking.get("PostgreSQL")
        return (task is not None and not task.done()) or any(
            f.hurts == "PostgreSQL" and f.begun_at < until_ and f.ended_at > since - 5
            for f in self.faults
        )

    async def _thaw(self, program: Program) -> None:
        """A failpoint froze it: let it lie for longer than its lease."""
        program.is_frozen = True
        process, begun_at = program.process, time.time()
        await asyncio.sleep(LEASE_S * self._rng.uniform(1.2, 2.5))
        if program.process is process:
            program.send(signal.SIGCONT)
        self.faults.append(Fault(f"{program.who} frozen at {program.place}", begun_at, time.time()))

    def _aim(self, kind: str) -> str:
        is_server = kind == "serve"
        places = [p for p in FAILPOINTS if p.startswith(_OF_SERVERS) == is_server]
        place = self._rng.choice(places)
        # As often early as late in a life; one that ended at once every time would say little.
        nth = int(math.exp(self._rng.uniform(0, math.log(3 if place in _RARE else 500))))
        hit = self._rng.choice(("kill", "kill", "kill", "kill", "freeze"))
        return f"{place}={hit}@{nth}"

    def _one_of(self, programs: list[Program]) -> Program | None:
        """A victim that works. The last server is mostly spared: nothing else lets mail in."""
        ready = [p for p in programs if p.is_ready and not p.ending and not p.is_frozen]
        if not ready or (len(ready) == 1 and ready[0].kind == "serve" and self._rng.random() < 0.7):
            return None
        return self._rng.choice(ready)

    async def _killed(self, programs: list[Program]) -> int:
        if (program := self._one_of(programs)) is None:
            return -1
        program.ending = "killed"
        program.send(signal.SIGKILL)
        return 1

    async def _frozen(self, programs: list[Program]) -> int:
        if (program := self._one_of(programs)) is None:
            return -1
        process = program.process
        program.send(signal.SIGSTOP)
        await asyncio.sleep(LEASE_S * self._rng.uniform(1.2, 2.5))
        if program.process is process:
            program.send(signal.SIGCONT)
        return 0

    async def _told_to_stop(self, programs: list[Program]) -> int:
        if (program := self._one_of(programs)) is None:
            return -1
        program.ending, process, begun_at = "told to stop", program.process, time.time()
        program.send(signal.SIGTERM)
        while program.process is process and program.lives_on:
            await asyncio.sleep(0.1)
            if time.time() > begun_at + ENDS_WITHIN_S:
                if not self._postgres_was_hurt(begun_at, time.time()):
                    self.findings.append(f"a {program.who} had not ended: …{program.said[-600:]}")
                program.ending = "killed"
                program.send(signal.SIGKILL)
                return 1
        return 0

    async def _postgres_crashed(self) -> int:
        await self._world.crash_postgres()
        await self._world.revive_postgres()
        return 1

    async def _backend_killed(self) -> int:
        await self._world.kill_backend()
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

    async def _line(self, line: str, mood: str) -> int:
        await self._world.lines[line].set(mood)
        shortest_s, longest_s = 0.5, 1.5 * LEASE_S if line == "PostgreSQL" else 3
        if mood == "late":  # so that what is held back has been given up
            shortest_s, longest_s = PATIENCE_S + 1, 1.5 * PATIENCE_S
        await asyncio.sleep(self._rng.uniform(shortest_s, longest_s))
        await self._world.lines[line].set("pass")
        if mood == "late":
            await asyncio.sleep(2 * LATE_S)
        return 0

    async def _disk_full(self) -> int:
        self._world.fill_disk(True)
        await asyncio.sleep(self._rng.uniform(0.5, 2))
        self._world.fill_disk(False)
        return 0
