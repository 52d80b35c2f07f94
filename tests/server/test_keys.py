"""With API keys, the key decides the project, and other projects do not exist for the caller."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from mailgrpc.config import Settings
from mailgrpc.db.projects import create_key
from mailgrpc.v1 import delivery_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.gateway import Gateway, enqueue
from tests.server.answers import refusal_of

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture
async def guarded(settings: Settings) -> AsyncIterator[Gateway]:
    """A server that asks for keys."""
    async with Gateway(replace(settings, auth="keys"), worker=False) as running:
        yield running


class Caller:
    """Calls with a key of its own project."""

    def __init__(self, gateway: Gateway, key: str) -> None:
        self._stub = gateway.stub
        self._metadata = (("authorization", f"Bearer {key}"),)

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._stub, method)
        return lambda request: call(request, metadata=self._metadata)


@pytest.fixture
async def shop(guarded: Gateway) -> Caller:
    return Caller(guarded, await create_key(guarded.database, "shop", "shop-1"))


@pytest.fixture
async def blog(guarded: Gateway) -> Caller:
    return Caller(guarded, await create_key(guarded.database, "blog", "blog-1"))


@pytest.mark.parametrize("method", ["Enqueue", "WatchStatus"])
@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        (None, "KEY_MISSING"),
        ("", "KEY_MISSING"),
        ("Bearer mg_unknown", "KEY_INVALID"),
        ("Bearer", "KEY_INVALID"),
        ("Basic {key}", "KEY_INVALID"),
        ("{key}", "KEY_INVALID"),
    ],
)
async def test_a_call_without_a_good_key_is_refused(
    guarded: Gateway, method: str, shown: str | None, reason: str
) -> None:
    key = await create_key(guarded.database, "shop", "shop-1")
    await Caller(guarded, key).Enqueue(enqueue())  # the server knows the key by now
    metadata = [] if shown is None else [("authorization", shown.format(key=key))]
    call = getattr(guarded.stub, method)(
        enqueue() if method == "Enqueue" else pb.WatchStatusRequest(), metadata=metadata
    )
    refusal = await refusal_of(call if method == "Enqueue" else call.read())
    assert (refusal.code, refusal.reason) == (UNAUTHENTICATED, reason)


async def test_a_revoked_key_is_refused(guarded: Gateway, shop: Caller) -> None:
    await guarded.database.write("UPDATE api_keys SET revoked_at = now()")
    assert (await refusal_of(shop.Enqueue(enqueue()))).reason == "KEY_INVALID"


async def test_a_key_is_stored_as_a_hash_alone(guarded: Gateway) -> None:
    key = await create_key(guarded.database, "shop", "shop-1")
    [row] = await guarded.database.fetch("SELECT * FROM api_keys")
    assert key.encode() not in bytes(row["key_hash"])
    assert key not in str(dict(row))


async def test_another_projects_message_is_not_found(shop: Caller, blog: Caller) -> None:
    mine = await shop.Enqueue(enqueue(request_id="r"))
    for call in (
        blog.GetStatus(pb.GetStatusRequest(message_id=mine.message_id)),
        blog.GetStatus(pb.GetStatusRequest(request_id="r")),
        blog.GetMessage(pb.GetMessageRequest(message_id=mine.message_id)),
        blog.Resend(pb.ResendRequest(message_id=mine.message_id)),
    ):
        assert (await refusal_of(call)).reason == "MESSAGE_NOT_FOUND"
    assert (await shop.GetStatus(pb.GetStatusRequest(request_id="r"))).status.message_id


async def test_projects_share_no_request_ids_preferences_and_duplicates(
    shop: Caller, blog: Caller
) -> None:
    def within_an_hour(request: Any) -> None:
        request.options.dedupe_window.FromSeconds(3600)

    await shop.UpdatePrefs(pb.UpdatePrefsRequest(address="ada@example.test", blocked_flags=2))
    found = await blog.GetPrefs(pb.GetPrefsRequest(address="ada@example.test"))
    assert found.prefs.accepts_all
    first = await shop.Enqueue(enqueue(request_id="r", edit=within_an_hour))
    second = await blog.Enqueue(enqueue(request_id="r", flags=2, edit=within_an_hour))
    assert not second.replayed
    assert not second.not_queued
    assert first.message_id != second.message_id


async def test_clear_stays_within_the_project(shop: Caller, blog: Caller) -> None:
    mine = await shop.Enqueue(enqueue())
    what = delivery_pb2.MessageFilter(message_ids=[mine.message_id])
    what.created_before.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    assert (await blog.Clear(pb.ClearRequest(filter=what, force=True))).cleared_count == 0
    assert (await shop.Clear(pb.ClearRequest(filter=what, force=True))).cleared_count == 1


async def test_events_and_tokens_stay_within_the_project(shop: Caller, blog: Caller) -> None:
    before = (await blog.ListEvents(pb.ListEventsRequest())).resume_token
    mine = await shop.Enqueue(enqueue())
    theirs = await blog.Enqueue(enqueue())
    request = pb.ListEventsRequest(resume_token=before)
    request.wait.FromSeconds(5)
    events = (await blog.ListEvents(request)).events
    assert [e.message_id for e in events] == [theirs.message_id]
    for call in (
        blog.ListEvents(pb.ListEventsRequest(resume_token=mine.resume_token)),
        blog.WatchStatus(pb.WatchStatusRequest(resume_token=mine.resume_token)).read(),
    ):
        assert (await refusal_of(call)).reason == "INVALID_TOKEN"


async def test_an_event_names_the_key_that_asked(shop: Caller) -> None:
    mine = await shop.Enqueue(enqueue())
    what = delivery_pb2.MessageFilter()
    what.created_before.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    await shop.Clear(pb.ClearRequest(filter=what, force=True))
    request = pb.ListEventsRequest(resume_token=mine.resume_token)
    request.wait.FromSeconds(5)
    events = (await shop.ListEvents(request)).events
    assert events[-1].actor == "shop-1"
