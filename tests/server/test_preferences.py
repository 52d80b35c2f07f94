"""What an address refuses: set, changed, read, and kept to when mail is taken in and sent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mailgrpc.core.delivery import SuppressionReason
from mailgrpc.v1 import delivery_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.db.factory import suppress
from tests.gateway import Gateway, enqueue

ADA = "ada@example.test"
RECEIPTS, NEWSLETTER = 1 << 1, 1 << 2
SUPPRESSED = delivery_pb2.DELIVERY_STATE_SUPPRESSED
PREFERENCE = delivery_pb2.SUPPRESSION_REASON_PREFERENCE


async def block(gateway: Gateway, flags: int, address: str = ADA) -> Any:
    request = pb.UpdatePrefsRequest(address=address, blocked_flags=flags)
    return (await gateway.stub.UpdatePrefs(request)).prefs


async def change(gateway: Gateway, address: str = ADA, **fields: Any) -> Any:
    request = pb.UpdatePrefsRequest(address=address, change=pb.PrefsChange(**fields))
    return (await gateway.stub.UpdatePrefs(request)).prefs


async def prefs(gateway: Gateway, address: str = ADA) -> Any:
    return (await gateway.stub.GetPrefs(pb.GetPrefsRequest(address=address))).prefs


async def test_an_address_that_nobody_set_accepts_all(server_only: Gateway) -> None:
    found = await prefs(server_only, "Nobody@Example.ORG")
    assert found == pb.Prefs(address="nobody@example.org", blocked_flags=1, accepts_all=True)


async def test_a_mask_replaces_the_one_before(server_only: Gateway) -> None:
    first = await block(server_only, RECEIPTS | 1 << 7)
    assert (first.blocked_flags, first.accepts_all) == (RECEIPTS | 1 << 7, False)
    assert list(first.blocked_categories) == ["receipts"]
    assert first.HasField("updated_at")
    second = await block(server_only, NEWSLETTER)
    assert list(second.blocked_categories) == ["newsletter"]
    assert await prefs(server_only) == second


async def test_the_mask_1_accepts_all_and_is_remembered_as_set(server_only: Gateway) -> None:
    await block(server_only, RECEIPTS)
    found = await block(server_only, 1)
    assert (found.blocked_flags, found.accepts_all) == (1, True)
    assert found.HasField("updated_at")


async def test_addresses_are_compared_normalised(server_only: Gateway) -> None:
    await block(server_only, RECEIPTS, "Ada@BÜCHER.example")
    found = await prefs(server_only, "ADA@xn--bcher-kva.example")
    assert (found.address, found.blocked_flags) == ("ada@xn--bcher-kva.example", RECEIPTS)


async def test_a_change_leaves_the_other_bits(server_only: Gateway) -> None:
    await block(server_only, RECEIPTS | 1 << 9)
    found = await change(server_only, block_categories=["newsletter"], unblock_flags=1 << 9)
    assert found.blocked_flags == RECEIPTS | NEWSLETTER
    found = await change(server_only, unblock_categories=["receipts", "newsletter"])
    assert (found.blocked_flags, found.accepts_all) == (1, True)


async def test_what_is_both_blocked_and_unblocked_is_blocked(server_only: Gateway) -> None:
    for _ in ("new", "known"):
        found = await change(server_only, block_flags=RECEIPTS, unblock_flags=RECEIPTS)
        assert found.blocked_flags == RECEIPTS


async def test_unblocking_what_is_not_blocked_accepts_all(server_only: Gateway) -> None:
    assert (await change(server_only, unblock_flags=RECEIPTS)).accepts_all


async def test_changes_at_once_never_undo_each_other(server_only: Gateway) -> None:
    await asyncio.gather(*(change(server_only, block_flags=1 << bit) for bit in range(1, 31)))
    assert (await prefs(server_only)).blocked_flags == 2**31 - 2


@pytest.mark.parametrize(
    "fields",
    [{"flags": RECEIPTS}, {"categories": ["receipts"]}, {"flags": RECEIPTS | NEWSLETTER}],
    ids=["flags", "categories", "one of two flags"],
)
async def test_refused_mail_is_not_queued_and_that_is_told(
    server_only: Gateway, fields: dict[str, Any]
) -> None:
    await block(server_only, RECEIPTS)
    answer = await server_only.stub.Enqueue(enqueue(ADA, "bob@example.test", **fields))
    [delivery] = answer.not_queued
    assert (delivery.recipient, delivery.state) == (ADA, SUPPRESSED)
    assert delivery.suppression_reason == PREFERENCE
    assert not delivery.HasField("due_at")
    assert answer.state == delivery_pb2.DELIVERY_STATE_QUEUED
    status = await server_only.status(answer.message_id)
    assert [d.state for d in status.deliveries] == [SUPPRESSED, answer.state]
    [(due,)] = await server_only.database.fetch("SELECT count(*) FROM due")
    assert due == 1


async def test_mail_of_no_kind_is_refused_by_nobody(server_only: Gateway) -> None:
    await block(server_only, 2**31 - 2)
    assert not (await server_only.stub.Enqueue(enqueue())).not_queued


async def test_a_preference_is_asked_again_before_the_start(server_only: Gateway) -> None:
    sent = await server_only.stub.Enqueue(enqueue(flags=RECEIPTS))
    assert not sent.not_queued
    await block(server_only, RECEIPTS)
    async with Gateway(server_only.settings) as with_worker:
        status = await with_worker.ended(sent.message_id)
        assert not with_worker.capture.outbox
    assert status.deliveries[0].state == SUPPRESSED
    assert status.deliveries[0].suppression_reason == PREFERENCE


@pytest.mark.parametrize("reason", [r for r in SuppressionReason if 2 <= r <= 6])
async def test_who_is_suppressed_gets_no_mail_of_any_kind(
    server_only: Gateway, reason: SuppressionReason
) -> None:
    await suppress(server_only.database, ADA, reason)
    answer = await server_only.stub.Enqueue(enqueue(ADA))
    assert answer.not_queued[0].suppression_reason == reason
    assert answer.state == SUPPRESSED


async def test_validate_only_tells_who_would_not_get_it_and_why(server_only: Gateway) -> None:
    def within_an_hour(request: Any) -> None:
        request.options.dedupe_window.FromSeconds(3600)

    await block(server_only, RECEIPTS, "ada@example.test")
    await suppress(server_only.database, "bob@example.test", SuppressionReason.MANUAL)
    told = await server_only.stub.Enqueue(enqueue("cyd@example.test", edit=within_an_hour))
    request = enqueue(
        *("Ada@example.test", "bob@example.test", "cyd@example.test", "dan@example.test"),
        flags=RECEIPTS,
        edit=within_an_hour,
    )
    request.validate_only = True
    answer = await server_only.stub.Enqueue(request)
    foreseen = {d.recipient: d for d in answer.not_queued}
    assert {address: d.suppression_reason for address, d in foreseen.items()} == {
        "ada@example.test": delivery_pb2.SUPPRESSION_REASON_PREFERENCE,
        "bob@example.test": delivery_pb2.SUPPRESSION_REASON_MANUAL,
        "cyd@example.test": delivery_pb2.SUPPRESSION_REASON_DUPLICATE,
    }
    assert foreseen["cyd@example.test"].duplicate_of_message_id == told.message_id
    assert not any(d.delivery_id or d.message_id for d in answer.not_queued)
    assert (answer.message_id, answer.resume_token, answer.state) == ("", "", 0)
    # And it is what happens.
    request.validate_only = False
    for delivery in (await server_only.stub.Enqueue(request)).not_queued:
        expected = foreseen.pop(delivery.recipient)
        assert delivery.suppression_reason == expected.suppression_reason
        assert delivery.duplicate_of_message_id == expected.duplicate_of_message_id
        assert delivery.role == expected.role
    assert not foreseen
