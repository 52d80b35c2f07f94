"""Scenarios: one promise, one fault, aimed. Each fails when the guard that it is about is taken out.

A storm hits everything and proves nothing in particular; these say what happens and why. `MUTANTS`
names for each guard the change that takes it out and the scenario that must then fail, and
`python -m tests.faults.scenarios --mutants` runs those: a check of the checker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import grpc

from mailgrpc.core.delivery import Cause, Outcome, State
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import mail_service_pb2_grpc, message_pb2
from tests.faults.checker import Box, check
from tests.faults.clients import Clients
from tests.faults.ledger import copies, read
from tests.faults.run import read_boxes
from tests.faults.world import LEASE_S, World, a_world, until
from tests.gateway import enqueue

ONCE = message_pb2.DELIVERY_MODE_SEND_ONCE
RETRYING = message_pb2.DELIVERY_MODE_RETRYING


async def sql(world: World, statement: str) -> list[Any]:
    """Ask the rows."""
    connection = await asyncpg.connect(
        world.postgres.url, server_settings={"search_path": "mailgrpc"}
    )
    try:
        return await connection.fetch(statement)
    finally:
        await connection.close()


async def put(world: World, count: int, mode: int, prefix: str = "m") -> None:
    """Enqueue so many messages and wait for the answers."""
    requests = []
    for number in range(count):
        key = f"{prefix}-{number}"
        request = enqueue(f"{key}@example.org", request_id=key, subject=key)
        request.options.mode = mode
        request.options.retry.initial_backoff.FromSeconds(1)
        requests.append(request)
    async with grpc.aio.insecure_channel(world.targets[0]) as channel:
        await channel.channel_ready()
        stub = mail_service_pb2_grpc.MailServiceStub(channel)
        await stub.EnqueueBatch(pb.EnqueueBatchRequest(requests=requests), timeout=20)


async def put_one_by_one(world: World, count: int, prefix: str) -> None:
    """Enqueue so many RETRYING messages, each when the one before it is answered."""
    async with grpc.aio.insecure_channel(world.targets[0]) as channel:
        await channel.channel_ready()
        stub = mail_service_pb2_grpc.MailServiceStub(channel)
        for number in range(count):
            key = f"{prefix}-{number}"
            request = enqueue(f"{key}@example.org", request_id=key, subject=key)
            request.options.mode = RETRYING
            await stub.Enqueue(request, timeout=20)


async def in_ledger(world: World, count: int) -> None:
    """Wait until so many mails were read by the provider."""
    await until(lambda: sum(copies(read(world.ledger)).values()) >= count)


async def all_ended(world: World) -> list[Box]:
    """The deliveries once nothing moves by itself any more."""

    async def ended() -> bool:
        return not await sql(world, "SELECT FROM deliveries WHERE state IN (1, 2, 3) LIMIT 1")

    await until(ended)
    return await read_boxes(world.postgres.url)


def assert_nothing_twice(world: World, boxes: Sequence[Box], *, but: int = 0) -> None:
    """No box has two copies, and what the ledger has is SENT, but for so many in doubt."""
    taken = copies(read(world.ledger))
    twice = {key: n for key, n in taken.items() if n > 1}
    assert not twice, f"sent twice: {twice}"
    unsaid = [b for b in boxes if taken[b.key, b.recipient] and b.state is not State.SENT]
    assert len(unsaid) <= but, f"in the box and not SENT: {unsaid}"


def _patient(world: World) -> dict[str, str]:
    """Settings of a worker that gives a provider which holds its answer half a minute."""
    urls = {k: v for k, v in world.environ.items() if k.startswith("MAILGRPC_CHANNEL_")}
    assert all("timeout=2" in url for url in urls.values())
    return {
        **{key: url.replace("timeout=2", "timeout=30") for key, url in urls.items()},
        "MAILGRPC_ATTEMPT_TIMEOUT_S": "40",
    }


async def few_in_doubt_when_a_worker_is_killed(world: World) -> None:
    """200 SEND_ONCE deliveries claimed, 8 of them on the wire: at most 8 end in doubt."""
    await world.add("serve")
    world.behave("hold")
    await put(world, 200, ONCE)
    worker = await world.add("work")
    await in_ledger(world, 8)
    [[claimed]] = await sql(world, "SELECT count(*) FROM due WHERE session_id IS NOT NULL")
    assert claimed == 200, f"{claimed} claimed"
    await worker.kill()
    world.behave("sure")
    await worker.start()
    boxes = await all_ended(world)
    states = Counter(b.state for b in boxes)
    assert states[State.OUTCOME_UNKNOWN] <= 8, states
    assert states[State.SENT] >= 192, states
    assert sum(states.values()) == 200, states
    assert_nothing_twice(world, boxes, but=8)


async def what_was_written_down_survives_the_worker(world: World) -> None:
    """Results that stood in a journal when their worker was killed, while PostgreSQL was away."""
    await world.add("serve")
    world.behave("hold")
    worker = await world.add("work")
    await put(world, 8, ONCE)
    await in_ledger(world, 8)
    await world.crash_postgres()
    world.behave("sure")
    await asyncio.sleep(1.5)  # the provider answers, and the journal syncs; nobody can tell us
    await worker.kill()
    await world.revive_postgres()
    await worker.start()
    boxes = await all_ended(world)
    assert_nothing_twice(world, boxes)
    assert {b.state for b in boxes} == {State.SENT}, boxes


async def an_outage_of_postgresql_is_nobodys_end(world: World) -> None:
    """PostgreSQL away for three leases under load: nobody is taken for dead, nothing sent again."""
    lease_s = 2 * LEASE_S
    await world.add("serve")
    world.behave("sure")
    for _ in range(2):
        await world.add("work", MAILGRPC_LEASE_S=str(lease_s), **_patient(world))
    async with load(world) as clients:
        await until(lambda: len(clients.history.acknowledged) > 100)
        world.behave("hold")
        await put(world, 40, ONCE, "once")
        await put(world, 40, RETRYING, "retrying")
        # One worker may have claimed all of that: there must be something to take from each.
        for more in range(20):
            await asyncio.sleep(0.5)
            if len(held := await sql(world, _STARTED_BY_SESSION)) == 2:
                break
            await put(world, 100, RETRYING, f"more-{more}")
        assert len(held) == 2, "one worker has started everything"
        # Still until its neighbour has seen its last beat, so that it could be taken for gone at once.
        world.workers[0].send(signal.SIGSTOP)
        await asyncio.sleep(lease_s / 3)
        await world.crash_postgres()
        world.workers[0].send(signal.SIGCONT)
        world.behave("sure")
        await asyncio.sleep(3 * lease_s)
        # One of them is slow to come back, by half a lease: its neighbour must not jump at that.
        world.workers[0].send(signal.SIGSTOP)
        await world.revive_postgres()
        await asyncio.sleep(lease_s / 2)
        world.workers[0].send(signal.SIGCONT)
        before = len(clients.history.acknowledged)
        await until(lambda: len(clients.history.acknowledged) > before + 100)
        await clients.stop()
        boxes = await all_ended(world)
        assert_nothing_twice(world, boxes)
        # By the events: in the rows a result that came late has put it right.
        lost = await sql(world, f"SELECT delivery_id FROM events WHERE cause = {Cause.WORKER_LOST}")
        assert not lost, f"{len(lost)} attempts were taken for lost"
        assert {b.state for b in boxes} == {State.SENT}, Counter(b.state for b in boxes)


_STARTED_BY_SESSION = """SELECT q.session_id FROM due q JOIN deliveries d ON d.id = q.delivery_id
    WHERE d.state = 2 GROUP BY q.session_id HAVING count(*) >= 5"""


async def a_late_result_leaves_the_running_attempt_alone(world: World) -> None:
    """A worker frozen before it sent goes on while another one sends: only that one counts."""
    patient = _patient(world)
    await world.add("serve")
    world.behave("hold")
    frozen = await world.add("work", **patient)
    await frozen.kill()
    await frozen.start("smtp.content=freeze")
    await put(world, 1, RETRYING)
    await until(lambda: "hit at smtp.content" in frozen.log.read_text())
    other = await world.add("work", **patient)
    await in_ledger(world, 1)  # the other has reaped it, and its attempt is on the wire
    frozen.send(signal.SIGCONT)
    await until(lambda: sql(world, "SELECT FROM attempts WHERE outcome = 2"))
    await asyncio.sleep(2.5)  # longer than what the frozen one may have put it off by
    world.behave("sure")
    boxes = await all_ended(world)
    assert_nothing_twice(world, boxes)
    [box] = boxes
    assert [a.outcome for a in box.attempts] == [Outcome.DEFERRED, Outcome.ACCEPTED], box
    await other.kill()


async def the_feed_tells_all_while_commits_overtake_each_other(world: World) -> None:
    """Writers of one lane whose commits take different times: no subscriber misses an event."""
    await sql(
        world,
        """CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_sleep(random() * 0.03); RETURN NULL; END $$""",
    )
    await sql(
        world,
        "CREATE TRIGGER linger AFTER INSERT ON events FOR EACH STATEMENT EXECUTE FUNCTION linger()",
    )
    world.behave("sure")
    for kind in ("serve", "serve", "work", "work"):
        await world.add(kind, MAILGRPC_FEED_LANES="1")
    async with load(world, watchers=2) as clients:
        await until(lambda: len(clients.history.acknowledged) > 300)
        await clients.stop()
        boxes = await all_ended(world)
        events = sum(b.version for b in boxes)
        with contextlib.suppress(AssertionError):
            await until(lambda: all(len(seen) >= events for seen in clients.history.watchers), 10)
        verdict = check(clients.history, boxes, read(world.ledger), [])
        assert not verdict.findings, verdict.findings[:5]


async def mail_flows_without_the_doorbell(world: World, away_s: float = 60.0) -> None:
    """Redis stopped under load: mail leaves within two seconds; back, it rings by itself."""
    await world.add("serve")
    await world.add("work")
    world.behave("sure")
    async with load(world, callers=2) as clients:
        await until(lambda: len(clients.history.acknowledged) > 20)
        await world.kill_valkey()
        began_at = time.time()
        await asyncio.sleep(away_s)
        back_at = time.time()
        await world.revive_valkey()
        await asyncio.sleep(4)  # longer than any of our waits before a reconnect
        rings_at = time.time()
        await asyncio.sleep(4)
        await clients.stop()
        await all_ended(world)
    waits = await sql(
        world,
        f"""SELECT extract(epoch FROM m.created_at)::float8 AS at, extract(epoch FROM
            min(e.occurred_at) - m.created_at)::float8 AS waited FROM messages m
            JOIN events e ON e.message_id = m.id AND e.attempt_ended_at IS NOT NULL
                AND e.cause <> {Cause.WORKER_LOST} GROUP BY m.id""",
    )
    without = [w["waited"] for w in waits if began_at < w["at"] < back_at]
    after = [w["waited"] for w in waits if w["at"] > rings_at]
    assert without, "nothing was enqueued meanwhile"
    assert max(without) < 2.0, f"tried {max(without):.2f} s after it was acknowledged"
    assert after, "nothing was enqueued afterwards"
    assert statistics.median(after) < 0.25, f"no doorbell: median {statistics.median(after):.2f} s"
    print(
        f"without Redis: median {statistics.median(without):.2f} s, longest {max(without):.2f} s;"
        f" with it again: median {statistics.median(after) * 1000:.0f} ms ({len(after)} messages)"
    )


# The attempt of what was handed over is a call of its own, and has its id.
_HANDED_OVER = "SELECT count(*) FROM attempts WHERE id = call_id"


async def until_handed_over(world: World, prefix: str) -> None:
    """Enqueue until some of it is handed over: after a loss credit rests for five seconds."""
    [[before]] = await sql(world, _HANDED_OVER)
    for part in range(100):
        await put_one_by_one(world, 10, f"{prefix}-{part}")
        if (await sql(world, _HANDED_OVER))[0][0] > before + 5:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("nothing is handed over")


async def what_is_handed_over_survives_its_notice(world: World) -> None:
    """Servers killed between the commit that started mail and the notice of it: sent soon, once.

    Valkey is emptied beside that, and with it notices and credits.
    """
    server = await world.add("serve")
    await world.add("work")
    world.behave("sure")
    lives = 4
    for life in range(lives):
        await until_handed_over(world, f"whole-{life}")
        await server.kill()
        await server.start("credits.stored=kill@3")
        with contextlib.suppress(grpc.aio.AioRpcError):
            await until_handed_over(world, f"lost-{life}")
        assert server.process is not None
        assert await server.process.wait() == -signal.SIGKILL
        await server.start()
        await world.tell_valkey("FLUSHALL")
        await put_one_by_one(world, 50, f"flushed-{life}")
    boxes = await all_ended(world)
    assert_nothing_twice(world, boxes)
    assert {b.state for b in boxes} == {State.SENT}, Counter(b.state for b in boxes)
    assert not any(b.possibly_sent for b in boxes)
    [[handed]] = await sql(world, _HANDED_OVER)
    assert handed > 20, f"{handed} handed over"
    taken_back = await sql(world, f"SELECT FROM attempts WHERE cause = {Cause.WORKER_LOST}")
    assert len(taken_back) >= lives, f"{len(taken_back)} taken back, of {lives} and more"
    waits = await sql(
        world,
        f"""SELECT extract(epoch FROM e.occurred_at - m.created_at)::float8 AS waited
            FROM messages m JOIN events e ON e.message_id = m.id AND e.state = {State.SENT}""",
    )
    longest = max(w["waited"] for w in waits)
    assert longest < 2.5, f"sent {longest:.2f} s after it was acknowledged"
    print(
        f"{handed} handed over, {len(taken_back)} left without a notice, the longest wait {longest:.2f} s"
    )


@contextlib.asynccontextmanager
async def load(world: World, *, callers: int = 6, watchers: int = 0) -> AsyncIterator[Clients]:
    """Callers of all kinds of mail, until the block ends."""
    clients = Clients(world.targets, 1)
    try:
        await clients.watch(watchers)
        clients.call(callers, 0.05)
        yield clients
    finally:
        await clients.close()


Scenario = Callable[[World], Awaitable[None]]

SCENARIOS: dict[str, Scenario] = {
    s.__name__: s
    for s in (
        few_in_doubt_when_a_worker_is_killed,
        what_was_written_down_survives_the_worker,
        an_outage_of_postgresql_is_nobodys_end,
        a_late_result_leaves_the_running_attempt_alone,
        the_feed_tells_all_while_commits_overtake_each_other,
        mail_flows_without_the_doorbell,
        what_is_handed_over_survives_its_notice,
    )
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A guard taken out: by a patch of entry.py, or by text of a function of the database."""

    guard: str
    scenario: Scenario
    patch: str = "lossy"
    function: str = ""
    text: str = ""
    instead: str = ""


MUTANTS = (
    Mutant(
        "the guard on the attempt id",
        a_late_result_leaves_the_running_attempt_alone,
        function="record_outcomes",
        text="AND d.attempt_id = r.attempt_id",
    ),
    Mutant(
        "the commit of the start before the send",
        few_in_doubt_when_a_worker_is_killed,
        patch="lossy send-before-the-start",
    ),
    Mutant("the journal's fsync", what_was_written_down_survives_the_worker, patch="no-sync"),
    Mutant(
        "the lane lock of the feed",
        the_feed_tells_all_while_commits_overtake_each_other,
        function="append_events",
        text="PERFORM pg_advisory_xact_lock(1835466752 + p_lane);",
    ),
    Mutant(
        "the beat-before-reap rule",
        an_outage_of_postgresql_is_nobodys_end,
        patch="lossy reap-without-looking",
    ),
    Mutant(
        "the look for what no notice told of",
        what_is_handed_over_survives_its_notice,
        patch="lossy take-nothing-back",
    ),
)


async def play(scenario: Scenario, mutant: Mutant | None = None) -> None:
    """Run one, in a world of its own. Raises AssertionError where its promise is broken."""
    async with a_world(1, patch=mutant.patch if mutant else "lossy") as world:
        if mutant and mutant.function:
            [[source]] = await sql(
                world, f"SELECT pg_get_functiondef('mailgrpc.{mutant.function}'::regproc)"
            )
            assert source.count(mutant.text) == 1, f"{mutant.guard} is not where it was"
            await sql(world, source.replace(mutant.text, mutant.instead))
        await scenario(world)


async def run_all(names: Sequence[str]) -> int:
    """Run scenarios; how many failed."""
    failed = 0
    for name, scenario in SCENARIOS.items():
        if names and name not in names:
            continue
        began_at = time.monotonic()
        try:
            await play(scenario)
            said = "holds"
        except AssertionError as error:
            failed += 1
            said = f"BROKEN: {error}"
        print(f"{name} ({time.monotonic() - began_at:.0f} s): {said}", flush=True)
    return failed


async def run_mutants(names: Sequence[str]) -> int:
    """Take out one guard after the other; how many were not noticed."""
    print("| guard taken out | scenario | what it said |\n|---|---|---|")
    unnoticed = 0
    for mutant in MUTANTS:
        if names and mutant.scenario.__name__ not in names:
            continue
        try:
            await play(mutant.scenario, mutant)
            unnoticed += 1
            said = "**nothing: it was not noticed**"
        except AssertionError as error:
            said = str(error).splitlines()[0][:120]
        print(f"| {mutant.guard} | {mutant.scenario.__name__} | {said} |", flush=True)
    return unnoticed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.scenarios")
    parser.add_argument("names", nargs="*", help=", ".join(SCENARIOS))
    parser.add_argument("--mutants", action="store_true", help="take out guards instead")
    options = parser.parse_args()
    failed = asyncio.run((run_mutants if options.mutants else run_all)(options.names))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
