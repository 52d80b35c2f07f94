"""What the demo does once everything runs.

Each line that it prints comes from an answer, an event of the stream or a file of the inbox; what
is not as it should be ends it with a reason.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from mailgrpc.cli.output import Output, Styled
from mailgrpc.cli.words import event_detail, move_cell, state_name, suppression_name
from mailgrpc.client import AsyncMailClient, AsyncWatch, MailError, compose
from mailgrpc.client.compose import duration
from mailgrpc.client.following import UNENDED
from mailgrpc.embedded.mailbox import StoredMail, list_inbox, read_mail
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import DeliveryState
from mailgrpc.v1.event_pb2 import Event, EventKind
from mailgrpc.v1.message_pb2 import RetryPolicy

CATEGORIES = {"receipts": 1, "newsletter": 2}
SHOP = "Shop <shop@example.org>"
ADA, GRACE = "ada@example.test", "grace@example.test"
REFUSED_ONCE = "temperror+1@example.test"
PATIENCE_S = 30.0
_RAW_LINES = 20
_INVOICE = b"%PDF-1.4\n" + b"1 0 obj << /Type /Catalog >> endobj\n" * 60 + b"%%EOF\n"


class Mishap(click.ClickException):
    """Something is not as it should be; the text says what."""


@dataclass(slots=True)
class Told:
    """One message of the story: how it is called there, and the states that were streamed."""

    message_id: str
    what: str
    states: list[DeliveryState.ValueType] = field(default_factory=list)

    @property
    def tag(self) -> str:
        """The part of the id that tells messages apart; the last characters never differ."""
        return self.message_id[-7:-3]

    @property
    def has_ended(self) -> bool:
        """Whether the stream has told its end."""
        return bool(self.states) and self.states[-1] not in UNENDED


async def tell_story(client: AsyncMailClient, inbox: Path, output: Output) -> str:
    """Hand over three mails, follow them, look at them; a summary. Raises Mishap."""
    change = pb.PrefsChange(block_categories=["newsletter"])
    await client.update_prefs(pb.UpdatePrefsRequest(address=GRACE, change=change))
    async with client.watch(stop_after_s=PATIENCE_S) as watch:
        events: asyncio.Queue[tuple[float, Event] | None] = asyncio.Queue()
        await _first_answer(watch)
        reading = asyncio.create_task(_read(watch, events))
        try:
            began_at = time.monotonic()
            output.line(Styled("Enqueue", "bold"))
            messages = await _enqueue(client, output)
            output.line(Styled("WatchStatus", "bold"))
            await _follow(messages, events, began_at, output)
        finally:
            reading.cancel()
    mails = await _look_into(client, inbox, messages, output)
    return await _summary(client, messages, mails)


async def _enqueue(client: AsyncMailClient, output: Output) -> list[Told]:
    """The three mails, and two attempts to hand over the first one again."""
    receipt = compose(
        sender=SHOP,
        to=f"Ada Lovelace <{ADA}>",
        subject="Your receipt",
        text="Thank you for your order. The invoice is attached.",
        attachments=[("invoice.pdf", _INVOICE)],
        categories=["receipts"],
        request_id="order-4711-receipt",
    )
    newsletter = compose(
        sender=SHOP, to=GRACE, subject="News", text="What is new.", categories=["newsletter"]
    )
    code = compose(
        sender=SHOP,
        to=REFUSED_ONCE,
        subject="Your sign-in code",
        text="123456",
        priority="URGENT",
        retry=RetryPolicy(initial_backoff=duration(1)),
    )
    plan = ((receipt, "receipt + invoice.pdf"), (newsletter, "newsletter"), (code, "sign-in code"))
    messages = []
    for request, what in plan:
        answer = await client.enqueue(request)
        told = Told(answer.message_id, what)
        messages.append(told)
        refusal = await _why_not_queued(client, request, answer)
        to = request.message.to[0].address
        output.line(f"  msg_…{told.tag}", what, to, refusal, widths=[11, 21, 26])
    await _enqueue_again(client, receipt, messages[0], output)
    return messages


async def _why_not_queued(
    client: AsyncMailClient, request: pb.EnqueueRequest, answer: pb.EnqueueResponse
) -> str:
    """`not queued: PREFERENCE (newsletter)`; empty where it was queued."""
    if not answer.not_queued:
        return ""
    [delivery] = answer.not_queued
    reason = suppression_name(delivery.suppression_reason)
    prefs = (await client.get_prefs(pb.GetPrefsRequest(address=delivery.recipient))).prefs
    refused = sorted(set(prefs.blocked_categories) & set(request.message.categories))
    return f"not queued: {reason} ({', '.join(refused)})"


async def _enqueue_again(
    client: AsyncMailClient, receipt: pb.EnqueueRequest, first: Told, output: Output
) -> None:
    again = await client.enqueue(receipt)
    if not again.replayed or again.message_id != first.message_id:
        raise Mishap("the same request_id made a second message")
    result = f"→ msg_…{first.tag} replayed, no second mail"
    output.line("  again, same request_id", result, widths=[36])
    changed = pb.EnqueueRequest()
    changed.CopyFrom(receipt)
    changed.message.subject = "Something else"
    try:
        await client.enqueue(changed)
    except MailError as error:
        result = f"→ {error.code.name} {error.reason}"
        output.line("  same id, changed subject", result, widths=[36])
        if error.reason != "REQUEST_ID_MISMATCH":
            raise Mishap(f"a changed request was refused with {error}") from error
    else:
        raise Mishap("a changed request with the same request_id was accepted")


async def _first_answer(watch: AsyncWatch) -> None:
    """Wait until the stream stands, so that it tells all that follows."""
    async for _ in watch.updates():
        return
    raise Mishap("WatchStatus did not answer")


async def _read(watch: AsyncWatch, events: asyncio.Queue[tuple[float, Event] | None]) -> None:
    async for event in watch:
        await events.put((time.monotonic(), event))
    await events.put(None)


async def _follow(
    messages: Sequence[Told],
    events: asyncio.Queue[tuple[float, Event] | None],
    began_at: float,
    output: Output,
) -> None:
    """Show the stream until all messages have ended."""
    by_id = {message.message_id: message for message in messages}
    while not all(message.has_ended for message in messages):
        arrived = await events.get()
        if arrived is None:
            waiting = [message.what for message in messages if not message.has_ended]
            raise Mishap(f"after {PATIENCE_S:g} s there is no end of: {', '.join(waiting)}")
        arrived_at, event = arrived
        told = by_id.get(event.message_id)
        if told is None or event.kind != EventKind.EVENT_KIND_STATE_CHANGED:
            raise Mishap(f"an event that nothing asked for: {event.event_id}")
        told.states.append(event.state_changed.delivery.state)
        if event.state_changed.old_state == DeliveryState.DELIVERY_STATE_UNSPECIFIED:
            continue  # that it is new, the answer of Enqueue has shown already
        when = Styled(f"  +{arrived_at - began_at:.3f}", "dim")
        output.line(when, told.tag, move_cell(event), event_detail(event), widths=[8, 4, 19])


async def _look_into(
    client: AsyncMailClient, inbox: Path, messages: Sequence[Told], output: Output
) -> dict[str, list[StoredMail]]:
    """The mails in the inbox by message; prints the first one's bytes."""
    stored = list_inbox(inbox)
    mails: dict[str, list[StoredMail]] = {}
    for message in messages:
        answer = await client.get_message(pb.GetMessageRequest(message_id=message.message_id))
        mails[message.message_id] = [m for m in stored if m.message_id == answer.rfc_message_id]
    if len(stored) != sum(map(len, mails.values())):
        raise Mishap("the inbox has a mail that nobody handed over")
    first = messages[0]
    if not mails[first.message_id]:
        raise Mishap(f"the mail of {first.what} is not in the inbox")
    _, content = read_mail(inbox, mails[first.message_id][0].id)
    lines = content.decode("utf-8", "replace").splitlines()
    heading = f"Raw mail of {first.tag} (first {_RAW_LINES} of {len(lines)} lines)"
    output.line(Styled(heading, "bold"))
    output.text("\n".join(f"  {line}" for line in lines[:_RAW_LINES]))
    return mails


async def _summary(
    client: AsyncMailClient, messages: Sequence[Told], mails: dict[str, list[StoredMail]]
) -> str:
    """`3 messages: 2 SENT, 1 SUPPRESSED, each mailed once.`, where that is so."""
    states: Counter[str] = Counter()
    for message in messages:
        answer = await client.get_status(pb.GetStatusRequest(message_id=message.message_id))
        state = answer.status.state
        if state != message.states[-1]:
            raise Mishap(f"{message.what}: GetStatus and WatchStatus tell different states")
        states[state_name(state)] += 1
        expected = 0 if state == DeliveryState.DELIVERY_STATE_SUPPRESSED else 1
        found = len(mails[message.message_id])
        if found != expected:
            raise Mishap(f"{message.what} was mailed {found} times instead of {expected}")
    if states != {"SENT": 2, "SUPPRESSED": 1}:
        raise Mishap(f"2 SENT and 1 SUPPRESSED were expected, not {dict(states)}")
    counts = ", ".join(f"{count} {name}" for name, count in states.most_common())
    return f"{len(messages)} messages: {counts}, each mailed once."
