"""A synchronous standby that is cut off: what only the primary has is told to nobody as done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest

from mailgrpc.config import HostPort, Settings
from mailgrpc.db.engine import AmbiguousCommit, Database
from mailgrpc.errors import StoreUnavailable
from mailgrpc.server import intake as intake_module
from tests.failover.pair import ReplicatedPair, until
from tests.gateway import Gateway, enqueue
from tests.server.answers import refusal_of

_WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@pytest.fixture
def cut_off(pair: ReplicatedPair) -> ReplicatedPair:
    pair.replicate_synchronously()
    pair.cut()
    return pair


@contextlib.asynccontextmanager
async def server(pair: ReplicatedPair, redis_url: str) -> AsyncIterator[Gateway]:
    settings = Settings(
        listen=HostPort("127.0.0.1", 0),
        database_url=pair.url,
        redis_url=redis_url,
        channels={"default": "capture:"},
    )
    async with Gateway(replace(settings), worker=False) as running:
        yield running


async def test_a_wait_that_is_cut_short_is_in_doubt(cut_off: ReplicatedPair) -> None:
    database = Database(cut_off.url, pool_size=1)
    write = asyncio.ensure_future(
        database.write(
            "INSERT INTO workers (id, name, channels) VALUES ((random() * 1e15)::bigint, 'x', '{}') RETURNING id"
        )
    )
    await asyncio.to_thread(until, lambda: bool(cut_off.first.run(_WAITING)))
    cut_off_waits = f"SELECT pg_cancel_backend(pid) FROM ({_WAITING}) AS w"
    await asyncio.to_thread(cut_off.first.run, cut_off_waits)
    with pytest.raises(AmbiguousCommit):
        await write

    # Whoever asks again finds it done, and is told so only when the standby has it.
    again = asyncio.ensure_future(
        database.write("UPDATE workers SET name = 'y' WHERE name = 'nobody'")
    )
    await asyncio.to_thread(until, lambda: bool(cut_off.first.run(_WAITING)))
    assert not again.done()
    await asyncio.to_thread(cut_off.mend)
    assert await again == []
    await database.close()


async def test_enqueue_is_acknowledged_when_the_standby_has_it_and_not_before(
    cut_off: ReplicatedPair, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "FLUSH_TIMEOUT_S", 0.4)
    request = enqueue(request_id="r")
    async with server(cut_off, redis_url) as one, server(cut_off, redis_url) as other:
        for gateway in (one, other):
            refusal = await refusal_of(gateway.stub.Enqueue(request, timeout=3))
            assert refusal.code is grpc.StatusCode.UNAVAILABLE
            assert refusal.reason == "STORE_UNAVAILABLE"
        stored = await asyncio.to_thread(
            cut_off.first.value, "SELECT count(*) FROM mailgrpc.messages"
        )
        assert stored == 1  # visible where it was written
        await asyncio.to_thread(cut_off.mend)
        answer = await other.stub.Enqueue(request, timeout=10)
        await asyncio.to_thread(cut_off.fail_over)
        assert (await one.stub.Enqueue(request, timeout=10)).message_id == answer.message_id


async def test_waits_that_we_give_up_leave_no_session_behind(cut_off: ReplicatedPair) -> None:
    database = Database(cut_off.url, pool_size=2).with_patience(0.2)
    insert = (
        "INSERT INTO workers (id, name, channels) VALUES ((random() * 1e15)::bigint, 'x', '{}')"
    )
    for _ in range(5):
        with pytest.raises(StoreUnavailable):
            await database.write(insert)
    waiting = await asyncio.to_thread(cut_off.first.run, _WAITING)
    assert len(waiting) <= 1
    await database.close()
