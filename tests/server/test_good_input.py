"""What stands just within the limits of the contract is taken."""

from __future__ import annotations

import pytest

from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import message_pb2
from tests.gateway import Gateway, enqueue
from tests.server.answers import refusal_of
from tests.server.test_bad_input import (
    GOOD,
    MIB,
    ahead,
    file,
    header,
    mailbox,
    options,
    pb_reason,
    retry,
    seconds,
    too_large,
    with_unknown,
)

LIMITS: dict[str, pb.EnqueueRequest] = {
    "a request_id of 255": enqueue(request_id="é" * 255),
    "a subject of 998": enqueue(subject="é" * 998),
    "a text of 2 MiB": enqueue(text="é" * MIB),
    "a text with tabs and line breaks": enqueue(text="a\tb\r\nc\n\x0b"),
    "html alone": enqueue(text="", html="<p>A word."),
    "a name of 256": enqueue(sender=mailbox(name="é" * 256)),
    "a name with directions of its own": enqueue(sender=mailbox(name="\u200fעדה")),
    "100 recipients": enqueue(*(f"a{n}@example.test" for n in range(100))),
    "10 reply_to": enqueue(reply_to=[mailbox()] * 10),
    "50 headers": enqueue(headers=[message_pb2.Header(name="X-" + "A" * 74, value="é" * 998)] * 50),
    "an empty header": enqueue(**header("X-A", "")),
    "50 attachments": enqueue(attachments=[message_pb2.Attachment(filename="é" * 255)] * 50),
    "an inline file": enqueue(**file(content_type="image/png", content_id="a@b", data=b"\0\xff")),
    "10 tags of 64": enqueue(tags=["é" * 64] * 10),
    "10 categories": enqueue(categories=["receipts", "newsletter"] * 5),
    "flags of all bits": enqueue(flags=2**31 - 2),
    "32 arguments": enqueue(custom_args={f"{n:02}" + "k" * 200: "v" * 54 for n in range(32)}),
    "an empty argument": enqueue(custom_args={"k": ""}),
    "a correlation_id of 256": enqueue(correlation_id="é" * 256),
    "send_at in 30 days": enqueue(edit=options(send_at=ahead(days=30, minutes=-1))),
    "send_at in the past": enqueue(edit=options(send_at=ahead(days=-400_000))),
    "expire_at in 60 days": enqueue(edit=options(expire_at=ahead(days=60, minutes=-1))),
    "every kind of retry": enqueue(
        edit=retry(
            max_attempts=100,
            initial_backoff=seconds(1),
            max_backoff=seconds(86400),
            multiplier=10,
        )
    ),
    "a dedupe_window of a day": enqueue(edit=options(dedupe_window=seconds(86400))),
    "urgent and at most once": enqueue(edit=options(mode=2, priority=40)),
}


@pytest.mark.parametrize("request_", LIMITS.values(), ids=LIMITS.keys())
async def test_what_is_within_the_limits_is_taken_and_given_back(
    server_only: Gateway, request_: pb.EnqueueRequest
) -> None:
    answer = await server_only.stub.Enqueue(request_)
    got = await server_only.stub.GetMessage(
        pb.GetMessageRequest(message_id=answer.message_id, view=pb.MESSAGE_VIEW_FULL)
    )
    for attachment in got.message.attachments:
        if not any(a.content_type for a in request_.message.attachments):
            attachment.ClearField("content_type")  # guessed where it was not given
    assert got.message == request_.message
    assert got.options == request_.options
    assert got.status.request_id == request_.request_id


async def test_an_unknown_field_of_one_item_does_not_stop_the_others(server_only: Gateway) -> None:
    bad = with_unknown(enqueue(), lambda r: r.message)
    answer = await server_only.stub.EnqueueBatch(pb.EnqueueBatchRequest(requests=[bad, GOOD]))
    refused, taken = answer.results
    assert pb_reason(refused.error.reason) == "UNKNOWN_FIELD"
    assert refused.error.violations[0].field == "message.127"
    assert taken.response.message_id


GOOD_ADDRESSES = {
    "ada@bücher.example": "ada@xn--bcher-kva.example",
    "Ada@BÜCHER.example": "ada@xn--bcher-kva.example",
    "ada@xn--bcher-kva.example": "ada@xn--bcher-kva.example",
    "дарья@почта.рф": "дарья@xn--80a1acny.xn--p1ai",
    "ada+tag@example.org": "ada+tag@example.org",
    "o'neil@example.org": "o'neil@example.org",
    "ada@example.test": "ada@example.test",
    "ada@mail.latest": "ada@mail.latest",
}


@pytest.mark.parametrize("written", GOOD_ADDRESSES)
async def test_a_good_address_is_taken_however_it_is_written(
    server_only: Gateway, written: str
) -> None:
    answer = await server_only.stub.Enqueue(enqueue(written))
    status = await server_only.status(answer.message_id)
    assert status.deliveries[0].recipient == GOOD_ADDRESSES[written]


async def test_details_of_the_longest_texts_still_fit_in_the_trailers(server_only: Gateway) -> None:
    request_id = "\U0001f4e7" * 255
    await server_only.stub.Enqueue(enqueue(request_id=request_id))
    refusal = await refusal_of(
        server_only.stub.Enqueue(enqueue(request_id=request_id, subject="Another"))
    )
    assert refusal.reason == "REQUEST_ID_MISMATCH"
    assert refusal.size < 4096


async def test_just_10_mib_are_taken(server_only: Gateway) -> None:
    request = too_large(10 * MIB)
    data = request.message.attachments[0]
    data.data = data.data[: len(data.data) - (request.ByteSize() - 10 * MIB)]
    assert request.ByteSize() == 10 * MIB
    assert (await server_only.stub.Enqueue(request)).message_id
