"""The wire: what a provider does to the task that asks it is the matter of one call."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mailgrpc.core.delivery import Cause, Mode, Outcome, Result, State
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


class Eager(CaptureProvider):
    """Asks at each call for the one behind it; `answers` are given first, and `hold` holds calls up."""

    def __init__(self, *answers: Result) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self._answers = list(answers)

    async def send(self, call: SendCall) -> list[Result]:
        following = call.following()
        assert call.following() is None, "one is enough"
        self.asked.append((_to(call), _to(following) if following else ""))
        await self.hold.wait()
        if self._answers:
            return [self._answers.pop(0)] * len(call.addressees)
        return await super().send(call)


def _to(call: SendCall) -> str:
    return call.addressees[0].recipient.address.partition("@")[0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        pytest.param(Mode.RETRYING, [("a0", "a1"), ("a1", "a2"), ("a2", "")], id="RETRYING"),
        pytest.param(Mode.SEND_ONCE, [("a0", ""), ("a1", ""), ("a2", "")], id="SEND_ONCE"),
    ],
)
async def test_a_call_that_was_asked_for_comes_next_and_none_behind_a_send_once(
    db: Database, store: Store, clock: Clock, mode: Mode, expected: list[tuple[str, str]]
) -> None:
    await store.put_many([[f"a{n}@example.com"] for n in range(3)], mode=mode)
    async with Part(db, clock, provider := Eager(), concurrency=1) as part:
        await part.work()
    assert provider.asked == expected


async def test_a_call_that_was_begun_is_made_though_the_channel_pauses_meanwhile(
    db: Database, store: Store, clock: Clock
) -> None:
    refused = Result(Outcome.DEFERRED, Cause.CONNECTION, text="refused", of_channel=True)
    messages = await store.put_many([[f"a{n}@example.com"] for n in range(3)])
    async with Part(db, clock, provider := Eager(refused), concurrency=1) as part:
        await part.work()
        assert provider.asked[:2] == [("a0", "a1"), ("a1", "")]
        assert await store.state(messages[0]) is State.DEFERRED
        assert await store.state(messages[1]) is State.SENT


async def test_a_call_that_was_begun_and_is_abandoned_was_not_sent(
    db: Database, store: Store, clock: Clock
) -> None:
    """The one under way is in doubt, which the reaper says; the one behind it is not."""
    messages = await store.put_many([[f"a{n}@example.com"] for n in range(3)])
    async with Part(db, clock, provider := Eager(), concurrency=1) as part:
        provider.hold.clear()
        drained = asyncio.create_task(part.drain.drain_once())
        while not provider.asked:
            await asyncio.sleep(0.001)
        await drained
        await part.drain.abandon()
        await part.recorder.drain()
        states = [await store.state(message) for message in messages]
        assert states == [State.SENDING, State.DEFERRED, State.DEFERRED]
        for message in messages[1:]:
            delivery = await store.delivery(message)
            assert delivery.last_result is not None
            assert delivery.last_result.cause is Cause.WORKER_LOST
            assert not delivery.possibly_sent
        assert part.drain._wire.calls == 0


async def test_what_was_begun_before_a_pause_tells_nothing_of_what_came_after(
    db: Database, store: Store, clock: Clock
) -> None:
    """Else each slot's second call would be a probe that failed, and double the pause."""
    refused = Result(Outcome.DEFERRED, Cause.CONNECTION, text="refused", of_channel=True)
    silent = Result(Outcome.UNKNOWN, Cause.TIMEOUT)
    await store.put_many([[f"a{n}@example.com"] for n in range(8)])
    answers = [silent] * 4 + [refused] * 4
    async with Part(db, clock, provider := Eager(*answers), concurrency=4) as part:
        provider.hold.clear()
        drained = asyncio.create_task(part.drain.drain_once())
        while len(provider.asked) < 4:
            await asyncio.sleep(0.001)
        part.drain.breaker.note(refused, part.drain.breaker.now())
        provider.hold.set()
        await drained
        await part.recorded()
        assert len(provider.asked) == 8
        assert part.drain.breaker._pauses == 1


async def test_a_send_once_is_not_taken_from_the_slot_that_it_was_started_for(
    db: Database, store: Store, clock: Clock
) -> None:
    await store.put("once@example.com", mode=Mode.SEND_ONCE)
    await store.put("a0@example.com")
    async with Part(db, clock, provider := Eager(), concurrency=1) as part:
        await part.work()
    assert sorted(provider.asked) == [("a0", ""), ("once", "")]


async def test_a_call_is_not_taken_from_a_slot_that_is_coming_for_it(
    db: Database, store: Store, clock: Clock
) -> None:
    await store.put_many([[f"a{n}@example.com"] for n in range(3)])
    async with Part(db, clock, provider := Eager(), concurrency=3) as part:
        await part.work()
    assert sorted(provider.asked) == [("a0", ""), ("a1", ""), ("a2", "")]


class Stuck(Eager):
    """The call to a0 asks for the one behind it, and gets no answer until `free`."""

    def __init__(self, *answers: Result) -> None:
        super().__init__(*answers)
        self.free = asyncio.Event()

    async def send(self, call: SendCall) -> list[Result]:
        if _to(call) != "a0":
            return await super().send(call)
        following = call.following()
        self.asked.append(("a0", _to(following) if following else ""))
        await self.free.wait()
        return await CaptureProvider.send(self, call)


@pytest.mark.parametrize(
    ("pauses", "made"),
    [
        pytest.param(False, ["a1", "a2", "a3"], id="as usual"),
        # It is under way, and the provider may keep a connection for it.
        pytest.param(True, ["a1"], id="though the channel pauses meanwhile"),
    ],
)
async def test_a_call_behind_one_that_takes_long_is_made_by_another_slot(
    db: Database,
    store: Store,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    pauses: bool,
    made: list[str],
) -> None:
    monkeypatch.setattr(wire, "_BOUND_S", 0.01)
    refused = Result(Outcome.DEFERRED, Cause.CONNECTION, text="refused", of_channel=True)
    answers = [refused] if pauses else []
    messages = await store.put_many([[f"a{n}@example.com"] for n in range(4)])
    async with Part(db, clock, provider := Stuck(*answers), concurrency=1) as part:
        drained = asyncio.create_task(part.drain.drain_once())
        while not provider.asked:
            await asyncio.sleep(0.001)
        assert provider.asked == [("a0", "a1")]
        if pauses:
            part.drain.breaker.note(refused, part.drain.breaker.now())
        part.drain._wire._concurrency = 2  # another slot gets free while the first is stuck
        while await store.state(messages[3]) not in (State.SENT, State.DEFERRED):
            await asyncio.sleep(0.01)
        assert await store.state(messages[0]) is State.SENDING
        provider.free.set()
        await drained
        await part.recorded()
        assert [to for to, _ in provider.asked] == ["a0", *made]
        assert part.outbox[-1].startswith("a0")
        assert part.drain._wire.calls == 0
