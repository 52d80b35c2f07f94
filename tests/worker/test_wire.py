"""The wire: what a provider does to the task that asks it is the matter of one call."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mailgrpc.core.delivery import Mode, Result, State
from mailgrpc.db.deliveries import Started
from mailgrpc.db.engine import Database
from mailgrpc.providers.capture import CaptureProvider
from mailgrpc.providers.provider import SendCall
from mailgrpc.worker import drain, wire
from mailgrpc.worker.pace import AHEAD
from tests.worker.rig import Clock, Part, Store


class Stray(CaptureProvider):
    """One of its calls, counted from 1, cancels whoever asked it, once that one is answered."""

    def __init__(self, hit: int) -> None:
        super().__init__()
        self._hit = hit
        self._calls = 0

    async def send(self, call: SendCall) -> list[Result]:
        self._calls += 1
        task = asyncio.current_task()
        assert task is not None
        if self._calls == self._hit:
            asyncio.get_running_loop().call_soon(task.cancel)
        else:
            await asyncio.sleep(0.01)
        return await super().send(call)


@pytest.mark.parametrize(
    ("hit", "expected"),
    [
        pytest.param(1, [State.DEFERRED, *[State.SENT] * 3], id="while the next is asked for"),
        pytest.param(2, [State.SENT] * 4, id="while others have their turn"),
    ],
)
async def test_a_slot_that_is_cancelled_by_a_provider_goes_on_with_the_line(
    db: Database, store: Store, clock: Clock, hit: int, expected: list[State]
) -> None:
    messages = await store.put_many([[f"a{n}@example.com"] for n in range(4)])
    async with Part(db, clock, Stray(hit), concurrency=1) as part:
        await part.work()
    states = [await store.state(message) for message in messages]
    assert sorted(states) == expected
    for message, state in zip(messages, states, strict=True):
        # Nobody knows what became of one that was cancelled.
        assert (await store.delivery(message)).possibly_sent == (state is State.DEFERRED)


async def test_a_provider_that_never_waits_is_not_asked_for_all_before_the_next_start(
    db: Database, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it works off what was started, the next start is on its way."""
    left: list[int] = []
    start = drain.start_deliveries

    async def noted(*args: Any, **named: Any) -> list[Started]:
        left.append(part.drain._wire.calls)
        return await start(*args, **named)

    monkeypatch.setattr(drain, "start_deliveries", noted)
    monkeypatch.setattr(wire, "STARTED_AHEAD", 20)
    await store.put_many([[f"a{n}@example.com"] for n in range(40)])
    async with Part(db, clock, CaptureProvider(), concurrency=2) as part:
        await part.work()
        assert len(part.outbox) == 40
    assert left[0] == 0
    assert left[1] >= 6


async def test_the_faster_a_channel_is_the_more_is_started_ahead(
    db: Database, clock: Clock
) -> None:
    async with Part(db, clock, CaptureProvider(), concurrency=8) as part:
        room, pace = part.drain._wire.room, part.drain.credits._pace
        assert room(Mode.RETRYING) == 8 + wire.STARTED_AHEAD
        for ended, ahead in ((10, wire.STARTED_AHEAD), (100_000, AHEAD)):
            for _ in range(20):
                pace._ended = ended
                clock.now += 1.0
                pace.look()
            assert room(Mode.RETRYING) == 8 + ahead
            assert room(Mode.SEND_ONCE) == 8
