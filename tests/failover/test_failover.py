"""PostgreSQL fails over under load, and nothing of ours is restarted."""

from __future__ import annotations

import asyncio
import email
from collections import Counter
from pathlib import Path
from typing import Any

from mailgrpc.db.engine import Database
from mailgrpc.v1 import delivery_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.failover.pair import ReplicatedPair
from tests.failover.programs import PATIENCE_S, Load, Watcher, installation
from tests.feed.reading import all_after, faults, table
from tests.feed.test_tokens import is_expired
from tests.gateway import enqueue
from tests.providers.smtp_peer import SmtpPeer
from tests.server.answers import read_refusal, refusal_of


async def sent(stub: Any, **wanted: str) -> Any:
    """The status of a message once it has ended, which is to be SENT."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            status = (await stub.GetStatus(pb.GetStatusRequest(**wanted))).status
            if status.ended:
                break
            await asyncio.sleep(0.05)
    assert status.state == delivery_pb2.DELIVERY_STATE_SENT, status
    return status


async def history(pair: ReplicatedPair) -> list[Any]:
    database = Database(pair.url, pool_size=1)
    try:
        return await table(database)
    finally:
        await database.close()


async def test_with_a_synchronous_standby_nothing_is_lost_and_nothing_told_twice(
    pair: ReplicatedPair, redis_url: str, tmp_path: Path
) -> None:
    await asyncio.to_thread(pair.replicate_synchronously)
    async with SmtpPeer() as peer:
        channel = f"smtp://127.0.0.1:{peer.port}?tls=none"
        async with installation(tmp_path, pair.url, redis_url, channel) as stub:
            watcher = Watcher(stub)
            await watcher.until_begun()
            load = Load(stub, callers=8)
            await load.until(150)
            await asyncio.to_thread(pair.fail_over)
            await load.until(len(load.acknowledged) + 150)
            await load.stop()

            for request_id, message_id in load.acknowledged.items():
                status = await sent(stub, request_id=request_id)
                assert status.message_id == message_id
            happened = await history(pair)
            await watcher.until(caught_up_at=len(happened))
            await watcher.stop()
            assert faults(watcher.events, happened) == []
    mails = Counter(email.message_from_bytes(m.content)["Subject"] for m in peer.taken)
    assert mails.keys() == load.acknowledged.keys()
    assert {mails[s] for s in mails if s.startswith("once")} == {1}


async def test_without_the_last_commits_only_tokens_behind_them_have_expired(
    pair: ReplicatedPair, redis_url: str, tmp_path: Path
) -> None:
    async with installation(tmp_path, pair.url, redis_url, "capture:") as stub:
        watcher = Watcher(stub)
        await watcher.until_begun()
        kept = await stub.Enqueue(enqueue(request_id="kept"))
        await sent(stub, message_id=kept.message_id)
        await watcher.until(caught_up_at=3)
        before = watcher.token
        await asyncio.to_thread(pair.catch_up)

        await asyncio.to_thread(pair.cut)
        lost = await stub.Enqueue(enqueue(request_id="lost"))
        await sent(stub, message_id=lost.message_id)
        await watcher.until(caught_up_at=6)
        after = watcher.token
        await asyncio.to_thread(pair.fail_over)

        # The stream that lived through it, and its token at the server that did.
        assert is_expired(read_refusal(await watcher.until_ended()))
        listed = stub.ListEvents(pb.ListEventsRequest(resume_token=after))
        assert is_expired(await refusal_of(listed))
        assert await all_after(stub, before) == []

        again = await stub.Enqueue(enqueue(request_id="lost"), timeout=PATIENCE_S)
        assert not again.replayed
        await sent(stub, message_id=again.message_id)
        assert (await sent(stub, request_id="kept")).message_id == kept.message_id
        rest = await all_after(stub, before)
        assert faults(watcher.events[:3] + rest, await history(pair)) == []
