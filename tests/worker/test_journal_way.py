"""A result's way over the journal: what a worker knew is known to those after it."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from mailgrpc.config import Settings
from mailgrpc.core.delivery import Mode, Result, State
from mailgrpc.db.engine import Database
from mailgrpc.errors import StoreUnavailable
from mailgrpc.providers.capture import CaptureProvider
from mailgrpc.providers.provider import SendCall
from mailgrpc.worker.journal import Journal
from mailgrpc.worker.journal_file import DiskFile, SlotFile
from mailgrpc.worker.runtime import Worker
from tests.gateway import until
from tests.worker.rig import Clock, Gate, LossyDatabase, Part, Store, outlive_lease


async def _sent_and_unrecorded(
    part: Part, lossy: LossyDatabase, provider: Gate, calls: int
) -> None:
    """The provider has taken the mail, and PostgreSQL is away before anybody could say so."""
    draining = asyncio.create_task(part.drain.drain_once())
    await until(lambda: len(provider.held) == calls)
    lossy.away = True
    provider.open()
    await until(lambda: len(part.recorder) == calls)
    await part.journal.synced()
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)


async def _kill(part: Part) -> None:
    """As SIGKILL: no word to anybody, and the lock on the journal goes."""
    await part.drain.abandon()
    await part.recorder.close()
    assert part.session._task is not None
    part.session._task.cancel()
    assert part.journal._file is not None
    part.journal._file._file.close()


@pytest.mark.parametrize("mode", list(Mode))
async def test_what_a_killed_worker_had_written_down_is_recorded_and_not_sent_again(
    lossy: LossyDatabase, store: Store, clock: Clock, tmp_path: Path, mode: Mode
) -> None:
    messages = await store.put_many([[f"a{n}@example.com"] for n in range(5)], mode=mode)
    provider = Gate()
    killed = Part(lossy, clock, provider, journal=Journal(tmp_path, slots=64))
    await killed.__aenter__()
    await _sent_and_unrecorded(killed, lossy, provider, 5)
    await _kill(killed)

    lossy.away = False
    async with Part(lossy, clock, journal=Journal(tmp_path, slots=64)) as next_one:
        await next_one.recorder.flushed()
        assert {await store.state(m) for m in messages} == {State.SENT}
        await outlive_lease(next_one.reaper, clock)
    async with Part(lossy, clock) as last_one:
        await last_one.work()
        assert last_one.outbox == []
    for message in messages:
        delivery = await store.delivery(message)
        assert (delivery.state, delivery.possibly_sent) == (State.SENT, False)


async def test_a_neighbour_adopts_what_is_left_before_it_calls_anything_lost(
    lossy: LossyDatabase, store: Store, clock: Clock, tmp_path: Path
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    provider = Gate()
    killed = Part(lossy, clock, provider, journal=Journal(tmp_path, slots=64))
    async with Part(lossy, clock, journal=Journal(tmp_path, slots=64)) as neighbour:
        await killed.__aenter__()
        assert await neighbour.journal.adopt() == []  # it is held
        await _sent_and_unrecorded(killed, lossy, provider, 1)
        await _kill(killed)
        lossy.away = False
        neighbour.recorder.take_over(await neighbour.journal.adopt())
        await neighbour.recorder.flushed()
        await outlive_lease(neighbour.reaper, clock)
    assert await store.state(message) is State.SENT
    assert not list(tmp_path.glob("*.journal"))


async def test_after_an_outage_results_are_recorded_before_anything_is_claimed(
    lossy: LossyDatabase, store: Store, clock: Clock
) -> None:
    provider = Gate()
    await store.put_many([["a@example.com"]], mode=Mode.SEND_ONCE)
    async with Part(lossy, clock, provider, concurrency=1) as part:
        await _sent_and_unrecorded(part, lossy, provider, 1)
        await store.put("b@example.com")
        with pytest.raises(StoreUnavailable):
            await part.drain.drain_once()
        part.drain._is_behind = True
        part.drain._claimer.lose_track()
        lossy.asked.clear()
        lossy.away = False
        await part.drain._guarded_pass()
        order = [
            name
            for sql in lossy.asked
            for name in ("begin_epoch", "record_outcomes", "claim_due")
            if name in sql
        ]
        assert order[:3] == ["begin_epoch", "record_outcomes", "claim_due"]
        await part.recorded()


async def test_nothing_is_started_that_could_not_be_written_down(
    db: Database, store: Store, clock: Clock, tmp_path: Path
) -> None:
    await store.put_many([[f"a{n}@example.com"] for n in range(12)])
    provider = Gate()
    async with Part(db, clock, provider, journal=Journal(tmp_path, slots=5)) as part:
        draining = asyncio.create_task(part.drain.drain_once())
        await until(lambda: len(provider.held) == 5)
        assert part.journal.room == 0
        assert await store.value("SELECT count(*) FROM deliveries WHERE state = 2") == 5
        provider.open()
        await draining
        await part.recorded()
        assert len(part.outbox) == 12
        assert part.journal.room == 5


async def test_with_a_journal_that_cannot_be_written_nothing_is_claimed(
    db: Database, store: Store, clock: Clock, tmp_path: Path
) -> None:
    message = await store.put()
    (tmp_path / "file").write_text("in the way")
    async with Part(db, clock, journal=Journal(tmp_path / "file")) as part:
        assert await part.drain.drain_once() is not None
        assert part.outbox == []
        assert await store.state(message) is State.QUEUED
        assert await store.value("SELECT count(*) FROM due WHERE session_id IS NOT NULL") == 0


async def test_what_another_installation_wrote_is_left_to_it(
    lossy: LossyDatabase, store: Store, clock: Clock, tmp_path: Path
) -> None:
    """Two gateways of one account, each with a database of its own, and the same directory."""
    message = await store.put()
    provider = Gate()
    killed = Part(lossy, clock, provider, journal=Journal(tmp_path, slots=8))
    await killed.__aenter__()
    await _sent_and_unrecorded(killed, lossy, provider, 1)
    await _kill(killed)
    lossy.away = False

    ours = await store.value("SELECT id FROM installation")
    await store.db.write("UPDATE installation SET id = gen_random_uuid()")
    async with Part(lossy, clock, journal=Journal(tmp_path, slots=8)) as stranger:
        assert await stranger.journal.adopt() == []
        await stranger.recorder.drain()
    assert await store.state(message) is State.SENDING
    await store.db.write("UPDATE installation SET id = $1", ours)
    async with Part(lossy, clock, journal=Journal(tmp_path, slots=8)) as again:
        await again.recorder.drain()
    assert await store.state(message) is State.SENT


async def test_a_stop_gives_its_journal_the_time_that_a_kill_gives(
    settings: Settings, lossy: LossyDatabase, store: Store, clock: Clock, tmp_path: Path
) -> None:
    """What was accepted and could not be recorded before the stop is not called unknown at once."""
    message = await store.put(mode=Mode.SEND_ONCE)
    lossy.hangs = "record_outcomes"
    settings = replace(settings, journal_dir=tmp_path)
    capture = CaptureProvider()
    worker = Worker(settings, lossy, channels={"default": capture})
    await worker.start()
    await until(lambda: len(capture.outbox) == 1)
    await worker.stop(0.5)
    # Another machine's worker looks.
    async with Part(store.db, clock) as other:
        await other.reaper.reap()
        assert await store.state(message) is State.SENDING
    # And the process is back, with its journal.
    lossy.hangs = ""
    async with Part(lossy, clock, journal=Journal(tmp_path)) as again:
        await again.recorder.drain()
        assert await store.state(message) is State.SENT


async def test_a_file_from_before_installations_is_ours_once_we_took_it(
    lossy: LossyDatabase, store: Store, clock: Clock, tmp_path: Path
) -> None:
    SlotFile.create(tmp_path, ".journal", 8, DiskFile).let_go()
    await store.put(mode=Mode.SEND_ONCE)
    provider = Gate()
    killed = Part(lossy, clock, provider, journal=Journal(tmp_path, slots=8))
    await killed.__aenter__()
    await _sent_and_unrecorded(killed, lossy, provider, 1)
    await _kill(killed)
    stranger = Journal(tmp_path, slots=8)
    assert await stranger.open(uuid.uuid4()) == []
    assert await stranger.adopt() == []
    await stranger.close()


async def test_what_a_stop_left_is_settled_by_whoever_comes_after_its_lease(
    settings: Settings, lossy: LossyDatabase, store: Store, tmp_path: Path
) -> None:
    """Also by bursts alone, none of which looks on for a whole lease."""
    one, two = await store.put_many([["a@example.com"], ["b@example.com"]], mode=Mode.RETRYING)

    class Deaf(CaptureProvider):
        async def send(self, call: SendCall) -> list[Result]:
            if call.addressees[0].recipient.address.startswith("b"):
                await asyncio.sleep(3600)
            return await super().send(call)

    lossy.hangs = "record_outcomes"
    settings = replace(settings, journal_dir=tmp_path)
    deaf = Deaf()
    worker = Worker(settings, lossy, channels={"default": deaf})
    await worker.start()
    await until(lambda: len(deaf.outbox) == 1)
    await worker.stop(0.5)
    lossy.hangs = ""
    await Worker(settings, store.db, channels={"default": CaptureProvider()}).burst()
    assert await store.state(one) is State.SENT
    assert await store.state(two) is State.SENDING
    await store.db.write("UPDATE workers SET ended_at = ended_at - make_interval(secs => lease_s)")
    await Worker(settings, store.db, channels={"default": CaptureProvider()}).burst()
    assert await store.state(two) is State.DEFERRED
