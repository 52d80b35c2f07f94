"""Plain values become the request that they mean."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mailgrpc.client import Mail, compose
from mailgrpc.client.compose import parse_address
from mailgrpc.v1 import message_pb2

MINIMAL: dict[str, Any] = {"sender": "shop@example.org", "subject": "Hi"}


@pytest.mark.parametrize(
    ("text", "address", "name"),
    [
        ("ada@example.org", "ada@example.org", ""),
        ("Ada Lovelace <ada@example.org>", "ada@example.org", "Ada Lovelace"),
        ('"Lovelace, Ada" <ada@example.org>', "ada@example.org", "Lovelace, Ada"),
        ("<ada@example.org>", "ada@example.org", ""),
        ("a < b <ada@example.org>", "ada@example.org", "a < b"),
        ("Ada <ada@example.org", "Ada <ada@example.org", ""),  # the server says what is wrong
    ],
)
def test_an_address_with_or_without_a_name(text: str, address: str, name: str) -> None:
    assert parse_address(text) == (address, name)


def test_one_recipient_or_several() -> None:
    one = compose(**MINIMAL, to="ada@example.org").message.to
    two = compose(
        **MINIMAL, to=["ada@example.org", message_pb2.Recipient(address="b@c")]
    ).message.to
    assert [recipient.address for recipient in one] == ["ada@example.org"]
    assert [recipient.address for recipient in two] == ["ada@example.org", "b@c"]


def test_attachments_are_paths_pairs_or_the_contracts_own(tmp_path: Path) -> None:
    path = tmp_path / "invoice.pdf"
    path.write_bytes(b"pdf")
    inline = message_pb2.Attachment(filename="logo.png", content_id="logo", data=b"png")
    request = compose(**MINIMAL, attachments=[path, str(path), ("a.txt", b"text"), inline])
    found = [(file.filename, file.data, file.content_id) for file in request.message.attachments]
    pdf = ("invoice.pdf", b"pdf", "")
    assert found == [pdf, pdf, ("a.txt", b"text", ""), ("logo.png", b"png", "logo")]


def test_options_that_nobody_names_are_left_out() -> None:
    assert not compose(**MINIMAL).HasField("options")


def test_options() -> None:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    options = compose(
        **MINIMAL,
        mode="SEND_ONCE",
        priority="URGENT",
        send_at=at,
        expire_at=at + timedelta(hours=1),
        dedupe_window=timedelta(minutes=5),
        channel="bulk",
    ).options
    assert options.mode == message_pb2.DELIVERY_MODE_SEND_ONCE
    assert options.priority == message_pb2.PRIORITY_URGENT
    assert options.send_at.ToDatetime(UTC) == at
    assert options.expire_at.ToDatetime(UTC) == at + timedelta(hours=1)
    assert options.dedupe_window.ToTimedelta() == timedelta(minutes=5)
    assert options.channel == "bulk"


def test_every_request_has_an_id_of_its_own() -> None:
    assert compose(**MINIMAL).request_id != compose(**MINIMAL).request_id
    assert compose(**MINIMAL, request_id="order-1").request_id == "order-1"


def test_every_argument_reaches_the_request() -> None:
    """A field that is new in `Mail` and forgotten in `compose` would be dropped in silence."""
    given: Mail = {
        "sender": "a@example.org",
        "to": "b@example.org",
        "cc": "c@example.org",
        "bcc": "d@example.org",
        "reply_to": "e@example.org",
        "subject": "s",
        "text": "t",
        "html": "h",
        "headers": {"X-A": "1"},
        "attachments": [("f", b"")],
        "tags": ["tag"],
        "categories": ["receipts"],
        "flags": 2,
        "custom_args": {"k": "v"},
        "correlation_id": "o",
        "mode": "SEND_ONCE",
        "priority": "BULK",
        "retry": message_pb2.RetryPolicy(max_attempts=1),
        "send_at": datetime.now(UTC),
        "expire_at": datetime.now(UTC),
        "channel": "bulk",
        "dedupe_window": timedelta(seconds=1),
        "request_id": "r",
        "validate_only": True,
    }
    assert given.keys() == Mail.__required_keys__ | Mail.__optional_keys__
    request = compose(**given)
    fields = {field.name for field, _ in request.message.ListFields()}
    options = {field.name for field, _ in request.options.ListFields()}
    assert fields == set(message_pb2.MailMessage.DESCRIPTOR.fields_by_name)
    assert options == set(message_pb2.DeliveryOptions.DESCRIPTOR.fields_by_name)
    assert request.request_id == "r"
    assert request.validate_only


def test_what_cannot_be_meant_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="unknown argument 'txt'"):
        compose(**MINIMAL, txt="typo")
    with pytest.raises(TypeError, match="'sender' is missing"):
        compose(subject="Hi")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="several"):
        compose(**MINIMAL, tags="one")
    with pytest.raises(ValueError, match="zone"):
        compose(**MINIMAL, send_at=datetime(2030, 1, 1))  # noqa: DTZ001
    with pytest.raises(ValueError, match="SOMETIMES"):
        compose(**MINIMAL, mode="SOMETIMES")
