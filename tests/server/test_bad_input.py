"""Whatever is wrong with a request is told by status, reason and field, and nothing is stored.

One table, one runner. A case is a request that a client could send; what it must be answered with
stands beside it. Limits are those of the contract: each case is one step beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mailgrpc.core.ids import MESSAGE, new_message_id, to_text
from mailgrpc.core.place import Position, encode_token
from mailgrpc.v1 import delivery_pb2, errors_pb2, message_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.gateway import Gateway, enqueue
from tests.server.answers import Refusal, read_refusal, refusal_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNKNOWN = b"\xf8\x07\x01"  # field 127, a varint
MIB = 1024 * 1024
NOBODY = to_text(MESSAGE, new_message_id())
TOKEN = encode_token(1, {0: Position(0)})

Code = grpc.StatusCode


@dataclass(frozen=True)
class Case:
    """A request, and what it is answered with. `field` is None where no field is to blame."""

    method: str
    request: Any
    reason: str
    field: str | None = None
    code: grpc.StatusCode = Code.INVALID_ARGUMENT


def mail(
    reason: str, field: str | None, *to: str, edit: Callable[[Any], None] | None = None, **f: Any
) -> Case:
    """An Enqueue that differs from a good one by these fields of its message."""
    return Case("Enqueue", enqueue(*to, edit=edit, **f), reason, field)


def edited(reason: str, field: str, edit: Callable[[Any], None]) -> Case:
    """An Enqueue that differs from a good one by what `edit` does."""
    return Case("Enqueue", enqueue(edit=edit), reason, field)


def with_unknown(request: Any, part: Callable[[Any], Any] = lambda r: r) -> Any:
    """The request with a field that no version knows, in itself or in a part of it."""
    part(request).MergeFromString(UNKNOWN)
    return request


def ahead(**span: float) -> Timestamp:
    moment = Timestamp()
    moment.FromDatetime(datetime.now(UTC) + timedelta(**span))
    return moment


def seconds(count: float) -> Duration:
    span = Duration()
    span.FromTimedelta(timedelta(seconds=count))
    return span


def mailbox(address: str = "ada@example.test", name: str = "") -> message_pb2.Mailbox:
    return message_pb2.Mailbox(address=address, name=name)


def header(name: str, value: str = "v") -> dict[str, Any]:
    return {"headers": [message_pb2.Header(name=name, value=value)]}


def file(**fields: Any) -> dict[str, Any]:
    return {"attachments": [message_pb2.Attachment(**{"filename": "a.pdf", **fields})]}


def options(**fields: Any) -> Callable[[Any], None]:
    return lambda request: request.options.MergeFrom(message_pb2.DeliveryOptions(**fields))


def retry(**fields: Any) -> Callable[[Any], None]:
    return options(retry=message_pb2.RetryPolicy(**fields))


def given(**fields: Any) -> delivery_pb2.MessageFilter:
    return delivery_pb2.MessageFilter(**fields)


def clear(reason: str, field: str, *, max_messages: int = 0, **fields: Any) -> Case:
    """A Clear of everything older than now, but for these fields of its filter."""
    wanted = given(**{"created_before": ahead(), **fields})
    return Case("Clear", pb.ClearRequest(filter=wanted, max_messages=max_messages), reason, field)


def resend(reason: str, field: str | None, **fields: Any) -> Case:
    return Case("Resend", pb.ResendRequest(**{"message_id": NOBODY, **fields}), reason, field)


def prefs(reason: str, field: str, address: str = "ada@example.test", **fields: Any) -> Case:
    return Case("UpdatePrefs", pb.UpdatePrefsRequest(address=address, **fields), reason, field)


def change(reason: str, field: str, **fields: Any) -> Case:
    return prefs(reason, field, change=pb.PrefsChange(**fields))


def watch(reason: str, field: str, **fields: Any) -> Case:
    return Case("WatchStatus", pb.WatchStatusRequest(**fields), reason, field)


def events(reason: str, field: str, **fields: Any) -> Case:
    return Case("ListEvents", pb.ListEventsRequest(**fields), reason, field)


def not_found(method: str, request: Any) -> Case:
    return Case(method, request, "MESSAGE_NOT_FOUND", None, Code.NOT_FOUND)


MESSAGE_CASES = {
    # What has to be there.
    "no message": Case("Enqueue", pb.EnqueueRequest(), "REQUIRED", "message"),
    "no sender": edited("REQUIRED", "message.sender", lambda r: r.message.ClearField("sender")),
    "no recipient": edited("REQUIRED", "message.to", lambda r: r.message.ClearField("to")),
    "no subject": mail("REQUIRED", "message.subject", subject=""),
    "no body": mail("REQUIRED", "message.text", text=""),
    "an empty address": mail("REQUIRED", "message.to[0].address", ""),
    "an empty tag": mail("REQUIRED", "message.tags[0]", tags=[""]),
    "an empty category": mail("REQUIRED", "message.categories[0]", categories=[""]),
    "an empty argument name": mail("REQUIRED", 'message.custom_args[""]', custom_args={"": "v"}),
    "an empty header name": mail("REQUIRED", "message.headers[0].name", **header("")),
    "an empty filename": mail("REQUIRED", "message.attachments[0].filename", **file(filename="")),
    # Lengths and numbers.
    "a request_id of 256": edited(
        "TOO_LONG", "request_id", lambda r: setattr(r, "request_id", "r" * 256)
    ),
    "a subject of 999": mail("TOO_LONG", "message.subject", subject="s" * 999),
    "a text of 2 MiB and 1": mail("TOO_LONG", "message.text", text="t" * (2 * MIB + 1)),
    "a text of 2 MiB and 2 in UTF-8": mail("TOO_LONG", "message.text", text="é" * (MIB + 1)),
    "an html of 2 MiB and 1": mail("TOO_LONG", "message.html", html="h" * (2 * MIB + 1)),
    "a name of 257": mail("TOO_LONG", "message.sender.name", sender=mailbox(name="n" * 257)),
    "a correlation_id of 257": mail("TOO_LONG", "message.correlation_id", correlation_id="c" * 257),
    "a tag of 65": mail("TOO_LONG", "message.tags[1]", tags=["ok", "t" * 65]),
    "a header name of 77": mail("TOO_LONG", "message.headers[0].name", **header("X" * 77)),
    "a header value of 999": mail(
        "TOO_LONG", "message.headers[0].value", **header("X-A", "v" * 999)
    ),
    "a filename of 256": mail(
        "TOO_LONG", "message.attachments[0].filename", **file(filename="f" * 256)
    ),
    "an argument of 257": mail(
        "TOO_LONG", 'message.custom_args["k"]', custom_args={"k": "v" * 257}
    ),
    "arguments of more than 8 KiB": mail(
        "TOO_LONG", "message.custom_args", custom_args={f"k{i}": "é" * 250 for i in range(20)}
    ),
    "an address of 321 bytes": mail(
        "TOO_LONG", "message.to[0].address", f"{'a' * 301}@{'b' * 15}.org"
    ),
    "101 recipients": mail("TOO_MANY", "message.to", *(f"a{i}@example.test" for i in range(101))),
    "100 recipients and a cc": mail(
        "TOO_MANY",
        "message.to",
        *(f"a{i}@example.test" for i in range(100)),
        cc=[message_pb2.Recipient(address="b@example.test")],
    ),
    "11 reply_to": mail("TOO_MANY", "message.reply_to", reply_to=[mailbox()] * 11),
    "51 headers": mail(
        "TOO_MANY", "message.headers", headers=[message_pb2.Header(name="X-A", value="v")] * 51
    ),
    "51 attachments": mail(
        "TOO_MANY", "message.attachments", attachments=[message_pb2.Attachment(filename="a")] * 51
    ),
    "11 tags": mail("TOO_MANY", "message.tags", tags=["t"] * 11),
    "11 categories": mail("TOO_MANY", "message.categories", categories=["receipts"] * 11),
    "33 arguments": mail(
        "TOO_MANY", "message.custom_args", custom_args={f"k{i}": "v" for i in range(33)}
    ),
    # Control characters: a line break would become a header of its own.
    "a line break in the subject": mail(
        "CONTROL_CHARACTER", "message.subject", subject="Hi\r\nBcc: eve@example.org"
    ),
    "a line break in a name": mail(
        "CONTROL_CHARACTER", "message.sender.name", sender=mailbox(name="A\nB")
    ),
    "a reversed name": mail(
        "CONTROL_CHARACTER", "message.sender.name", sender=mailbox(name="A\u202eB")
    ),
    "a line break in an address": mail(
        "CONTROL_CHARACTER", "message.to[0].address", "ada@example.org\r\nDATA"
    ),
    "a line break in a reply_to": mail(
        "CONTROL_CHARACTER", "message.reply_to[0].address", reply_to=[mailbox("a@b.org\n")]
    ),
    "a line break in a header name": mail(
        "CONTROL_CHARACTER", "message.headers[0].name", **header("X-A\nX-B")
    ),
    "a line break in a header value": mail(
        "CONTROL_CHARACTER", "message.headers[0].value", **header("X-A", "1\nBcc: eve@example.org")
    ),
    "a line separator in a header value": mail(
        "CONTROL_CHARACTER", "message.headers[0].value", **header("X-A", "1\u2028")
    ),
    "a line break in a filename": mail(
        "CONTROL_CHARACTER", "message.attachments[0].filename", **file(filename="a\n.pdf")
    ),
    "a line break in a content_type": mail(
        "CONTROL_CHARACTER", "message.attachments[0].content_type", **file(content_type="a/b\n")
    ),
    "a line break in a content_id": mail(
        "CONTROL_CHARACTER", "message.attachments[0].content_id", **file(content_id="c\n")
    ),
    "a tab in a tag": mail("CONTROL_CHARACTER", "message.tags[0]", tags=["a\tb"]),
    "a control character in a category": mail(
        "CONTROL_CHARACTER", "message.categories[0]", categories=["receipts\x7f"]
    ),
    "a line break in a correlation_id": mail(
        "CONTROL_CHARACTER", "message.correlation_id", correlation_id="c\n"
    ),
    "a line break in a request_id": edited(
        "CONTROL_CHARACTER", "request_id", lambda r: setattr(r, "request_id", "r\n")
    ),
    "a line break in an argument": mail(
        "CONTROL_CHARACTER", 'message.custom_args["k"]', custom_args={"k": "v\n"}
    ),
    "a line break in an argument's name": mail(
        "CONTROL_CHARACTER", r'message.custom_args["k\n"]', custom_args={"k\n": "v"}
    ),
    "a line break in a channel": edited(
        "CONTROL_CHARACTER", "options.channel", options(channel="default\n")
    ),
    "U+0000 in the text": mail("CONTROL_CHARACTER", "message.text", text="a\0b"),
    "U+0000 in the html": mail("CONTROL_CHARACTER", "message.html", html="a\0b"),
    "U+0000 in an argument": mail(
        "CONTROL_CHARACTER", 'message.custom_args["k"]', custom_args={"k": "\0"}
    ),
    "U+0000 in a request_id": edited(
        "CONTROL_CHARACTER", "request_id", lambda r: setattr(r, "request_id", "\0")
    ),
    # Addresses.
    "no @": mail("INVALID_ADDRESS", "message.to[0].address", "ada.example.org"),
    "two @": mail("INVALID_ADDRESS", "message.to[0].address", "ada@b@example.org"),
    "a name and angle brackets": mail(
        "INVALID_ADDRESS", "message.to[0].address", "Ada <ada@example.org>"
    ),
    "a quoted local part": mail("INVALID_ADDRESS", "message.to[0].address", '"ada"@example.org'),
    "an address literal": mail("INVALID_ADDRESS", "message.to[0].address", "ada@[127.0.0.1]"),
    "a dot first": mail("INVALID_ADDRESS", "message.to[0].address", ".ada@example.org"),
    "one label": mail("INVALID_ADDRESS", "message.to[0].address", "ada@localhost"),
    "two addresses in one": mail(
        "INVALID_ADDRESS", "message.to[0].address", "ada@example.org,eve@example.org"
    ),
    "a bad sender": mail("INVALID_ADDRESS", "message.sender.address", sender=mailbox("ada")),
    "a bad reply_to": mail(
        "INVALID_ADDRESS", "message.reply_to[1].address", reply_to=[mailbox(), mailbox("ada")]
    ),
    "a broken A-label": mail("INVALID_ADDRESS", "message.to[0].address", "ada@xn--a-ecp.ru"),
    "an IDN with a bad character": mail(
        "INVALID_ADDRESS", "message.to[0].address", "ada@b\u2665.example"
    ),
    "an IDN that mixes directions": mail(
        "INVALID_ADDRESS", "message.to[0].address", "ada@1\u05d0b.example"
    ),
    "the domain test": mail("TEST_ADDRESS", "message.to[0].address", "ada@test"),
    "below the domain test": mail("TEST_ADDRESS", "message.to[0].address", "ada@Mail.TEST"),
    "a sender below test": mail(
        "TEST_ADDRESS", "message.sender.address", sender=mailbox("ada@shop.test")
    ),
    "the same recipient twice": mail(
        "DUPLICATE_RECIPIENT", "message.to[1].address", "ada@example.org", "Ada@EXAMPLE.org"
    ),
    "the same recipient in to and bcc": mail(
        "DUPLICATE_RECIPIENT",
        "message.bcc[0].address",
        "ada@example.org",
        bcc=[message_pb2.Recipient(address="ada@example.org")],
    ),
    # Flags, categories, headers, files.
    "bit 0": mail("RESERVED_FLAG", "message.flags", flags=3),
    "negative flags": mail("OUT_OF_RANGE", "message.flags", flags=-2),
    "an unknown category": mail(
        "UNKNOWN_CATEGORY", "message.categories[1]", categories=["receipts", "gossip"]
    ),
    "a header of the gateway's": mail(
        "RESERVED_HEADER", "message.headers[0].name", **header("mEssage-iD")
    ),
    "a Content- header": mail(
        "RESERVED_HEADER", "message.headers[0].name", **header("Content-Type")
    ),
    "a colon in a header name": mail("OUT_OF_RANGE", "message.headers[0].name", **header("X-A: b")),
    "a filename with a directory": mail(
        "OUT_OF_RANGE", "message.attachments[0].filename", **file(filename="../../etc/passwd")
    ),
    "a content_type with parameters": mail(
        "OUT_OF_RANGE",
        "message.attachments[0].content_type",
        **file(content_type="text/plain; charset=utf-8"),
    ),
    "a multipart file": mail(
        "OUT_OF_RANGE",
        "message.attachments[0].content_type",
        **file(content_type="multipart/mixed"),
    ),
    "the same content_id twice": mail(
        "OUT_OF_RANGE",
        "message.attachments[1].content_id",
        attachments=[message_pb2.Attachment(filename="a", content_id="c")] * 2,
    ),
}

OPTIONS_CASES = {
    "an unknown channel": edited("UNKNOWN_CHANNEL", "options.channel", options(channel="pigeon")),
    "a channel of 64": edited("TOO_LONG", "options.channel", options(channel="c" * 64)),
    "an unknown mode": edited("OUT_OF_RANGE", "options.mode", options(mode=3)),
    "an unknown priority": edited("OUT_OF_RANGE", "options.priority", options(priority=15)),
    "101 attempts": edited("OUT_OF_RANGE", "options.retry.max_attempts", retry(max_attempts=101)),
    "-1 attempts": edited("OUT_OF_RANGE", "options.retry.max_attempts", retry(max_attempts=-1)),
    "no backoff at all": edited(
        "OUT_OF_RANGE", "options.retry.initial_backoff", retry(initial_backoff=seconds(0))
    ),
    "a backoff of more than a day": edited(
        "OUT_OF_RANGE", "options.retry.max_backoff", retry(max_backoff=seconds(86401))
    ),
    "a backoff of mixed signs": edited(
        "OUT_OF_RANGE",
        "options.retry.max_backoff",
        retry(max_backoff=Duration(seconds=1, nanos=-1)),
    ),
    "a multiplier below 1": edited(
        "OUT_OF_RANGE", "options.retry.multiplier", retry(multiplier=0.5)
    ),
    "a multiplier of no number": edited(
        "OUT_OF_RANGE", "options.retry.multiplier", retry(multiplier=float("nan"))
    ),
    "an infinite multiplier": edited(
        "OUT_OF_RANGE", "options.retry.multiplier", retry(multiplier=float("inf"))
    ),
    "a dedupe_window of half a second": edited(
        "OUT_OF_RANGE", "options.dedupe_window", options(dedupe_window=seconds(0.5))
    ),
    "a dedupe_window of more than a day": edited(
        "OUT_OF_RANGE", "options.dedupe_window", options(dedupe_window=seconds(86401))
    ),
    "a dedupe_window of more than time": edited(
        "OUT_OF_RANGE", "options.dedupe_window", options(dedupe_window=Duration(seconds=2**62))
    ),
    "send_at in 31 days": edited(
        "INVALID_SCHEDULE", "options.send_at", options(send_at=ahead(days=31))
    ),
    "expire_at in 61 days": edited(
        "INVALID_SCHEDULE", "options.expire_at", options(expire_at=ahead(days=61))
    ),
    "expire_at in the past": edited(
        "INVALID_SCHEDULE", "options.expire_at", options(expire_at=ahead(seconds=-1))
    ),
    "expire_at before send_at": edited(
        "INVALID_SCHEDULE",
        "options.expire_at",
        options(send_at=ahead(hours=2), expire_at=ahead(hours=1)),
    ),
    "a broken timestamp": edited(
        "OUT_OF_RANGE", "options.send_at", options(send_at=Timestamp(nanos=-1))
    ),
    "a timestamp after the year 9999": edited(
        "OUT_OF_RANGE", "options.expire_at", options(expire_at=Timestamp(seconds=2**60))
    ),
}

GOOD = enqueue()
BATCH_CASES = {
    "an empty batch": Case("EnqueueBatch", pb.EnqueueBatchRequest(), "REQUIRED", "requests"),
    "501 messages": Case(
        "EnqueueBatch", pb.EnqueueBatchRequest(requests=[GOOD] * 501), "TOO_MANY", "requests"
    ),
    "2,001 recipients": Case(
        "EnqueueBatch",
        pb.EnqueueBatchRequest(
            requests=[enqueue(*(f"a{i}@example.test" for i in range(100)))] * 20 + [GOOD]
        ),
        "TOO_MANY",
        "requests",
    ),
}

UNKNOWN_FIELD_CASES = {
    f"an unknown field in {name}": Case(method, request, "UNKNOWN_FIELD", field)
    for name, method, request, field in (
        ("a request", "Enqueue", with_unknown(enqueue()), "127"),
        ("a message", "Enqueue", with_unknown(enqueue(), lambda r: r.message), "message.127"),
        (
            "a recipient",
            "Enqueue",
            with_unknown(enqueue("a@b.org", "c@d.org"), lambda r: r.message.to[1]),
            "message.to[1].127",
        ),
        (
            "the options",
            "Enqueue",
            with_unknown(enqueue(edit=options(channel="default")), lambda r: r.options),
            "options.127",
        ),
        (
            "a time",
            "Enqueue",
            with_unknown(
                enqueue(edit=options(send_at=ahead(hours=1))), lambda r: r.options.send_at
            ),
            "options.send_at.127",
        ),
        (
            "a batch",
            "EnqueueBatch",
            with_unknown(pb.EnqueueBatchRequest(requests=[GOOD])),
            "127",
        ),
        ("a resend", "Resend", with_unknown(pb.ResendRequest(message_id=NOBODY)), "127"),
        (
            "a filter of Clear",
            "Clear",
            with_unknown(pb.ClearRequest(filter=given(created_before=ahead())), lambda r: r.filter),
            "filter.127",
        ),
        (
            "preferences",
            "UpdatePrefs",
            with_unknown(pb.UpdatePrefsRequest(address="ada@example.test", blocked_flags=2)),
            "127",
        ),
        (
            "a change of preferences",
            "UpdatePrefs",
            with_unknown(
                pb.UpdatePrefsRequest(
                    address="ada@example.test", change=pb.PrefsChange(block_flags=2)
                ),
                lambda r: r.change,
            ),
            "change.127",
        ),
    )
}

LOOK_UP_CASES = {
    "status of nothing": Case("GetStatus", pb.GetStatusRequest(), "REQUIRED", "message_id"),
    "status of two ids": Case(
        "GetStatus",
        pb.GetStatusRequest(message_id=NOBODY, request_id="r"),
        "TOO_MANY",
        "message_id",
    ),
    "status of nobody": not_found("GetStatus", pb.GetStatusRequest(message_id=NOBODY)),
    "status of no id": not_found("GetStatus", pb.GetStatusRequest(message_id="4711'; --")),
    "status of U+0000": not_found("GetStatus", pb.GetStatusRequest(message_id="\0")),
    "status of an unknown request": not_found("GetStatus", pb.GetStatusRequest(request_id="r")),
    "status of a request_id with U+0000": Case(
        "GetStatus", pb.GetStatusRequest(request_id="\0"), "CONTROL_CHARACTER", "request_id"
    ),
    "status of a request_id of 256": Case(
        "GetStatus", pb.GetStatusRequest(request_id="r" * 256), "TOO_LONG", "request_id"
    ),
    "message of nothing": Case("GetMessage", pb.GetMessageRequest(), "REQUIRED", "message_id"),
    "message of nobody": not_found("GetMessage", pb.GetMessageRequest(message_id=NOBODY)),
    "message in an unknown view": Case(
        "GetMessage", pb.GetMessageRequest(message_id=NOBODY, view=9), "OUT_OF_RANGE", "view"
    ),
    "preferences of nobody": Case("GetPrefs", pb.GetPrefsRequest(), "REQUIRED", "address"),
    "preferences of no address": Case(
        "GetPrefs", pb.GetPrefsRequest(address="ada"), "INVALID_ADDRESS", "address"
    ),
    "preferences of U+0000": Case(
        "GetPrefs", pb.GetPrefsRequest(address="a\0@b.org"), "CONTROL_CHARACTER", "address"
    ),
}

RESEND_CASES = {
    "resend of nothing": resend("REQUIRED", "message_id", message_id=""),
    "resend of nobody": not_found("Resend", pb.ResendRequest(message_id=NOBODY)),
    "resend of no id": not_found("Resend", pb.ResendRequest(message_id="\0")),
    "resend to no address": resend("INVALID_ADDRESS", "recipients[0]", recipients=["ada"]),
    "resend to 101": resend(
        "TOO_MANY", "recipients", recipients=[f"a{i}@example.test" for i in range(101)]
    ),
    "resend with a request_id of 256": resend("TOO_LONG", "request_id", request_id="r" * 256),
    "resend with U+0000 in the request_id": resend(
        "CONTROL_CHARACTER", "request_id", request_id="\0"
    ),
}

PREFS_CASES = {
    "no address": prefs("REQUIRED", "address", "", blocked_flags=2),
    "a bad address": prefs("INVALID_ADDRESS", "address", "ada@", blocked_flags=2),
    "a mask of 0": prefs("ZERO_FLAGS", "blocked_flags", blocked_flags=0),
    "a mask of 3": prefs("RESERVED_FLAG", "blocked_flags", blocked_flags=3),
    "a negative mask": prefs("OUT_OF_RANGE", "blocked_flags", blocked_flags=-1),
    "a mask and a change": prefs(
        "TOO_MANY", "change", blocked_flags=2, change=pb.PrefsChange(block_flags=2)
    ),
    "a change of nothing": change("ZERO_FLAGS", "change"),
    "a change that blocks bit 0": change("RESERVED_FLAG", "change.block_flags", block_flags=1),
    "a change that unblocks bit 0": change(
        "RESERVED_FLAG", "change.unblock_flags", unblock_flags=1
    ),
    "a change of negative flags": change("OUT_OF_RANGE", "change.block_flags", block_flags=-2),
    "a change of an unknown category": change(
        "UNKNOWN_CATEGORY", "change.unblock_categories[0]", unblock_categories=["gossip"]
    ),
    "a change of a category with U+0000": change(
        "UNKNOWN_CATEGORY", "change.block_categories[0]", block_categories=["\0"]
    ),
}

CLEAR_CASES = {
    "no filter": Case("Clear", pb.ClearRequest(), "REQUIRED", "filter.created_before"),
    "no created_before": Case(
        "Clear", pb.ClearRequest(filter=given(tags=["a"])), "REQUIRED", "filter.created_before"
    ),
    "100,001 messages": clear("OUT_OF_RANGE", "max_messages", max_messages=100_001),
    "-1 messages": clear("OUT_OF_RANGE", "max_messages", max_messages=-1),
    "1,001 ids": clear("TOO_MANY", "filter.message_ids", message_ids=[NOBODY] * 1001),
    "1,001 correlation_ids": clear(
        "TOO_MANY", "filter.correlation_ids", correlation_ids=["c"] * 1001
    ),
    "1,001 recipients": clear(
        "TOO_MANY", "filter.recipients", recipients=["ada@example.test"] * 1001
    ),
    "a text that is no id": clear(
        "OUT_OF_RANGE", "filter.message_ids[1]", message_ids=[NOBODY, "msg_1"]
    ),
    "a recipient that is no address": clear(
        "INVALID_ADDRESS", "filter.recipients[0]", recipients=["ada"]
    ),
    "an unknown state": clear("OUT_OF_RANGE", "filter.states[0]", states=[99]),
    "the state 0": clear("OUT_OF_RANGE", "filter.states[0]", states=[0]),
    "U+0000 in a tag": clear("CONTROL_CHARACTER", "filter.tags[0]", tags=["\0"]),
    "U+0000 in a correlation_id": clear(
        "CONTROL_CHARACTER", "filter.correlation_ids[0]", correlation_ids=["\0"]
    ),
    "a broken time": clear(
        "OUT_OF_RANGE", "filter.created_after", created_after=Timestamp(nanos=-1)
    ),
}

WATCH_CASES = {
    "a heartbeat of half a second": watch("OUT_OF_RANGE", "heartbeat", heartbeat=seconds(0.5)),
    "a heartbeat of 301 s": watch("OUT_OF_RANGE", "heartbeat", heartbeat=seconds(301)),
    "a negative heartbeat": watch("OUT_OF_RANGE", "heartbeat", heartbeat=seconds(-5)),
    "a snapshot and a token": watch(
        "TOO_MANY", "snapshot", snapshot=pb.SNAPSHOT_UNENDED, resume_token=TOKEN
    ),
    "an unknown snapshot": watch("OUT_OF_RANGE", "snapshot", snapshot=7),
    "a snapshot of everything": watch("FILTER_TOO_WIDE", "filter", snapshot=pb.SNAPSHOT_ALL),
    "a snapshot of all with a tag": watch(
        "FILTER_TOO_WIDE", "filter", snapshot=pb.SNAPSHOT_ALL, filter=given(tags=["a"])
    ),
    "a token that is none": watch("INVALID_TOKEN", "resume_token", resume_token="tomorrow"),
    "a token with U+0000": watch("INVALID_TOKEN", "resume_token", resume_token="\0"),
    "an endless token": watch("INVALID_TOKEN", "resume_token", resume_token="A" * 100_000),
    "a cut token": watch("INVALID_TOKEN", "resume_token", resume_token=TOKEN[:-4]),
    "a changed token": watch("INVALID_TOKEN", "resume_token", resume_token="B" + TOKEN[1:]),
    "a foreign token": watch(
        "INVALID_TOKEN", "resume_token", resume_token=encode_token(2, {0: Position(0)})
    ),
    "a filter with an unknown state": watch(
        "OUT_OF_RANGE", "filter.states[0]", filter=given(states=[13])
    ),
}

EVENTS_CASES = {
    "a page of -1": events("OUT_OF_RANGE", "page_size", page_size=-1),
    "a wait of 61 s": events("OUT_OF_RANGE", "wait", wait=seconds(61)),
    "a negative wait": events("OUT_OF_RANGE", "wait", wait=seconds(-1)),
    "a cut token": events("INVALID_TOKEN", "resume_token", resume_token=TOKEN[4:]),
    "a foreign token": events(
        "INVALID_TOKEN", "resume_token", resume_token=encode_token(2, {0: Position(0)})
    ),
    "1,001 tags": events("TOO_MANY", "filter.tags", filter=given(tags=["t"] * 1001)),
}

UNSERVED_CASES = {
    method: Case(method, request, "NOT_IMPLEMENTED", None, Code.UNIMPLEMENTED)
    for method, request in (
        ("ListMessages", pb.ListMessagesRequest()),
        ("CancelMessage", pb.CancelMessageRequest(message_id=NOBODY)),
        ("DeleteMessage", pb.DeleteMessageRequest(message_id=NOBODY)),
        ("MovePrefs", pb.MovePrefsRequest(old_address="a@b.org", new_address="c@d.org")),
    )
}

TABLE = {
    "enqueue": MESSAGE_CASES,
    "options": OPTIONS_CASES,
    "batch": BATCH_CASES,
    "unknown": UNKNOWN_FIELD_CASES,
    "get": LOOK_UP_CASES,
    "resend": RESEND_CASES,
    "prefs": PREFS_CASES,
    "clear": CLEAR_CASES,
    "watch": WATCH_CASES,
    "events": EVENTS_CASES,
    "unserved": UNSERVED_CASES,
}
CASES = {f"{group}: {name}": case for group, cases in TABLE.items() for name, case in cases.items()}

_COUNTS = """SELECT (SELECT count(*) FROM messages) + (SELECT count(*) FROM deliveries)
    + (SELECT count(*) FROM request_ids) + (SELECT count(*) FROM due)
    + (SELECT count(*) FROM scheduled) + (SELECT count(*) FROM attachments)
    + (SELECT count(*) FROM preferences) + (SELECT count(*) FROM recent_content)
    + (SELECT count(*) FROM events)"""


async def stored_rows(gateway: Gateway) -> int:
    [(count,)] = await gateway.database.fetch(_COUNTS)
    return count


async def answered(gateway: Gateway, case: Case) -> Refusal:
    call = getattr(gateway.stub, case.method)(case.request)
    return await refusal_of(call.read() if case.method == "WatchStatus" else call)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_what_is_wrong_is_named_and_nothing_is_stored(door: Gateway, case: Case) -> None:
    refusal = await answered(door, case)
    assert (refusal.code, refusal.reason) == (case.code, case.reason)
    named = [(case.field, case.reason)] if case.field is not None else []
    assert list(refusal.violations[:1]) == named
    assert refusal.size < 4096
    assert await stored_rows(door) == 0


@pytest.mark.parametrize("case", MESSAGE_CASES.values(), ids=MESSAGE_CASES.keys())
async def test_an_item_of_a_batch_is_refused_as_a_call_of_its_own_would_be(
    door: Gateway, case: Case
) -> None:
    answer = await door.stub.EnqueueBatch(pb.EnqueueBatchRequest(requests=[case.request]))
    [result] = answer.results
    assert result.error.code == case.code.value[0]
    [first, *_] = result.error.violations
    assert pb_reason(result.error.reason) == pb_reason(first.reason) == case.reason
    assert first.field == case.field
    assert await stored_rows(door) == 0


def pb_reason(number: int) -> str:
    return errors_pb2.ErrorReason.Name(number).removeprefix("ERROR_REASON_")


async def test_all_that_is_wrong_is_told_at_once_and_stays_below_4_kb(door: Gateway) -> None:
    request = enqueue(
        *("x\n" * 20 for _ in range(100)),
        sender=mailbox("\n", name="\n"),
        reply_to=[mailbox("nobody", name="\n" * 300)] * 10,
        headers=[message_pb2.Header(name="Ö" * 80, value="\n" * 999)] * 50,
        attachments=[
            message_pb2.Attachment(filename="/\n" * 200, content_type="\n", content_id="\n")
        ]
        * 50,
        custom_args={f"{'é' * 200}{i}": "\n" * 300 for i in range(32)},
        tags=["\n" * 100] * 10,
    )
    for case in (
        Case("Enqueue", request, ""),
        Case(
            "Clear",
            pb.ClearRequest(
                filter=given(created_before=ahead(), recipients=[f"\n{i}" for i in range(1000)])
            ),
            "",
        ),
    ):
        refusal = await answered(door, case)
        assert refusal.code is Code.INVALID_ARGUMENT
        assert refusal.size < 4096
        *shown, (no_field, _) = refusal.violations
        assert 3 <= len(shown) <= 20
        assert all(field for field, _ in shown)
        assert no_field == ""
    answer = await door.stub.EnqueueBatch(pb.EnqueueBatchRequest(requests=[request]))
    error = answer.results[0].error
    assert len(error.violations) == 21
    assert error.violations[-1].description.startswith("and ")
    assert error.ByteSize() < 4096


def too_large(size: int) -> pb.EnqueueRequest:
    return enqueue(attachments=[message_pb2.Attachment(filename="a.bin", data=bytes(size))])


@pytest.mark.parametrize("method", ["Enqueue", "EnqueueBatch"])
async def test_more_than_10_mib_are_refused_with_the_reason(door: Gateway, method: str) -> None:
    request: Any = too_large(10 * MIB)
    if method == "EnqueueBatch":
        request = pb.EnqueueBatchRequest(requests=[too_large(5 * MIB)] * 2)
    refusal = await refusal_of(getattr(door.stub, method)(request))
    assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE")
    assert refusal.retry_s is None  # trying again is pointless
    assert await stored_rows(door) == 0


async def test_much_more_than_10_mib_are_refused_before_they_are_read(door: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.stub.Enqueue(too_large(13 * MIB))
    assert read_refusal(caught.value).code is Code.RESOURCE_EXHAUSTED
    assert await stored_rows(door) == 0


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x12\x7f"],
    ids=["noise", "a string that is not UTF-8", "a cut message"],
)
@pytest.mark.parametrize("method", ["Enqueue", "WatchStatus"])
async def test_bytes_that_are_no_request_are_refused_without_a_word_of_our_own_code(
    door: Gateway, method: str, data: bytes
) -> None:
    path = f"/mailgrpc.v1.MailService/{method}"
    if method == "WatchStatus":
        call = door.channel.unary_stream(path)(data if data[0] != 0x0A else b"\x12\x02\xff\xfe")
        refusal = await refusal_of(call.read())
    else:
        refusal = await refusal_of(door.channel.unary_unary(path)(data))
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "OUT_OF_RANGE")
    assert "Error" not in refusal.text
    assert "google" not in refusal.text
