"""What a flush writes: each message whole, where it belongs, and what was told lately not again."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mailgrpc.core.delivery import State, SuppressionReason
from mailgrpc.core.fingerprint import fingerprint
from mailgrpc.core.ids import delivery_id, new_message_id
from mailgrpc.core.message import (
    Attachment,
    DeliveryOptions,
    Mailbox,
    MailMessage,
    Recipient,
    Submission,
)
from mailgrpc.core.shape import checked_submission
from mailgrpc.db.engine import Database
from mailgrpc.db.messages import (
    NewMessage,
    insert_messages,
    read_contents,
    read_known_requests,
    read_statuses,
)
from mailgrpc.db.preferences import replace_preference

HOUR = timedelta(hours=1)
NOW = datetime.now(UTC)


def new(
    *to: str,
    request_id: str = "",
    project_id: int = 1,
    flags: int = 0,
    send_at: datetime | None = None,
    dedupe_window: timedelta | None = None,
    **fields: Any,
) -> NewMessage:
    """A checked message to these recipients."""
    submission = checked_submission(
        Submission(
            MailMessage(
                sender=Mailbox("shop@example.test"),
                recipients=tuple(Recipient(a) for a in to or ("ada@example.test",)),
                subject="Hello",
                **{"text": "A word.", **fields},
            ),
            DeliveryOptions(send_at=send_at, dedupe_window=dedupe_window),
            request_id,
        )
    )
    return NewMessage(
        message_id=new_message_id(),
        project_id=project_id,
        submission=submission,
        fingerprint=fingerprint(submission),
        flags=flags,
        channel="default",
        expire_at=NOW + timedelta(days=40),
    )


async def rows(db: Database, table: str) -> int:
    [(count,)] = await db.fetch(f"SELECT count(*) FROM {table}")
    return count


async def only_delivery(db: Database, message: NewMessage) -> Any:
    statuses = await read_statuses(db, message.project_id, [message.message_id])
    [delivery] = statuses[message.message_id].deliveries
    return delivery


async def test_a_message_is_stored_whole(db: Database) -> None:
    message = new(
        "Ada@example.test",
        "bob@example.test",
        request_id="r",
        tags=("a", "é"),
        custom_args={"k": "v"},
        attachments=(Attachment("a.bin", b"\0\xff"), Attachment("b.bin", b"2")),
    )
    inserted = await insert_messages(db, 0, [message])
    assert not inserted.known
    assert not inserted.with_suppressed
    contents = await read_contents(db, [message.message_id], with_files=True)
    assert contents[message.message_id].message == message.submission.message
    assert contents[message.message_id].options == message.submission.options
    found = await read_known_requests(db, [(1, "r")])
    assert found[1, "r"].message_id == message.message_id
    ids = [delivery_id(message.message_id, n) for n in (1, 2)]
    due = await db.fetch("SELECT delivery_id FROM due ORDER BY 1")
    events = await db.fetch("SELECT * FROM events ORDER BY seq")
    assert [r["delivery_id"] for r in due] == [r["delivery_id"] for r in events] == ids
    assert {(r["old_state"], r["state"], r["version"]) for r in events} == {(0, 1, 1)}


async def test_running_it_again_adds_nothing(db: Database) -> None:
    flush = [new(request_id="r", dedupe_window=HOUR), new("bob@example.test", dedupe_window=HOUR)]
    await insert_messages(db, 0, flush)
    again = await insert_messages(db, 1, flush)
    assert again.known == {flush[0].message_id}
    assert not again.with_suppressed
    for table in ("messages", "deliveries", "due", "events", "recent_content"):
        assert await rows(db, table) == 2


async def test_a_known_request_id_leaves_the_others_of_the_flush_alone(db: Database) -> None:
    first = new(request_id="b", attachments=(Attachment("a.bin", b"1"),))
    await insert_messages(db, 0, [first])
    flush = [
        new(request_id=r, attachments=(Attachment("a.bin", b"1"),)) for r in ("c", "b", "a", "c")
    ]
    inserted = await insert_messages(db, 0, flush)
    assert len(inserted.known) == 2
    assert flush[1].message_id in inserted.known
    assert await rows(db, "messages") == await rows(db, "attachments") == 3
    assert await rows(db, "deliveries") == await rows(db, "events") == 3
    found = await read_known_requests(db, [(1, r) for r in "abc"])
    stored = {row["id"] for row in await db.fetch("SELECT id FROM messages")}
    assert {known.message_id for known in found.values()} == stored


WHEN = {
    "without a time": (None, "due", 1),
    "in the past": (-HOUR, "due", 1),
    "within ten minutes": (timedelta(minutes=9), "due", 2),
    "later": (timedelta(minutes=11), "scheduled", 2),
}


@pytest.mark.parametrize(("ahead", "table", "wait_reason"), WHEN.values(), ids=WHEN.keys())
async def test_what_is_due_soon_is_in_due_and_the_rest_is_scheduled(
    db: Database, ahead: timedelta | None, table: str, wait_reason: int
) -> None:
    now = datetime.now(UTC)
    send_at = None if ahead is None else now + ahead
    message = new(send_at=send_at)
    await insert_messages(db, 0, [message])
    delivery = await only_delivery(db, message)
    assert (delivery.state, delivery.wait_reason) == (State.QUEUED, wait_reason)
    if send_at is not None and send_at > now:
        assert delivery.due_at == send_at
    else:
        assert abs(delivery.due_at - datetime.now(UTC)) < HOUR
    [row] = await db.fetch(f"SELECT due_at FROM {table}")
    assert row["due_at"] == delivery.due_at
    assert await rows(db, "due") + await rows(db, "scheduled") == 1


async def test_a_preference_suppresses_without_a_due_row(db: Database) -> None:
    await replace_preference(db, 1, "ada@example.test", 6)
    message = new("ada@example.test", "bob@example.test", flags=4)
    inserted = await insert_messages(db, 0, [message, other := new(flags=8)])
    assert inserted.with_suppressed == {message.message_id}
    statuses = await read_statuses(db, 1, [message.message_id, other.message_id])
    ada, bob = statuses[message.message_id].deliveries
    assert (ada.state, ada.suppression_reason) == (State.SUPPRESSED, SuppressionReason.PREFERENCE)
    assert (ada.due_at, ada.wait_reason) == (None, 0)
    assert bob.state == statuses[other.message_id].state == State.QUEUED
    assert await rows(db, "due") == 2


async def test_the_reserved_bit_of_a_mask_refuses_nothing(db: Database) -> None:
    await replace_preference(db, 1, "ada@example.test", 1)
    inserted = await insert_messages(db, 0, [new(flags=2**31 - 2)])
    assert not inserted.with_suppressed


# dedupe_window


async def test_the_same_content_within_the_window_is_told_once(db: Database) -> None:
    first, second = new(dedupe_window=HOUR), new(dedupe_window=HOUR)
    await insert_messages(db, 0, [first])
    inserted = await insert_messages(db, 0, [second])
    assert inserted.with_suppressed == {second.message_id}
    delivery = await only_delivery(db, second)
    assert delivery.suppression_reason == SuppressionReason.DUPLICATE
    assert delivery.duplicate_of == first.message_id


async def test_within_one_flush_the_first_one_wins(db: Database) -> None:
    flush = [new(dedupe_window=HOUR) for _ in range(3)]
    inserted = await insert_messages(db, 0, flush)
    assert inserted.with_suppressed == {flush[1].message_id, flush[2].message_id}
    assert (await only_delivery(db, flush[2])).duplicate_of == flush[0].message_id


OTHERS: dict[str, Callable[[], NewMessage]] = {
    "somebody else": lambda: new("bob@example.test", dedupe_window=HOUR),
    "another text": lambda: new(text="Another.", dedupe_window=HOUR),
    "another file": lambda: new(attachments=(Attachment("a.bin", b"1"),), dedupe_window=HOUR),
    "no window": new,
    "another project": lambda: new(project_id=2, dedupe_window=HOUR),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
async def test_what_is_not_the_same_is_told(db: Database, other: Callable[[], NewMessage]) -> None:
    await insert_messages(db, 0, [new(dedupe_window=HOUR)])
    assert not (await insert_messages(db, 0, [other()])).with_suppressed


async def test_tags_and_arguments_do_not_make_it_another_content(db: Database) -> None:
    await insert_messages(db, 0, [new(dedupe_window=HOUR, tags=("a",))])
    second = new(dedupe_window=HOUR, tags=("b",), custom_args={"k": "v"}, correlation_id="c")
    assert (await insert_messages(db, 0, [second])).with_suppressed


async def test_a_message_without_a_window_is_not_remembered(db: Database) -> None:
    await insert_messages(db, 0, [new()])
    assert not (await insert_messages(db, 0, [new(dedupe_window=HOUR)])).with_suppressed


async def test_the_window_is_that_of_the_newcomer(db: Database) -> None:
    first = new(dedupe_window=timedelta(hours=24))
    await insert_messages(db, 0, [first])
    await db.write("UPDATE recent_content SET accepted_at = accepted_at - interval '2 hours'")
    within = new(dedupe_window=3 * HOUR)
    assert (await insert_messages(db, 0, [within])).with_suppressed
    assert (await only_delivery(db, within)).duplicate_of == first.message_id
    beyond = new(dedupe_window=HOUR)
    assert not (await insert_messages(db, 0, [beyond])).with_suppressed
    # From now on that one is the last that was told.
    last = new(dedupe_window=HOUR)
    assert (await insert_messages(db, 0, [last])).with_suppressed
    assert (await only_delivery(db, last)).duplicate_of == beyond.message_id


async def test_a_request_that_is_a_replay_claims_no_content(db: Database) -> None:
    await insert_messages(db, 0, [new(request_id="r", text="One.", dedupe_window=HOUR)])
    await insert_messages(db, 0, [new(request_id="r", text="Two.", dedupe_window=HOUR)])
    assert await rows(db, "recent_content") == 1
    other = new(text="Two.", dedupe_window=HOUR)
    assert not (await insert_messages(db, 0, [other])).with_suppressed


async def test_what_was_refused_was_not_told_so_the_next_is_no_duplicate(db: Database) -> None:
    await replace_preference(db, 1, "ada@example.test", 4)
    refused = new(dedupe_window=HOUR, flags=4)
    assert refused.message_id in (await insert_messages(db, 0, [refused])).with_suppressed
    await replace_preference(db, 1, "ada@example.test", 1)
    told = new(dedupe_window=HOUR, flags=4)
    assert not (await insert_messages(db, 0, [told])).with_suppressed
    [delivery] = (await read_statuses(db, 1, [refused.message_id]))[refused.message_id].deliveries
    assert delivery.suppression_reason is SuppressionReason.PREFERENCE
